"""The command `python -m data.snapshot`: pins indexed shards and their samples in one file, the only thing a run looks at."""

import argparse
import json
import os

from data import commands, ledger
from data.shards.snapshot import ENDING, Filters, build
from data.storage import urls
from data.storage.transport import ReadConfig, Transport, write_atomic
from dev2pro.errors import ConfigError, DataError
from dev2pro.redact import redact_url

MAX_ROWS = 30  # lines of the table of shards that are left out


def work(options: argparse.Namespace) -> int:
    """Writes the snapshot and prints a summary."""
    if os.path.exists(options.out):
        raise DataError(f"{redact_url(options.out)} exists, and runs may depend on it. Choose another --out, or remove it.")
    if (options.only_new or options.new_weight > 1) and not options.ledger:
        raise ConfigError("What is new, only a ledger can tell. Give --ledger FILE with --only-new and --new-weight, or leave them out.")
    transport = Transport(ReadConfig())
    shards = [url for pattern in options.shards for url in urls.expand(pattern, "SHARDS")]
    shards, unusable = (list(dict.fromkeys(shards)), dict[str, str]()) if options.skip_unusable else (shards, None)
    consumed = ledger.consumed(options.ledger) if options.ledger else set()
    old, new = (0 if options.only_new else 1), options.new_weight
    filters = Filters(
        options.min_side, options.max_aspect, options.min_caption, options.max_caption, ledger.quarantined(options.without)
    )  # fmt: skip
    with commands.progress("reading indexes", len(shards)) as advance:
        snapshot = build(
            shards, transport, sources=options.shards, folder=options.index, filters=filters, advance=advance,
            repeat=lambda sha256: old if sha256 in consumed else new, unusable=unusable,
        )  # fmt: skip
    skipped = [{"shard": redact_url(url), "reason": why} for url, why in sorted((unusable or {}).items())]
    commands.show("left out, as they cannot be used", ("shard", "reason"), [tuple(row.values()) for row in skipped], MAX_ROWS)
    if len(snapshot):
        snapshot.write(options.out)
    if options.report:
        report = {"shards": len(shards), "pinned": len(snapshot.shards), "samples": len(snapshot), "unusable": skipped}
        write_atomic(options.report, json.dumps(report).encode())
    if not len(snapshot):
        if options.only_new and not snapshot.shards:
            raise DataError(
                f"There is nothing new: every shard is in {redact_url(options.ledger)}, or empty. Give other shards, or leave out --only-new."
            )
        raise DataError("There is no sample to pin: the indexes list none, or the filters leave none. Give other shards or filters.")
    fresh = f", {sum(shard.sha256 not in consumed for shard in snapshot.shards):,} of them new" if options.ledger else ""
    print(f"snapshot: {redact_url(options.out)} pins {len(snapshot):,} samples in {len(snapshot.shards):,} shards{fresh} ({snapshot.id[:12]})")
    return 0


def main() -> None:
    """Reads the command line."""
    parser = commands.make_parser("data.snapshot", __doc__)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="indexed tars: paths or addresses, {000..099} braces, * but for http")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"what to write, such as january{ENDING}")
    parser.add_argument("--index", metavar="FOLDER", help="where the sidecars are, if not beside the shards")
    parser.add_argument("--min-side", type=int, default=0, metavar="PIXELS", help="leave out smaller pictures")
    parser.add_argument("--max-aspect", type=float, default=0.0, metavar="RATIO", help="leave out pictures longer or higher than this")
    parser.add_argument("--min-caption", type=int, default=0, metavar="CHARACTERS", help="leave out shorter captions")
    parser.add_argument("--max-caption", type=int, default=0, metavar="CHARACTERS", help="leave out longer captions")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE", help="quarantine files of earlier runs: leave out what they name")
    parser.add_argument("--ledger", metavar="FILE", help="what earlier runs consumed")
    parser.add_argument("--only-new", action="store_true", help="leave out shards that the ledger knows")
    parser.add_argument(
        "--new-weight", type=commands.positive, default=1, metavar="K", help="use shards that the ledger does not know K times an epoch"
    )
    parser.add_argument("--skip-unusable", action="store_true", help="leave out shards that are not indexed, changed, or there twice, and say so")
    parser.add_argument("--report", metavar="FILE", help="write numbers and what was left out as JSON, too, even if nothing is pinned")
    commands.run("snapshot", parser, work)


if __name__ == "__main__":
    main()
