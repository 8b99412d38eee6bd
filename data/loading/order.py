"""Which sample fills which slot of which step: arithmetic on (snapshot, sizes, seed, global batch, step), so the order needs no stored state.

An epoch takes every sample once (or as often as its shard's weight says), bar a remainder that is counted and falls on other samples in
the next epoch. All samples of a step go into one bucket, so every rank has the same shape. Samples are shuffled in blocks of neighbours
(BLOCK) within windows of blocks (WINDOW), so that reads stay near each other for a while.
"""

import functools
from dataclasses import dataclass

import numpy as np

from data.loading.buckets import Size, merge_small, nearest_bucket
from data.shards.snapshot import Snapshot
from dev2pro.errors import DataError

ORDER_VERSION = 2  # raised when the arithmetic changes, which a test with a recorded order notices
BLOCK = 64  # samples
WINDOW = 256  # blocks


@dataclass(frozen=True)
class Step:
    """The samples (B,) of one step in slot order, all cropped to `size`."""

    rows: np.ndarray
    size: Size
    epoch: int


class Order:
    """The order of a whole run. Cheap to rebuild: its state is (snapshot id, seed, batch, step).

    Samples of a bucket too small for a step move to the nearest bucket. If they are already `cropped` they are left out.
    """

    def __init__(self, snapshot: Snapshot, buckets: list[Size], seed: int, batch: int, *, cropped: bool = False) -> None:
        self.snapshot, self.buckets, self.seed, self.batch = snapshot, buckets, seed, batch
        self._rows, self._block = _entries(snapshot, batch)
        assigned = nearest_bucket(snapshot.columns["width"], snapshot.columns["height"], buckets).astype(np.uint16)
        if not cropped:
            assigned = merge_small(np.bincount(assigned[self._rows], minlength=len(buckets)), buckets, batch)[assigned]
        self._assigned = assigned
        self._bucket = assigned[self._rows]  # of each entry
        self._members = [np.flatnonzero(self._bucket == b).astype(np.int32) for b in range(len(buckets))]  # entries of each bucket
        self.steps_per_epoch = sum(len(members) // batch for members in self._members)
        self.dropped = sum(len(members) % batch for members in self._members)
        if not self.steps_per_epoch:
            raise DataError(f"No bucket of the {len(snapshot)} encoded samples fills a batch of {batch}. Lower batch, or give more samples.")
        self._epoch = functools.lru_cache(2)(self._make_epoch)

    def step(self, step: int) -> Step:
        """The samples of a step, counted from the start of the run."""
        epoch, number = divmod(step, self.steps_per_epoch)
        entries, buckets = self._epoch(epoch)
        return Step(self._rows[entries[number]], self.buckets[buckets[number]], epoch)

    def substitute(self, step: int, slot: int, attempt: int) -> int:
        """A replacement from the same bucket for an unusable sample; a different one per attempt."""
        epoch, number = divmod(step, self.steps_per_epoch)
        members = self._members[self._epoch(epoch)[1][number]]
        draw = np.random.Philox(key=[self.seed, epoch], counter=[step, slot, attempt, 1]).random_raw()  # type: ignore[call-arg]
        return int(self._rows[members[int(draw) % len(members)]])

    def size_of(self, row: int) -> Size:
        """What a sample is cropped to."""
        return self.buckets[self._assigned[row]]

    def rows_by_size(self) -> list[tuple[Size, np.ndarray]]:
        """The samples of every bucket in use, each once."""
        by_size = [(size, np.flatnonzero(self._assigned == b)) for b, size in enumerate(self.buckets)]
        return [(size, rows) for size, rows in by_size if len(rows)]

    def cropped(self) -> np.ndarray:
        """The share (N,) of each picture that lies outside its crop."""
        columns, forms = self.snapshot.columns, np.array([w / h for w, h in self.buckets])
        fit = columns["width"] / columns["height"] / forms[self._assigned]
        return 1 - np.minimum(fit, 1 / fit)

    def enlarged(self) -> np.ndarray:
        """How many times (N,) each picture is enlarged to fill its bucket; below 1 it is reduced."""
        columns, (width, height) = self.snapshot.columns, np.array(self.buckets).T
        return np.maximum(width[self._assigned] / columns["width"], height[self._assigned] / columns["height"])

    def cropped_away(self) -> float:
        """The mean share of a picture that lies outside its crop."""
        return float(np.mean(self.cropped()))

    def histogram(self) -> list[tuple[Size, int, int, int]]:
        """(size, samples an epoch, steps, remainder) of every bucket in use."""
        counts = [(size, len(members)) for size, members in zip(self.buckets, self._members, strict=True)]
        return [(size, count, count // self.batch, count % self.batch) for size, count in counts if count]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(entries (T, B), bucket (T,)) of an epoch's T steps."""
        shuffled = self._shuffled(epoch)
        shuffled = shuffled[self._use_mask(epoch)[shuffled]]
        by_bucket = np.argsort(self._bucket[shuffled], kind="stable").astype(np.int32)  # whole batches of each bucket, one bucket after the other
        batches = by_bucket.reshape(-1, self.batch)
        batches = batches[np.argsort(batches[:, -1], kind="stable")]  # batches are ordered by the position of their last sample
        entries = shuffled[batches]
        return entries, self._bucket[entries[:, 0]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All entries: blocks shuffled, then samples within windows of them."""
        count, blocks = len(self._rows), int(self._block[-1]) + 1
        raw = np.random.Philox(key=[self.seed, epoch]).random_raw(count + blocks)
        block_rank = np.empty(blocks, np.uint64)  # position of each block in the shuffled order
        block_rank[np.argsort(raw[count:], kind="stable")] = np.arange(blocks, dtype=np.uint64)
        high, low = (blocks // WINDOW).bit_length(), count.bit_length()
        key = raw[:count]  # window in the high bits, random bits in the middle, sample index in the low bits
        key >>= np.uint64(high + low)
        key <<= np.uint64(low)
        key |= np.arange(count, dtype=np.uint64)
        key |= (block_rank // np.uint64(WINDOW) << np.uint64(64 - high))[self._block] if high else np.uint64(0)
        key.sort()  # much faster than argsort
        return (key & np.uint64((1 << low) - 1)).astype(np.int32)

    def _use_mask(self, epoch: int) -> np.ndarray:
        """Which entries (N,) are used: in every bucket the remainder moves on by its own length each epoch, so all are left out equally often."""
        mask = np.ones(len(self._rows), bool)
        for members in self._members:
            if rest := len(members) % self.batch:
                mask[members[(epoch * rest + np.arange(rest)) % len(members)]] = False
        return mask


def _entries(snapshot: Snapshot, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, block) of every entry of an epoch: each sample as often as its shard's `repeat`, and all again until they fill a step."""
    once = sum(shard.samples * shard.repeat for shard in snapshot.shards)
    passes = -(-batch // once)
    rows, blocks, block = [], [], 0
    for shard in snapshot.shards:
        for _ in range(shard.repeat * passes):
            indices = np.arange(shard.samples, dtype=np.int32)
            rows.append(shard.first + indices)
            blocks.append(block + indices // BLOCK)
            block += -(-shard.samples // BLOCK)
    return np.concatenate(rows), np.concatenate(blocks)
