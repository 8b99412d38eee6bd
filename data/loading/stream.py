"""Batches of pixels in a given order: worker processes read, decode, crop, flip and choose captions. The result does not depend on their number."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data.loading.buckets import Size
from data.loading.buffers import Buffer, BufferHandle, BufferPool
from data.loading.order import ORDER_VERSION, Order
from data.loading.quarantine import Fault, Quarantine
from data.loading.read import Reader
from data.shards import encoded, pictures
from data.shards.pictures import BadContent
from data.storage.transport import LONGEST_PAUSE, ReadConfig
from dev2pro import draws, signals
from dev2pro.errors import DataError, StageError, TryAgainError

ATTEMPTS = 100  # substitutes tried for one slot
MAX_PREFETCH = 16  # batches a worker may have ready
POLL_SECONDS = 5  # seconds without a batch after which the loader checks that its workers are alive
DEFAULT_PARTS = ("picture", "caption")


@dataclass(frozen=True)
class Augment:
    """What may happen to a picture on its way: crop (center, random), mirroring (probability one half), a colour behind transparent pixels."""

    crop: str = "center"
    flip: bool = False
    background: str = pictures.WHITE


@dataclass(frozen=True)
class Job:
    """One slot of one step: the sample for it and the size it is cropped to. Without a step nothing is drawn and nothing replaced."""

    row: int
    size: Size
    step: int = -1
    slot: int = 0


@dataclass
class Batch:
    """Samples of one size: pixels (B, H, W, 3) uint8, or encodings as they were stored; `rows` are the samples, substitutes included.

    `parts`: their bytes, if the stream keeps them.
    """

    size: Size
    rows: list[int]
    captions: list[str]
    pixels: Tensor | None
    stored: dict[str, Tensor]
    parts: list[dict[str, bytes]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class _Failure:
    """A worker's error, sent to the main process."""

    kind: type[StageError]
    message: str


