"""Small shards of pictures with several aspect ratios, some of them broken, and streams over them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data import index
from data.loading.buckets import bucket_sizes
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Stream
from data.shards import snapshot
from data.shards.snapshot import Snapshot
from data.storage.transport import ReadConfig, Transport
from tests.shards import tar

READ = ReadConfig(workers=0, threads=3, retries=0)
DRAWN = Augment("random", flip=True)
BUCKETS = bucket_sizes(16, 8, 2.0)
FORMS = [(20, 20), (40, 16), (16, 40), (24, 18), (17, 23)]
PER_SHARD = 11
BAD = {3, 17, 18}  # rows whose pictures cannot be decoded


def picture(row: int, broken: bool = False) -> bytes:
    """Random pixels, different for every row; a broken one has a valid header and half of its body."""
    width, height = FORMS[row % len(FORMS)]
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2] if broken else buffer.getvalue()


def write_snapshot(folder: Path, shards: int, bad: frozenset[int] = frozenset()) -> Snapshot:
    """A snapshot of new shards; every fourth sample has three captions."""
    transport, paths = Transport(READ), []
    for number in range(shards):
        members: list[tuple[str, bytes]] = []
        for row in range(number * PER_SHARD, (number + 1) * PER_SHARD):
            several = json.dumps({"captions": [f"picture {row} {word}" for word in ("seen", "told", "shown")]}).encode()
            caption = (f"{row:04d}.txt", b"picture %d" % row) if row % 4 else (f"{row:04d}.json", several)
            members += [(f"{row:04d}.png", picture(row, row in bad)), caption]
        paths.append(str(folder / f"{number}.tar"))
        Path(paths[-1]).write_bytes(tar(members))
        assert not index.index(paths[-1], transport).error
    return snapshot.build(paths, transport)


def stream(pins: Snapshot, *, batch: int, seed: int = 0, workers: int = 0, augment: Augment = DRAWN, path: str | None = None) -> Stream:
    quarantine = Quarantine(pins, path)
    quarantine._check = lambda *_: None  # three of eleven exceed the limit, which another test covers
    return Stream(Order(pins, BUCKETS, seed, batch), replace(READ, workers=workers), augment, quarantine)
