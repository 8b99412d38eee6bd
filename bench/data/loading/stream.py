"""How fast pictures come: our stream against bare decoding and against webdataset's own loader, and over a slow network.

`python -m bench.data.loading.stream [pairs]`. Every number is from after the start-up. Images a second suffer from whatever else
the machine does, and not all contestants alike; CPU time (of all processes together) suffers less, so ratios of both are told.
"""

import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from bench.pairs import machine, median, ratio, spread
from bench.shards import indexed, photos, served, tars
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.read import Reader
from data.loading.stream import Augment, Stream
from data.shards.snapshot import Snapshot
from data.storage.transport import ReadConfig

WORKERS, WARM, SECONDS = 2, 1.0, 5.0
SHARDS = 8
LATENCY = 0.04  # seconds


@dataclass(frozen=True)
class Speed:
    """Images a second, CPU ms an image, and the share of the time that the main process stood still."""

    rate: float
    cpu: float
    waited: float = 0.0


def measured(batches: Iterable[Any], size_of: Callable[[Any], int], waited: Callable[[], float] = lambda: 0.0) -> Speed:
    """Of an endless row of batches that are taken as fast as they come."""
    come = iter(batches)
    with closing(come) if hasattr(come, "close") else nullcontext():
        next(come)
        _taken(come, size_of, WARM)
        cpu, stood = _cpu(), waited()
        count, took = _taken(come, size_of, SECONDS)
        return Speed(count / took, 1000 * (_cpu() - cpu) / count, (waited() - stood) / took)


def _taken(come: Any, size_of: Callable[[Any], int], seconds: float) -> tuple[int, float]:
    start, count = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds:
        count += size_of(next(come))
    return count, took


def _cpu() -> float:
    """Seconds of CPU that this process and its children have used."""
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with open(f"/proc/{pid}/stat") as file:
            total += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


# ---- the contestants --------------------------------------------------------------------------------------------------------------------


def bare(pictures: Callable[[], Iterator[bytes]]) -> Speed:
    """As many processes as the others have workers, each decoding an endless row of pictures, and nothing else."""
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(WORKERS), context.SimpleQueue()
    children = [context.Process(target=_decode, args=(pictures, start, found)) for _ in range(WORKERS)]
    for child in children:
        child.start()
    speeds = [found.get() for _ in children]
    for child in children:
        child.join()
    return Speed(sum(rate for rate, _ in speeds), median([cpu for _, cpu in speeds]))


def _decode(pictures: Callable[[], Iterator[bytes]], start: Any, found: Any) -> None:
    arrays = (np.asarray(Image.open(io.BytesIO(one), formats=("JPEG", "PNG", "WEBP")).convert("RGB")) for one in pictures())
    _taken(arrays, lambda _: 1, WARM / 2)
    start.wait()
    cpu = time.process_time()
    count, took = _taken(arrays, lambda _: 1, SECONDS)
    found.put((count / took, 1000 * (time.process_time() - cpu) / count))


def on_disk(known: Snapshot) -> Iterator[bytes]:
    """The pictures of a snapshot from their tars, in our order, with one system call each."""
    files, order = [os.open(shard.url, os.O_RDONLY) for shard in known.shards], Order(known, [(64, 64)], 0, 64)
    for row in (int(row) for number in itertools.count() for row in order.step(number).rows):
        span = known.span(row, "picture")
        yield os.pread(files[known.shards.index(known.shard(row))], span.bytes, span.offset)


def stream(known: Snapshot, side: int, batch: int, config: ReadConfig) -> Stream:
    return Stream(Order(known, [(side, side)], 0, batch), config, Augment(), Quarantine(known))


def ours(known: Snapshot, side: int, batch: int) -> Speed:
    """Every picture whole, in the shuffled order, read from its tar and checked."""
    made = stream(known, side, batch, ReadConfig(workers=WORKERS))
    return measured(made.steps(0, 1 << 30, [range(batch)]), lambda one: len(one.rows), lambda: made.wait_seconds)


