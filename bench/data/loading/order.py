"""Cost of resuming at the end of an epoch of three million samples: our order, and two loaders that replay the epoch.

`python -m bench.data.loading.order [pairs]`.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import webdataset
from torchdata.stateful_dataloader import StatefulDataLoader

from bench.pairs import machine, median
from bench.shards import photos, tars
from data.shards import snapshot, table
from data.shards.sidecar import COLUMNS

SHARDS, MEAN = 3000, 1000  # samples of a shard, on average
SAMPLES = SHARDS * MEAN
BATCH = 512
FEW, MANY = 16, 56  # replayed batches of 16; the time difference gives the cost per sample
FRESH = f"""
import json, re, sys, time
from data.loading import order
from data.loading.buckets import bucket_sizes
from data.shards import snapshot
moments, start = [time.perf_counter()], time.process_time()
def peak():  # ru_maxrss includes the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
modules = peak()
snap = snapshot.read(sys.argv[1]); moments.append(time.perf_counter())
order = order.Order(snap, bucket_sizes(1024, 64, 2.0), 0, {BATCH}); moments.append(time.perf_counter())
last = order.step(order.steps_per_epoch - 1); moments.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(moments, moments[1:])] + [time.process_time() - start, modules, peak()]))
"""


def pin(path: str) -> None:
    """Writes a snapshot of nonexistent shards with samples of random sizes and aspect ratios."""
    draw = np.random.default_rng(0)
    half = draw.integers(MEAN // 2, MEAN * 3 // 2 + 1, SHARDS // 2)
    counts = np.stack([half, 2 * MEAN - half], 1).ravel()
    columns = {name: np.zeros(SAMPLES, kind) for name, kind in COLUMNS.items() if name.partition("_")[0] not in ("latents", "text")}
    columns["picture_bytes"][:] = draw.integers(20_000, 400_000, SAMPLES)
    sample_bytes = (columns["picture_bytes"].astype(np.uint64) + np.uint64(511)) // np.uint64(512) * np.uint64(512) + np.uint64(3072)
    first = np.cumsum(counts) - counts
    start = np.cumsum(sample_bytes) - sample_bytes
    columns["picture_offset"][:] = start - np.repeat(start[first], counts) + np.uint64(1536)
    columns["caption_offset"][:] = columns["picture_offset"] + sample_bytes - np.uint64(1536)
    columns["caption_bytes"][:] = columns["caption_chars"][:] = draw.integers(20, 500, SAMPLES)
    form, side = np.exp2(draw.normal(0, 0.5, SAMPLES)), draw.integers(512, 2049, SAMPLES)
    columns["width"][:], columns["height"][:] = side * np.sqrt(form), side / np.sqrt(form)
    for name in ("picture_crc", "caption_crc", "key"):
        columns[name][:] = draw.integers(0, 2**32, SAMPLES)
    info = {"size": 10**9, "etag": "0", "modified": ""}
    shards = [
        {"place": f"s3://bucket/{n:06d}.tar", "stamp": info, "sha256": f"{n:064x}", "samples": int(count), "repeat": 1}
        for n, count in enumerate(counts)
    ]
    head: dict[str, Any] = {"sources": [], "folders": {}, "filters": {}, "encodings": {}, "shards": shards}
    snapshot.Snapshot({**head, "id": snapshot._id(head, table.columns_sum(columns))}, columns).write(path)


def fresh(path: str) -> list[float]:
    """In a new process: seconds to open, to build the order, to get the last step, of CPU in total; MB with the modules alone, and peak MB."""
    return json.loads(subprocess.run([sys.executable, "-c", FRESH, path], check=True, capture_output=True).stdout)


# ---- replaying: seconds per sample --------------------------------------------------------------------------------------------


def decoded(paths: list[str]) -> Any:
    return webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt").batched(16)


def skipped(paths: list[str]) -> float:
    """webdataset's reader without decoding, in one process."""

    def took(batches: int) -> float:
        start = time.perf_counter()
        for _ in itertools.islice(webdataset.WebDataset(paths, shardshuffle=False), 16 * batches):
            pass
        return time.perf_counter() - start

    return (took(MANY) - took(FEW)) / (16 * (MANY - FEW))


def replayed(paths: list[str]) -> float:
    """torchdata's loader with two workers: from load_state_dict to the first batch."""

    def took(batches: int) -> float:
        loader = StatefulDataLoader(decoded(paths), batch_size=None, num_workers=2)
        batches_iter = iter(loader)
        for _ in range(batches):
            next(batches_iter)
        state = loader.state_dict()
        del batches_iter
        again = StatefulDataLoader(decoded(paths), batch_size=None, num_workers=2)
        again.load_state_dict(state)
        start = time.perf_counter()
        next(iter(again))
        return time.perf_counter() - start

    return (took(MANY) - took(FEW)) / (16 * (MANY - FEW))


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    machine()
    with tempfile.TemporaryDirectory() as folder:
        pin(f"{folder}/large.snapshot")
        paths = tars(folder, photos(512, 16), 8, 128)
        rounds = [(fresh(f"{folder}/large.snapshot"), skipped(paths), replayed(paths)) for _ in range(pairs)]
    totals = [sum(mine[:3]) for mine, _, _ in rounds]
    opening, ordering, stepping, cpu, modules, most = (median(values) for values in zip(*(mine for mine, _, _ in rounds), strict=True))
    print(f"\nat the end of an epoch of {SAMPLES:,} samples in {SHARDS:,} shards, batch {BATCH}; a fresh process; {pairs} rounds")
    print(f"  ours: open the snapshot and check its hash {opening:.2f} s, make the order {ordering:.2f} s, get the last step {stepping:.2f} s")
    print(f"        in all {median(totals):.2f} s ({min(totals):.2f} to {max(totals):.2f}), target 2; CPU {cpu:.2f} s")
    print(f"        peak {most:.0f} MB, target 300, of which Python and its modules {modules:.0f}")
    for name, price in (("webdataset, skipping undecoded", [r[1] for r in rounds]), ("torchdata, fast-forward", [r[2] for r in rounds])):
        whole = [SAMPLES * seconds for seconds in price]
        print(f"  {name}: {1e6 * median(price):,.0f} µs for each of {16 * (MANY - FEW)} local samples of 67 kB;")
        print(f"        EXTRAPOLATED to the whole epoch {median(whole) / 60:.0f} minutes, {median(whole) / median(totals):,.0f} times ours")
    machine()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
