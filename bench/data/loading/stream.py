"""Throughput of loading pictures: our stream against bare decoding and webdataset's loader, and over a slow network.

`python -m bench.data.loading.stream [pairs]`. All numbers exclude the start-up. Images a second depend on whatever else
the machine does; CPU time (of all processes together) depends less on it, so ratios of both are printed.
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
    """Images a second, CPU ms an image, and the share of the time that the main process waited."""

    rate: float
    cpu: float
    waited: float = 0.0


def measured(batches: Iterable[Any], size_of: Callable[[Any], int], waited: Callable[[], float] = lambda: 0.0) -> Speed:
    """Measures an endless iterable of batches, consumed as fast as it yields."""
    iterator = iter(batches)
    with closing(iterator) if hasattr(iterator, "close") else nullcontext():
        next(iterator)
        _taken(iterator, size_of, WARM)
        cpu, stood = _cpu(), waited()
        count, took = _taken(iterator, size_of, SECONDS)
        return Speed(count / took, 1000 * (_cpu() - cpu) / count, (waited() - stood) / took)


def _taken(iterator: Any, size_of: Callable[[Any], int], seconds: float) -> tuple[int, float]:
    start, count = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds:
        count += size_of(next(iterator))
    return count, took


def _cpu() -> float:
    """Seconds of CPU that this process and its children have used."""
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with open(f"/proc/{pid}/stat") as file:
            total += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


# ---- the loaders --------------------------------------------------------------------------------------------------------------------


def bare(pictures: Callable[[], Iterator[bytes]]) -> Speed:
    """WORKERS processes that only decode an endless sequence of pictures."""
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(WORKERS), context.SimpleQueue()
    children = [context.Process(target=_decode, args=(pictures, start, results)) for _ in range(WORKERS)]
    for child in children:
        child.start()
    speeds = [results.get() for _ in children]
    for child in children:
        child.join()
    return Speed(sum(rate for rate, _ in speeds), median([cpu for _, cpu in speeds]))


def _decode(pictures: Callable[[], Iterator[bytes]], start: Any, results: Any) -> None:
    arrays = (np.asarray(Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")).convert("RGB")) for content in pictures())
    _taken(arrays, lambda _: 1, WARM / 2)
    start.wait()
    cpu = time.process_time()
    count, took = _taken(arrays, lambda _: 1, SECONDS)
    results.put((count / took, 1000 * (time.process_time() - cpu) / count))


def on_disk(snapshot: Snapshot) -> Iterator[bytes]:
    """The pictures of a snapshot from their tars, in our order, with one system call each."""
    files, order = [os.open(shard.url, os.O_RDONLY) for shard in snapshot.shards], Order(snapshot, [(64, 64)], 0, 64)
    for row in (int(row) for number in itertools.count() for row in order.step(number).rows):
        span = snapshot.span(row, "picture")
        yield os.pread(files[snapshot.shards.index(snapshot.shard(row))], span.bytes, span.offset)


def stream(snapshot: Snapshot, side: int, batch: int, config: ReadConfig) -> Stream:
    return Stream(Order(snapshot, [(side, side)], 0, batch), config, Augment(), Quarantine(snapshot))


def ours(snapshot: Snapshot, side: int, batch: int) -> Speed:
    """Every picture whole, in the shuffled order, read from its tar and checked."""
    batches = stream(snapshot, side, batch, ReadConfig(workers=WORKERS))
    return measured(batches.steps(0, 1 << 30, [range(batch)]), lambda item: len(item.rows), lambda: batches.wait_seconds)


def theirs(paths: Sequence[str], batch: int) -> Speed:
    """webdataset's reader and decoder in torch's loader: the same arrays, grouped alike, tar after tar without end."""
    dataset = webdataset.WebDataset(list(paths), shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt").repeat().batched(batch)
    return measured(DataLoader(dataset, batch_size=None, num_workers=WORKERS, prefetch_factor=4), lambda item: len(item[1]))


def busy(snapshot: Snapshot, side: int, batch: int, rate: float) -> float:
    """Share of its time that a training waits if its computation consumes images at `rate`."""
    batches = stream(snapshot, side, batch, ReadConfig(workers=WORKERS))

    def trained(_: Any) -> int:
        time.sleep(batch / rate)
        return batch

    return measured(batches.steps(0, 1 << 30, [range(batch)]), trained, lambda: batches.wait_seconds).waited


def throughput(side: int, samples: int, batch: int, pairs: int) -> None:
    pictures = photos(side, 32)
    with tempfile.TemporaryDirectory() as folder:
        paths = tars(folder, pictures, SHARDS, samples)
        snapshot = indexed(paths, folder)
        contestants: dict[str, Callable[[], Speed]] = {
            "bare PIL, from memory": lambda: bare(lambda: itertools.cycle(pictures)),
            "bare PIL, from the tars": lambda: bare(lambda: on_disk(snapshot)),
            "our stream": lambda: ours(snapshot, side, batch),
            "webdataset": lambda: theirs(paths, batch),
        }
        rounds = [[run() for run in contestants.values()] for _ in range(pairs)]
        speeds = dict(zip(contestants, zip(*rounds, strict=True), strict=True))
        waits = busy(snapshot, side, batch, 0.5 * median([speed.rate for speed in speeds["our stream"]]))
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"\n{side} px JPEGs of {kilobytes:.0f} kB, {WORKERS} processes, batches of {batch}; {pairs} rounds, each of all four; ratio: ours to it")
    for name, results in speeds.items():
        mine = speeds["our stream"]
        rates = ratio([speed.rate for speed in mine], [speed.rate for speed in results])
        costs = ratio([speed.cpu for speed in results], [speed.cpu for speed in mine])
        comparison = "" if results is mine else f"   ratio {rates}, by CPU {costs}, target {0.9 if 'bare' in name else 1.0}"
        print(f"  {name:23} {spread([speed.rate for speed in results])} images/s {median([speed.cpu for speed in results]):6.2f} CPU ms{comparison}")
    print(
        f"  the main process waits {median([speed.waited for speed in mine]):.0%} of its time for these, {waits:.1%} when it trains at half that rate"
    )


# ---- over a slow network ----------------------------------------------------------------------------------------------------------------


def reads(snapshot: Snapshot, config: ReadConfig) -> float:
    """Samples a second of prefetching without decoding."""
    order = Order(snapshot, [(64, 64)], 0, 64)
    jobs = ((int(row), None) for step in itertools.count() for row in order.step(step).rows)
    return measured(Reader(snapshot, config, ("picture", "caption")).prefetch(jobs), lambda _: 1).rate


def latency(pairs: int) -> None:
    """One process, 512 px pictures padded to 100 kB."""
    pictures = [content + bytes(100_000 - len(content)) for content in photos(512, 4)]
    with tempfile.TemporaryDirectory() as folder:
        paths = tars(folder, pictures, 8, 512)
        with served(folder, LATENCY) as url:
            snapshot = indexed([f"{url}/{os.path.basename(path)}" for path in paths], folder)
            alone = ReadConfig(workers=0)

            def cached(name: str) -> ReadConfig:
                return replace(alone, cache=f"{folder}/{name}", cache_gb=10.0)

            rows: dict[str, Callable[[int], float]] = {
                "one read at a time": lambda _: reads(snapshot, replace(alone, threads=1)),
                "16 threads (default)": lambda _: reads(snapshot, alone),
                "16 threads and the block cache, empty at first": lambda n: reads(snapshot, cached(str(n))),
                "16 threads and the block cache, filled": lambda n: reads(snapshot, cached(str(n))),
                "the whole stream, decoding in the same process": lambda _: (
                    measured(stream(snapshot, 512, 16, alone).steps(0, 1 << 30, [range(16)]), lambda content: len(content.rows)).rate
                ),
            }
            rounds = [[row(n) for row in rows.values()] for n in range(pairs)]
    print(f"\n{1000 * LATENCY:.0f} ms before every answer of a web server on loopback, samples of 100 kB, one process; target 64/s")
    for name, rates in zip(rows, zip(*rounds, strict=True), strict=True):
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
