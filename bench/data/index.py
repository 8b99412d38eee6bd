"""Throughput of indexing shards: headers alone, headers with checksums and picture sizes, and the command.

`python -m bench.data.index [pairs]`. Everything lies in the page cache.
"""

import mmap
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.pairs import machine, median, ratio, spread
from bench.shards import photos, tars
from data.shards import sidecar
from data.shards import tar as headers
from data.shards.scan import scan
from data.storage.transport import ReadConfig, Transport

SMALL = 20_000  # samples of 300 bytes
SHARDS, PICTURES = 6, 256  # tars, samples in each


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """(items a second, items a CPU second)."""
    start, cpu = time.perf_counter(), time.process_time()
    count = work()
    return count / (time.perf_counter() - start), count / (time.process_time() - cpu)


def ours(path: str) -> int:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sum(1 for _ in headers.walk(lambda offset, length: content[offset : offset + length], len(content)))


def pythons(path: str) -> int:
    with tarfile.open(path, "r:") as tar:
        return sum(1 for _ in tar)


def walking(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (path,) = tars(folder, [bytes(300)], 1, SMALL)
        rounds = [(timed(lambda: ours(path)), timed(lambda: pythons(path))) for _ in range(pairs)]
    print(f"\nheaders alone, {2 * SMALL:,} members of up to 300 bytes in one tar; {pairs} pairs")
    ours_rates, other = zip(*rounds, strict=True)
    for name, results in (("data.shards.tar.walk, strict", ours_rates), ("Python's tarfile", other)):
        print(f"  {name:24} {spread([rate[0] for rate in results])} members/s, {median([rate[1] for rate in results]):,.0f} a CPU second")
    times = ratio([rate[1] for rate in ours_rates], [rate[1] for rate in other])
    print(f"  ours is {times} times as fast by CPU; target 100,000 members/s")


def scanning(side: int, pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = tars(folder, photos(side, 16), SHARDS, PICTURES * 512 // side)
        size, samples = sum(map(os.path.getsize, paths)) / 1e6, SHARDS * PICTURES * 512 // side
        transport = Transport(ReadConfig())
        rounds = [(timed(lambda: sum(len(scan(path, transport)) for path in paths)), command(paths)) for _ in range(pairs)]
    print(f"\nthe whole of {SHARDS} shards with {samples:,} pictures of {side} px, {size:.0f} MB: CRC-32, SHA-256, picture headers; {pairs} rounds")
    alone, whole = zip(*rounds, strict=True)
    each = size / samples
    rates, costs = [timing[0] for timing in alone], [timing[1] for timing in alone]
    print(
        f"  data.shards.scan.scan, one process {spread(rates)} samples/s, {each * median(rates):,.0f} MB/s "
        f"({each * median(costs):,.0f} MB a CPU second)"
    )
    commands = [samples / timing for timing in whole]
    print(f"  python -m data.index        {spread(commands)} samples/s, {size / median(whole):,.0f} MB/s, {median(whole):.2f} s with its start-up")


def command(paths: Sequence[str]) -> float:
    """Seconds to index the shards without existing sidecars."""
    for path in paths:
        Path(sidecar.path_of(path)).unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "data.index", *paths], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(pairs: int) -> None:
    machine()
    walking(pairs)
    for side in (512, 1024):
        scanning(side, pairs)
    print()
    machine()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