class Stream:
    """The samples of a snapshot as batches. `wait_seconds`: how long the caller was blocked."""

    def __init__(
        self, order: Order, config: ReadConfig, augment: Augment, quarantine: Quarantine, parts: Sequence[str] = DEFAULT_PARTS, keep: bool = False
    ) -> None:  # fmt: skip
        self.order, self.config, self.augment, self.quarantine, self.parts, self.keep = order, config, augment, quarantine, tuple(parts), keep
        self.background = pictures.other_than_white(augment.background)
        self.wait_seconds = 0.0

    def steps(self, first: int, last: int, slots: Sequence[range]) -> Iterator[Batch]:
        """For every step from `first` up to `last`, a batch for each range of slots. The batches do not depend on `first`."""

        def units() -> Iterator[list[Job]]:
            for number in range(first, last):
                step = self.order.step(number)
                for slot_range in slots:
                    yield [Job(int(step.rows[slot]), step.size, number, slot) for slot in slot_range]

        return self._batches(units, max(map(len, slots)))

    def rows(self, rows: Sequence[int], size: Size, batch: int) -> Iterator[Batch]:
        """These samples once, in this order, center-cropped. Skips unusable samples."""

        def units() -> Iterator[list[Job]]:
            for first in range(0, len(rows), batch):
                yield [Job(int(row), size) for row in rows[first : first + batch]]

        return self._batches(units, batch)

    def row_range(self, first: int, last: int, batch: int) -> Iterator[Batch]:
        """The samples `first` up to `last` as `rows` gives them, each in its own bucket; neighbours of one size come together."""

        def units() -> Iterator[list[Job]]:
            for size, run in itertools.groupby(range(first, last), self.order.size_of):
                jobs = [Job(row, size) for row in run]
                yield from (jobs[i : i + batch] for i in range(0, len(jobs), batch))

        return self._batches(units, batch)

    @property
    def state(self) -> dict[str, Any]:
        """Which samples come; with the number of the step, the complete data state of a checkpoint."""
        order = self.order
        return {"snapshot": order.snapshot.id, "order_version": ORDER_VERSION, "seed": order.seed, "batch": order.batch}

    @property
    def fixed(self) -> bool:
        """Whether a sample has the same pixels and caption at every step: no random draws and no stored encodings."""
        drawn = self.augment.crop != "center" or self.augment.flip or bool(self.order.snapshot.columns["caption_json"].any())
        return not drawn and self.parts == DEFAULT_PARTS

    def captions(self) -> tuple[int, Iterator[str]]:
        """About how many different captions there are (a checksum tells them apart), and all of them, read once."""
        columns = self.order.snapshot.columns
        sums = columns["caption_crc"].astype(np.uint64) << np.uint64(32) | columns["caption_bytes"]
        _, rows = np.unique(sums, return_index=True)

        def texts() -> Iterator[str]:
            for row, parts in Reader(self.order.snapshot, self.config, ("caption",)).prefetch((int(row), int(row)) for row in rows):
                yield from _captions(parts, bool(columns["caption_json"][row]))

        return len(rows), texts()

    def _batches(self, units: Callable[[], Iterator[list[Job]]], batch: int) -> Iterator[Batch]:
        pipeline = _Pipeline(self, units, batch)
        batches = self._from_workers(pipeline, batch) if self.config.workers else iter(pipeline)
        while True:
            before = time.perf_counter()
            item = next(batches, None)
            self.wait_seconds += time.perf_counter() - before
            if item is None:
                return
            if isinstance(item, _Failure):
                raise item.kind(item.message)
            self.quarantine.add(item.faults)
            if item.rows:
                yield item

    def _from_workers(self, pipeline: "_Pipeline", batch: int) -> Iterator[Batch | _Failure]:
        config = self.config
        width, height = self.order.buckets[-1]
        fit = config.prefetch_mb * 2**20 / config.workers / 2 / (batch * width * height * 3)
        prefetch_batches = max(1, min(MAX_PREFETCH, int(fit)))
        pipeline.pool = pool = BufferPool(config.workers, prefetch_batches + 2, batch * max(w * h for w, h in self.order.buckets) * 3)
        loader = DataLoader(
            pipeline, batch_size=None, num_workers=config.workers, prefetch_factor=prefetch_batches,
            timeout=POLL_SECONDS, collate_fn=_identity, multiprocessing_context="fork",
        )  # fmt: skip
        before = signal.getsignal(signal.SIGCHLD)
        workers = iter(loader)
        if threading.current_thread() is threading.main_thread():  # torch's handler would raise at an arbitrary point of the training
            signal.signal(signal.SIGCHLD, before)
        timeout = (config.retries + 1) * (config.connect_timeout + config.idle_timeout + LONGEST_PAUSE)
        while (item := _next(workers, timeout)) is not None:
            if isinstance(item, Batch) and isinstance(item.pixels, BufferHandle):
                item.pixels = pool.tensor(item.pixels)
            yield item


def _next(workers: Iterator[Any], timeout: float) -> Any:
    """The next batch, None at the end. Raises TryAgainError when a worker has died, or sends no batch for `patience` seconds."""
    start = time.monotonic()
    while True:
        try:
            return next(workers, None)
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                raise
            if (silent := "timed out" in str(error)) and time.monotonic() - start < timeout:
                continue  # all workers are alive, and the same call goes on waiting
            reason = "it hangs" if silent else (str(error).splitlines() or [type(error).__name__])[0]
            raise TryAgainError(
                f"A process that reads pictures is lost ({reason}). Perhaps memory ran out: lower data.read.workers or data.read.prefetch_mb. "
                "The same command goes on from the last checkpoint."
            ) from error


def _captions(parts: dict[str, bytes], json: bool) -> list[str]:
    """Every caption of a sample; an empty one if it has none."""
    return pictures.captions(parts["caption"], "json" if json else "txt") if parts.get("caption") else [""]


