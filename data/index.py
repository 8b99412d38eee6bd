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
from data.shards import sidecar
from data.shards.scan import scan
from data.shards.sidecar import Sidecar
from data.storage import urls
from data.storage.transport import ReadConfig, Transport, write_atomic
from dev2pro.errors import ConfigError, DataError, StageError

SHOWN = 30  # lines of the table of rejections
_transport: Transport


@dataclass(frozen=True)
class Outcome:
    """What became of one shard; `partial`: where it is damaged; `kept`: an earlier index still fits."""

    url: str
    samples: int = 0
    rejected: tuple[dict[str, Any], ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Any] | None = None
    error: str = ""
    exit_code: int = 0
    kept: bool = False


def index(place: str, transport: Transport, folder: str | None = None, *, empty_captions: bool = False, allow_partial: bool = False) -> Outcome:
    """Indexes one shard, unless that was done before with the same policy (see `scan`)."""
    policy = {"empty_captions": empty_captions, "allow_partial": allow_partial}
    try:
        made = _existing_sidecar(place, transport, folder, policy)
        kept = made is not None
        if made is None:
            made = scan(place, transport, **policy)
            transport.write(sidecar.path_of(place, folder), made.encode())
        return Outcome(place, len(made), tuple(made.head["rejected"]), made.head["ignored"], made.head["partial"], kept=kept)
    except StageError as error:
        return Outcome(place, error=str(error), exit_code=error.exit_code)


def _existing_sidecar(place: str, transport: Transport, folder: str | None, policy: dict[str, bool]) -> Sidecar | None:
    try:
        there = sidecar.read(place, transport, folder)
    except DataError:
        return None
    return there if there.head["policy"] == policy and not there.stamp.difference(transport.info(place)) else None


def _start(config: ReadConfig) -> None:
    global _transport
    _transport = Transport(config)


def _index(place: str, folder: str | None, policy: dict[str, bool]) -> Outcome:
    return index(place, _transport, folder, **policy)


def work(options: argparse.Namespace) -> int:
    """Indexes in parallel. The exit code is 0, or that of the first shard that could not be indexed."""
    shards = list(dict.fromkeys(place for pattern in options.shards for place in urls.expand(pattern, "SHARDS")))
    if folders := [urls.redact_url(place) for place in shards if os.path.isdir(place)]:
        tars, packing = f"{folders[0]}/*.tar", f"python -m data.pack {folders[0]} OUT"
        raise ConfigError(f"{folders[0]} is a folder. Name the tars in it, as in '{tars}', or make some of its pictures: `{packing}`.")
    served = [place for place in shards if urls.is_remote(place) and not place.startswith("s3://")]
    if served and not options.to:
        raise ConfigError(
            f"{urls.redact_url(served[0])}: nothing can be written beside it, for http is for reading. Give the indexes a folder: --to FOLDER."
        )
    policy = {"empty_captions": options.captions == "empty", "allow_partial": options.allow_partial}
    outcomes: dict[str, Outcome] = {}
    with (
        commands.progress("indexing", len(shards)) as advance,
        commands.processes(options.workers, _start, (ReadConfig(),)) as pool,
    ):
        for done in as_completed([pool.submit(_index, place, options.to, policy) for place in shards]):
            outcomes[done.result().url] = done.result()
            advance()
    if options.report:
        write_atomic(options.report, json.dumps(_report([outcomes[place] for place in shards])).encode())
    return _tell([outcomes[place] for place in shards])


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    """The same as is told, for programs."""
    rejected = [{"shard": urls.redact_url(one.url), **bad} for one in outcomes for bad in one.rejected]
    unusable = [{"shard": urls.redact_url(one.url), "reason": one.error} for one in outcomes if one.exit_code]
    return {"shards": len(outcomes), "samples": sum(one.samples for one in outcomes), "rejected": rejected, "unusable": unusable}


def _tell(outcomes: list[Outcome]) -> int:
    failed = [one for one in outcomes if one.exit_code]
    rows = [(urls.redact_url(one.url), bad["offset"], bad["key"], bad["reason"]) for one in outcomes for bad in one.rejected]
    commands.show("rejected samples", ("shard", "at byte", "key", "reason"), rows, SHOWN)
    if ignored := sum((Counter(one.ignored) for one in outcomes), Counter[str]()):
        kinds = ", ".join(f"{count:,} {urls.printable(kind)}" for kind, count in ignored.most_common(SHOWN))
        print(f"index: {ignored.total():,} members are of no use here: {kinds}")
    for one in outcomes:
        if one.partial:
            why = urls.printable(f"{one.partial['offset']}: {one.partial['reason']}")
            print(f"index: {urls.redact_url(one.url)} is used only up to its damage at byte {why}")
    for one in failed:
        print(f"index: {one.error}", file=sys.stderr)
    fine = [one for one in outcomes if not one.exit_code]
    print(
        f"index: {len(fine):,} shards with {sum(one.samples for one in fine):,} samples ({sum(one.kept for one in fine):,} were indexed before); "
        f"rejected are {len(rows):,} samples and {len(failed):,} shards"
    )
    return failed[0].exit_code if failed else 0


def main() -> None:
    """Reads the command line."""
    parser = commands.parser("data.index", __doc__)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="tars: paths or addresses, {000..099} braces, * but for http")
    parser.add_argument("--to", metavar="FOLDER", help="where sidecars go when they cannot lie beside their shards (http)")
    parser.add_argument("--workers", type=commands.positive, default=commands.cores(), help="processes (default: %(default)s)")
    parser.add_argument("--captions", choices=("drop", "empty"), default="drop", help="what happens to samples without a usable caption")
    parser.add_argument("--allow-partial", action="store_true", help="of a damaged shard, keep the whole samples before the damage")
    parser.add_argument("--report", metavar="FILE", help="write what became of the shards as JSON as well: shards, samples, rejected, unusable")
    commands.run("index", parser, work)


if __name__ == "__main__":
    main()
