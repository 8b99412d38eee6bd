"""Reports what a data set holds, as one HTML file: `python -m data.report FOLDER|TARS|SNAPSHOT... --heldout ...`. Stages write the same.

The page shows what is used and left out, sizes, crops, captions, pictures that are there twice, and a contact sheet.
"""

import argparse
import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import captions, commands, overlap, sources
from data.facts import collect
from data.loading.buckets import bucket_sizes
from data.loading.read import Reader
from data.loading.stream import Stream
from data.names import Names
from data.shards import pictures, table
from data.shards.pictures import BadContent
from data.shards.snapshot import Snapshot
from data.sources import RunSnapshots
from data.storage.transport import ReadConfig, Transport, write_atomic
from data.tokens import T5Tokens
from dev2pro import contact_sheet, page
from dev2pro.errors import ConfigError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

REPORT, FACTS = "data.html", "data.json"  # in a run's folder, as dev2pro/artifacts/record.py has them
TEMPLATE = Path(__file__).with_name("report.html.j2")
SHEET, PAIRS = 36, 12  # pictures of the contact sheet, and pairs shown, at most
LARGEST, SMALLEST = 160, 64  # pixels of a picture's longer side in the page
UI_ACROSS, UI_DOWN, UI_SIDE = 8, 2, 96  # the sheet in the UI
MOST_LOOKALIKES = 20_000  # pictures that are compared with each other: the work grows with the square


def start(snapshots: RunSnapshots, stream: Stream, model: str, max_sequence_length: int, *, write: bool = True) -> dict[str, Any]:
    """At the start of a run: prints what is trained on and what stands out, and writes the report into the run's folder, once, if it may.

    `model`: the pipeline whose T5 reads the captions. Returns the facts for the record; nothing on other ranks than the first.
    """
    if not snapshots.is_main_process:
        return {}
    print(printable(sources.summary_line(stream)), flush=True)
    read, train, heldout, out = snapshots.config.read, snapshots.train, snapshots.heldout, Path(snapshots.out)
    identity = table.digest([train.id, heldout.id, stream.order.buckets, stream.order.batch, list(stream.parts), max_sequence_length])
    facts = _written(out, identity)
    if facts is None:
        assigned = np.array([stream.order.buckets.index(stream.order.size_of(row)) for row in range(len(train))])
        try:
            found = captions.check(train, read, None if "text" in stream.parts else T5Tokens(model, max_sequence_length))
        except ConfigError:  # loading the model says what is wrong with it
            return {}
        facts = collect(train, heldout, snapshots.shared, read, stream.order.buckets, assigned, found)
        if write:
            write_page(out / REPORT, facts, train, heldout, read)
            stored = {**facts, "identity": identity, "sheet": _sheet(train, read)}
            write_atomic(str(out / FACTS), json.dumps(stored, indent=1, sort_keys=True).encode())
    for finding in facts["findings"]:
        print(printable(f"data: {finding}"), flush=True)
    return {"report": facts}


def _written(out: Path, identity: str) -> dict[str, Any] | None:
    """The facts that a run wrote before it was interrupted, if they are of the same data."""
    try:
        facts = json.loads((out / FACTS).read_bytes())
        same = facts.pop("identity") == identity and (out / REPORT).is_file()
        facts.pop("sheet")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return facts if same else None


def write_page(path: Path, facts: dict[str, Any], train: Snapshot, heldout: Snapshot | None, read: ReadConfig) -> None:
    """Writes the facts of `collect` and the pictures they name as one page."""
    rows = np.unique(np.linspace(0, len(train) - 1, SHEET).astype(int)).tolist()
    names, texts = Names(train, read), _texts(train, rows, read)
    sheet = [
        {**picture, "name": names(row), "caption": texts[row]}
        for row, image in zip(rows, _images(train, rows, read), strict=True) if image and (picture := page.picture(image, LARGEST, SMALLEST))
    ]  # fmt: skip
    crossed = facts["overlap"] or {}
    groups = [
        ("Held out and trained on", crossed.get("same"), heldout), ("Held out, and like a picture that is trained on", crossed.get("near"), heldout),
        ("There twice", facts["duplicates"], train), ("Alike", facts["lookalikes"], train),
    ]  # fmt: skip
    pairs = [
        {"title": title, "count": found["count"], "pairs": _pairs(found["examples"][:PAIRS], ours, train, read)}
        for title, found, ours in groups if found and found["count"] and ours is not None
    ]  # fmt: skip
    html = page.render(TEMPLATE, facts=facts, sheet=sheet, groups=pairs, number=page.number)
    write_atomic(str(path), html.encode())