def _stack(stored: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return {name: torch.stack([tensors[name] for tensors in stored]) for name in (stored[0] if stored else {})}
    except (RuntimeError, KeyError) as error:
        raise DataError(f"Encodings of samples of one size do not fit each other ({error}). Encode the shards again with stages.encode.") from error


def _identity(batch: Any) -> Any:
    return batch


class _Pipeline(torch.utils.data.IterableDataset):
    """A worker's pipeline. Each worker takes every n-th unit, so the merged batches keep their order."""

    def __init__(self, stream: Stream, units: Callable[[], Iterator[list[Job]]], batch: int) -> None:
        super().__init__()
        self.order, self.config, self.augment, self.parts, self.keep = stream.order, stream.config, stream.augment, stream.parts, stream.keep
        self.units, self.batch, self.faults = units, batch, list[Fault]()
        self.pool: BufferPool | None = None  # buffers in which worker processes return pixels

    def __iter__(self) -> Iterator[Batch | _Failure]:
        if get_worker_info():
            signals.ignore_signals_in_child()
        self.reader = Reader(self.order.snapshot, self.config, self.parts)
        stages = [webdataset.map(stage) for stage in (self._decode, self._crop, self._flip)]
        try:
            yield from webdataset.DataPipeline(self._samples, *stages, self._group)
        except StageError as error:
            yield _Failure(DataError if isinstance(error, DataError) else TryAgainError, str(error))

    def _samples(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        units = itertools.islice(self.units(), worker.id if worker else 0, None, worker.num_workers if worker else 1)
        jobs = ((job.row, (number, job)) for number, unit in enumerate(units) for job in unit)
        for (number, job), parts in self.reader.prefetch(jobs):
            yield {"__key__": str(job.slot), "unit": number, "job": job, "parts": parts}

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """With `row`, `caption`, and an upright `image` or `stored` encodings; replaces an unusable sample by a substitute."""
        job, row, parts = sample["job"], sample["job"].row, sample["parts"]
        for attempt in range(ATTEMPTS):
            try:
                return {**sample, "row": row, **self._content(job, row, parts)}
            except BadContent as error:
                self.faults.append(self._fault(job, row, str(error)))
                if job.step < 0:
                    return {**sample, "row": -1}
                row = self.order.substitute(job.step, job.slot, attempt)
                parts = self.reader.sample(row)
        raise DataError(f"Step {job.step}: neither its sample nor {ATTEMPTS} substitutes could be used. See the quarantine file, and index again.")

    def _content(self, job: Job, row: int, parts: dict[str, bytes]) -> dict[str, Any]:
        snapshot = self.order.snapshot
        texts = _captions(parts, bool(snapshot.columns["caption_json"][row]))
        choice = int(self._draw("caption", job) * len(texts)) if len(texts) > 1 and job.step >= 0 else 0
        image = pictures.upright(parts["picture"], max(job.size), self.augment.background) if "picture" in parts else None
        stored = {f"{part}.{name}": value for part in encoded.PARTS if part in parts for name, value in encoded.tensors(parts[part], part).items()}
        return {"caption": texts[choice], "image": image, "stored": stored, "parts": parts if self.keep else {}}

    def _fault(self, job: Job, row: int, reason: str) -> Fault:
        shard = self.order.snapshot.shard(row)
        offset = int(self.order.snapshot.columns["picture_offset"][row])
        number = int(self.order.snapshot.columns["key"][row])
        return Fault(shard.url, shard.sha256, self.reader.key(row), number, offset, reason, job.step, job.slot)

    def _crop(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The `image` cut and scaled to the size of its bucket."""
        if sample.get("image") is not None:
            job, across, down = sample["job"], 0.5, 0.5
            if self.augment.crop == "random" and job.step >= 0:
                across, down = self._draw("crop across", job), self._draw("crop down", job)
            sample["image"] = pictures.crop_resize(sample["image"], job.size, across, down)
        return sample

    def _flip(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Every other picture mirrored."""
        job = sample["job"]
        if sample.get("image") is not None and self.augment.flip and job.step >= 0 and self._draw("flip", job) < 0.5:
            sample["image"] = sample["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sample

    def _draw(self, purpose: str, job: Job) -> float:
        return float(draws.uniform(self.order.seed, purpose, job.step, [job.slot])[0])

    def _group(self, samples: Iterable[dict[str, Any]]) -> Iterator[Batch]:
        """One batch for every unit."""
        for _, unit in itertools.groupby(samples, lambda sample: sample["unit"]):
            used, size, buffer = list[dict[str, Any]](), (0, 0), None
            for sample in unit:
                size = sample["job"].size
                if sample["row"] < 0:
                    continue
                if sample["image"] is not None:  # copied into a reused buffer; a new array would need new pages
                    buffer = buffer or Buffer(self.pool, (self.batch, size[1], size[0], 3))
                    buffer.array[len(used)] = np.asarray(sample.pop("image"))
                used.append(sample)
            faults, self.faults = self.faults, []
            rows, captions, parts = ([sample[name] for sample in used] for name in ("row", "caption", "parts"))
            stored = _stack([sample["stored"] for sample in used])
            yield Batch(size, rows, captions, buffer.filled(len(used)) if buffer else None, stored, parts, faults)