def theirs(paths: Sequence[str], batch: int) -> Speed:
    """webdataset's reader and decoder in torch's loader: the same arrays, grouped alike, tar after tar without end."""
    dataset = webdataset.WebDataset(list(paths), shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt").repeat().batched(batch)
    return measured(DataLoader(dataset, batch_size=None, num_workers=WORKERS, prefetch_factor=4), lambda one: len(one[1]))


def busy(known: Snapshot, side: int, batch: int, rate: float) -> float:
    """Share of its time that a training waits which computes for as long as images take at `rate`."""
    made = stream(known, side, batch, ReadConfig(workers=WORKERS))

    def trained(_: Any) -> int:
        time.sleep(batch / rate)
        return batch

    return measured(made.steps(0, 1 << 30, [range(batch)]), trained, lambda: made.wait_seconds).waited


def throughput(side: int, samples: int, batch: int, pairs: int) -> None:
    pictures = photos(side, 32)
    with tempfile.TemporaryDirectory() as folder:
        paths = tars(folder, pictures, SHARDS, samples)
        known = indexed(paths, folder)
        contestants: dict[str, Callable[[], Speed]] = {
            "bare PIL, from memory": lambda: bare(lambda: itertools.cycle(pictures)),
            "bare PIL, from the tars": lambda: bare(lambda: on_disk(known)),
            "our stream": lambda: ours(known, side, batch),
            "webdataset": lambda: theirs(paths, batch),
        }
        rounds = [[run() for run in contestants.values()] for _ in range(pairs)]
        speeds = dict(zip(contestants, zip(*rounds, strict=True), strict=True))
        waits = busy(known, side, batch, 0.5 * median([one.rate for one in speeds["our stream"]]))
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"\n{side} px JPEGs of {kilobytes:.0f} kB, {WORKERS} processes, batches of {batch}; {pairs} rounds, each of all four; ratio: ours to it")
    for name, found in speeds.items():
        mine = speeds["our stream"]
        rates = ratio([one.rate for one in mine], [one.rate for one in found])
        costs = ratio([one.cpu for one in found], [one.cpu for one in mine])
        told = "" if found is mine else f"   ratio {rates}, by CPU {costs}, target {0.9 if 'bare' in name else 1.0}"
        print(f"  {name:23} {spread([one.rate for one in found])} images/s {median([one.cpu for one in found]):6.2f} CPU ms{told}")
    print(f"  the main process waits {median([one.waited for one in mine]):.0%} of its time for these, {waits:.1%} when it trains at half that rate")


# ---- over a slow network ----------------------------------------------------------------------------------------------------------------


def reads(known: Snapshot, config: ReadConfig) -> float:
    """Samples a second of reading ahead, undecoded."""
    order = Order(known, [(64, 64)], 0, 64)
    jobs = ((int(row), None) for step in itertools.count() for row in order.step(step).rows)
    return measured(Reader(known, config, ("picture", "caption")).prefetch(jobs), lambda _: 1).rate


def latency(pairs: int) -> None:
    """One process, 512 px pictures that are filled up to 100 kB behind their end."""
    pictures = [one + bytes(100_000 - len(one)) for one in photos(512, 4)]
    with tempfile.TemporaryDirectory() as folder:
        paths = tars(folder, pictures, 8, 512)
        with served(folder, LATENCY) as url:
            known = indexed([f"{url}/{os.path.basename(path)}" for path in paths], folder)
            alone = ReadConfig(workers=0)

            def cached(name: str) -> ReadConfig:
                return replace(alone, cache=f"{folder}/{name}", cache_gb=10.0)

            rows: dict[str, Callable[[int], float]] = {
                "one read at a time": lambda _: reads(known, replace(alone, threads=1)),
                "16 threads (default)": lambda _: reads(known, alone),
                "16 threads and the block cache, empty at first": lambda n: reads(known, cached(str(n))),
                "16 threads and the block cache, filled": lambda n: reads(known, cached(str(n))),
                "the whole stream, decoding in the same process": lambda _: (
                    measured(stream(known, 512, 16, alone).steps(0, 1 << 30, [range(16)]), lambda one: len(one.rows)).rate
                ),
            }
            found = [[row(n) for row in rows.values()] for n in range(pairs)]
    print(f"\n{1000 * LATENCY:.0f} ms before every answer of a web server on loopback, samples of 100 kB, one process; target 64/s")
    for name, rates in zip(rows, zip(*found, strict=True), strict=True):
        print(f"  {name:48} {spread(rates)} samples/s")


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    machine()
    throughput(512, 128, 16, pairs)
    throughput(1024, 32, 8, pairs)
    latency(max(1, pairs // 2))
    print()
    machine()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