def _pairs(examples: Sequence[dict[str, Any]], ours: Snapshot, theirs: Snapshot, read: ReadConfig) -> list[dict[str, Any]]:
    mine = _images(ours, [example["rows"][0] for example in examples], read)
    other = _images(theirs, [example["rows"][1] for example in examples], read)
    shown = [[page.picture(image, LARGEST, SMALLEST) if image else None for image in pair] for pair in zip(mine, other, strict=True)]
    return [{**example, "pictures": pair} for example, pair in zip(examples, shown, strict=True)]


def _images(snapshot: Snapshot, rows: Sequence[int], read: ReadConfig) -> list[Image.Image | None]:
    """The upright pictures of these rows, at least LARGEST pixels where they have them; None for one that cannot be decoded."""
    images = list[Image.Image | None]()
    for _, parts in Reader(snapshot, read, ("picture",)).prefetch((row, row) for row in rows):
        try:
            image = pictures.upright(parts["picture"], LARGEST)
            image.thumbnail((2 * LARGEST, 2 * LARGEST))
            images.append(image)
        except BadContent:
            images.append(None)
    return images


def _texts(snapshot: Snapshot, rows: Sequence[int], read: ReadConfig) -> dict[int, str]:
    """The beginning of each row's first caption."""
    return {row: captions.excerpt(text) for row, text in reversed(captions.read_captions(snapshot, rows, read))}


def _sheet(snapshot: Snapshot, read: ReadConfig) -> str:
    """A small contact sheet for the UI, a JPEG in base64; "" if no picture can be decoded."""
    rows = np.unique(np.linspace(0, len(snapshot) - 1, UI_ACROSS * UI_DOWN).astype(int)).tolist()
    images = [image for image in _images(snapshot, rows, read) if image]
    across = min(UI_ACROSS, len(images))
    lines = [images[first : first + across] for first in range(0, len(images) - across + 1, across)] if images else []
    if not lines:
        return ""
    data = io.BytesIO()
    contact_sheet.contact_sheet("", [""] * across, [("", line) for line in lines], UI_SIDE).save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def work(options: argparse.Namespace) -> int:
    """Writes the report and prints one line."""
    read = ReadConfig(cache=options.cache)
    tokens, transport = T5Tokens(options.model, options.max_sequence_length) if options.model else None, Transport(read)
    sources.check(
        sources.DataConfig(
            name="",
            train=options.data,
            heldout=options.heldout,
            resolution=options.resolution,
            aspect=options.aspect,
            bucket_step=options.bucket_step,
        )
    )
    sizes = bucket_sizes(options.resolution, options.bucket_step, options.aspect)
    train = sources.open_snapshot(options.data, "DATA", transport)
    heldout = sources.open_snapshot(options.heldout, "--heldout", transport) if options.heldout else None
    found = overlap.find(train, heldout, read, math.inf) if heldout is not None else None
    near = overlap.lookalikes(train, read) if len(train) <= MOST_LOOKALIKES else None
    facts = collect(train, heldout, found, read, sizes, None, captions.check(train, read, tokens, math.inf), near)
    if near is None:
        facts["findings"].append(f"training pictures were not compared with each other, for they are more than {MOST_LOOKALIKES:,}.")
    write_page(Path(options.out), facts, train, heldout, read)
    held = f", {len(heldout):,} held out" if heldout is not None else ""
    out_of = f", {left_out:,} left out" if (left_out := sum(note["count"] for note in facts["left_out"])) else ""
    stands = f"{len(facts['findings'])} findings" if len(facts["findings"]) != 1 else "1 finding"
    print(f"report: {len(train):,} pictures{held}{out_of}; {stands}, in {redact_url(options.out)}")
    return 0


def main() -> None:
    """Reads the command line."""
    parser = commands.make_parser("data.report", __doc__)
    parser.add_argument("data", nargs="+", metavar="DATA", help="as data.train: folders of captioned pictures, indexed tars, or a snapshot")
    parser.add_argument("--heldout", nargs="+", default=[], metavar="DATA", help="as data.heldout; compared with DATA")
    parser.add_argument("--model", metavar="PATH", help="a FLUX.1 pipeline, whose tokenizer measures the captions; else they count in characters")
    parser.add_argument("--max-sequence-length", type=commands.positive, default=512, metavar="TOKENS", help="as model.max_sequence_length (512)")
    parser.add_argument("--resolution", type=commands.positive, default=512, metavar="PIXELS", help="as data.resolution (%(default)s)")
    parser.add_argument("--aspect", type=float, default=2.0, metavar="RATIO", help="as data.aspect (%(default)s)")
    parser.add_argument("--bucket-step", type=commands.positive, default=64, metavar="PIXELS", help="as data.bucket_step (%(default)s)")
    parser.add_argument("--cache", default=ReadConfig().cache, metavar="FOLDER", help="as data.read.cache (%(default)s)")
    parser.add_argument("--out", default=REPORT, metavar="FILE.html", help="what to write (%(default)s)")
    commands.run("report", parser, work)


if __name__ == "__main__":
    main()
