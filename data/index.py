"""The command that indexes shards, `python -m data.index SHARDS...`: a sidecar for every tar that is whole, and a table of what is not."""

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any

from data import commands
from data.shards import notes, pictures, sidecar
from data.shards.notes import Notes
from data.shards.scan import scan
from data.shards.sidecar import Sidecar
from data.storage import urls
from data.storage.transport import ReadConfig, Transport, write_atomic
from dev2pro.errors import ConfigError, DataError, StageError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

MAX_ROWS = 30  # lines of the table of rejections
_transport: Transport


@dataclass(frozen=True)
class Outcome:
    """The result for one shard. `partial`: where it is damaged. `reused`: an existing index is still valid."""

    url: str
    samples: int = 0
    rejected: tuple[dict[str, Any], ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    altered: Notes = field(default_factory=dict)
    partial: dict[str, Any] | None = None
    error: str = ""
    exit_code: int = 0
    reused: bool = False


def index(
    url: str, transport: Transport, folder: str | None = None, *, empty_captions: bool = False, allow_partial: bool = False, repeat: int = 1
) -> Outcome:
    """Indexes one shard. Skips it if a valid index with the same policy exists (see `scan`). `repeat`: how often an epoch takes its samples."""
    policy = {"empty_captions": empty_captions, "allow_partial": allow_partial}
    try:
        shard_index = _existing_sidecar(url, transport, folder, policy)
        reused = shard_index is not None
        if shard_index is None:
            shard_index = scan(url, transport, **policy)
            shard_index.head.update({"repeat": repeat} if repeat > 1 else {})
            transport.write(sidecar.path_of(url, folder), shard_index.encode())
        head = shard_index.head
        return Outcome(url, len(shard_index), tuple(head["rejected"]), head["ignored"], head.get("altered", {}), head["partial"], reused=reused)
    except StageError as error:
        return Outcome(url, error=str(error), exit_code=error.exit_code)


def _existing_sidecar(url: str, transport: Transport, folder: str | None, policy: dict[str, bool]) -> Sidecar | None:
    try:
        shard_index = sidecar.read(url, transport, folder)
    except DataError:
        return None
    readable_now = any(kind.removeprefix(".") in pictures.SUFFIXES for kind in shard_index.head["ignored"])  # as a plugin was installed since
    unchanged = shard_index.head["policy"] == policy and not shard_index.info.difference(transport.info(url))
    return shard_index if unchanged and not readable_now else None


def _start(config: ReadConfig) -> None:
    global _transport
    _transport = Transport(config)


def _index(url: str, folder: str | None, policy: dict[str, bool]) -> Outcome:
    return index(url, _transport, folder, **policy)


def work(options: argparse.Namespace) -> int:
    """Indexes in parallel. The exit code is 0, or that of the first shard that could not be indexed or has no sample."""
    shards = list(dict.fromkeys(url for pattern in options.shards for url in urls.expand(pattern, "SHARDS")))
    if folders := [redact_url(url) for url in shards if os.path.isdir(url)]:
        tars, packing = f"{folders[0]}/*.tar", f"python -m data.pack {folders[0]} OUT"
        raise ConfigError(f"{folders[0]} is a folder. Name the tars in it, as in '{tars}', or make some of its pictures: `{packing}`.")
    served = [url for url in shards if urls.is_remote(url) and not url.startswith("s3://")]
    if served and not options.to:
        raise ConfigError(
            f"{redact_url(served[0])}: nothing can be written beside it, for http is for reading. Give the indexes a folder: --to FOLDER."
        )
    policy = {"empty_captions": options.captions == "empty", "allow_partial": options.allow_partial}
    outcomes: dict[str, Outcome] = {}
    with (
        commands.progress("indexing", len(shards)) as advance,
        commands.processes(options.workers, _start, (ReadConfig(),)) as pool,
    ):
        for done in as_completed([pool.submit(_index, url, options.to, policy) for url in shards]):
            outcomes[done.result().url] = done.result()
            advance()
    if options.report:
        write_atomic(options.report, json.dumps(_report([outcomes[url] for url in shards])).encode())
    return _print_summary([outcomes[url] for url in shards])


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    """The summary as JSON values."""
    rejected = [{"shard": redact_url(outcome.url), **bad} for outcome in outcomes for bad in outcome.rejected]
    unusable = [{"shard": redact_url(outcome.url), "reason": outcome.error} for outcome in outcomes if outcome.exit_code]
    return {"shards": len(outcomes), "samples": sum(outcome.samples for outcome in outcomes), "rejected": rejected, "unusable": unusable}


def _print_summary(outcomes: list[Outcome]) -> int:
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    rows = [(redact_url(outcome.url), bad["offset"], bad["key"], bad["reason"]) for outcome in outcomes for bad in outcome.rejected]
    commands.show("rejected samples", ("shard", "at byte", "key", "reason"), rows, MAX_ROWS)
    if ignored := sum((Counter(outcome.ignored) for outcome in outcomes), Counter[str]()):
        kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in ignored.most_common(MAX_ROWS))
        print(f"index: {ignored.total():,} members are of no use here: {kinds}")
    altered: Notes = {}
    for outcome in outcomes:
        notes.merge(altered, outcome.altered)
        if outcome.partial:
            why = printable(f"{outcome.partial['offset']}: {outcome.partial['reason']}")
            print(f"index: {redact_url(outcome.url)} is used only up to its damage at byte {why}")
    for line in notes.altered(altered, "data.background"):
        print(f"index: {line}")
    for outcome in failed:
        print(f"index: {outcome.error}", file=sys.stderr)
    fine = [outcome for outcome in outcomes if not outcome.exit_code]
    print(
        f"index: {len(fine):,} shards with {sum(outcome.samples for outcome in fine):,} samples "
        f"({sum(outcome.reused for outcome in fine):,} were indexed before); rejected are {len(rows):,} samples and {len(failed):,} shards"
    )
    if empty := [redact_url(outcome.url) for outcome in fine if not outcome.samples]:
        more = f" and {len(empty) - 1:,} other shards hold" if len(empty) > 1 else " holds"
        print(f"index: {empty[0]}{more} no sample that can be used. Mend what the table above names, or leave it out.", file=sys.stderr)
    return failed[0].exit_code if failed else DataError.exit_code if empty else 0


def main() -> None:
    """Reads the command line."""
    parser = commands.make_parser("data.index", __doc__)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="tars: paths or addresses, {000..099} braces, * but for http")
    parser.add_argument("--to", metavar="FOLDER", help="where sidecars go when they cannot lie beside their shards (http)")
    parser.add_argument("--workers", type=commands.positive, default=commands.cores(), help="processes (default: %(default)s)")
    parser.add_argument("--captions", choices=("drop", "empty"), default="drop", help="what happens to samples without a usable caption")
    parser.add_argument("--allow-partial", action="store_true", help="of a damaged shard, keep the whole samples before the damage")
    parser.add_argument("--report", metavar="FILE", help="write what became of the shards as JSON as well: shards, samples, rejected, unusable")
    commands.run("index", parser, work)


if __name__ == "__main__":
    main()
