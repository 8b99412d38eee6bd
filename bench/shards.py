"""Indexed tars of photo-like pictures, and a slow web server that serves them."""

import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import webdataset
from PIL import Image

from bench.pairs import machine, median
from data.index import index
from data.shards import snapshot
from data.shards.snapshot import Snapshot
from data.storage.transport import ReadConfig, Transport

GRAIN = {512: 3.0, 1024: 3.5}  # pixel noise that makes JPEGs of quality 90 as large as photographs: 66 kB and 245 kB


def photo(side: int, seed: int, grain: float) -> bytes:
    """A JPEG of smooth noise at every scale, the larger the stronger."""
    draw = np.random.default_rng(seed)
    total = 128 + grain * draw.standard_normal((side, side, 1))
    cells = 4
    while cells <= side:
        rough = draw.standard_normal((3, cells, cells)).astype(np.float32)
        smooth = [Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC) for channel in rough]
        total = total + 60 * (4 / cells) ** 0.7 * np.stack([np.asarray(channel) for channel in smooth], -1)
        cells *= 2
    file = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def photos(side: int, count: int) -> list[bytes]:
    return [photo(side, seed, GRAIN[side]) for seed in range(count)]


def tars(folder: str, pictures: Sequence[bytes], shards: int, samples: int) -> list[str]:
    """Tars of captioned pictures, written by webdataset; the same few pictures repeated under other names."""
    paths = [f"{folder}/{shard:06d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with webdataset.TarWriter(path, mtime=0) as tar:
            for n in range(samples):
                number = shard * samples + n
                tar.write({"__key__": f"{number:08d}", "jpg": pictures[number % len(pictures)], "txt": f"smooth noise number {number}"})
    return paths


def indexed(shards: Sequence[str], folder: str) -> Snapshot:
    """A snapshot of tars, with the sidecars in `folder`."""
    transport = Transport(ReadConfig())
    for path in shards:
        outcome = index(path, transport, folder)
        assert (outcome.error, outcome.rejected) == ("", ()), outcome
    return snapshot.build(shards, transport, folder=folder)


@contextmanager
def served(folder: str, latency: float) -> Iterator[str]:
    """The URL of a web server on loopback, in its own process, that delays every request by `latency` seconds."""
    command = [sys.executable, "-m", "tests.servers", folder, "--latency", str(latency), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


if __name__ == "__main__":
    machine()
    for size in GRAIN:
        print(f"pictures of {size} px: {median([len(one) for one in photos(size, 4)]):,.0f} bytes")
