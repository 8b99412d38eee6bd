"""Prepares the next micro-batch while the device computes on the current one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from dev2pro.training.feed import Feed

B = TypeVar("B")


class Prefetcher(Generic[B]):
    """The micro-batches of all `steps` in their order, for each of `slots`: `make_batch(step, slots)`, which takes its samples from `feed`.

    On a CUDA device reading, encoding and random draws of the next one run in a thread, on a stream of their own. On the CPU, where there is
    nothing to overlap, `make_batch` is called when the batch is asked for; `ahead` decides otherwise. The batches are the same either way.
    """

    def __init__(
        self, feed: Feed, make_batch: Callable[[int, range], B], steps: range, slots: Sequence[range], device: torch.device, *,
        ahead: bool | None = None,
    ) -> None:  # fmt: skip
        self.make_batch, self.device = make_batch, device
        self._units = ((step, some) for step in steps for some in slots)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "prefetch") if (ahead if ahead is not None else device.type == "cuda") else None
        feed.begin(steps.start, steps.stop, slots)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        if self._thread:
            self._next: Future = Future()
            self._next.set_result(self._prepare())  # in this thread, because the stream's worker processes are forked now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def get(self, step: int, slots: range) -> B:
        """The micro-batch for the next slots; call in order. Raises what `make_batch` raised."""
        if not self._thread:
            return self.make_batch(step, slots)
        unit, batch, done = self._next.result()
        assert unit == (step, slots), f"{unit} was prepared and {step, slots} is asked for"
        self._next = self._thread.submit(self._prepare)
        if done:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for tensor in tensors(batch):
                tensor.record_stream(current)  # its memory is not reused before what is computed from it there
        return batch

    def _prepare(self) -> tuple[tuple[int, range] | None, Any, torch.cuda.Event | None]:
        unit = next(self._units, None)
        if unit is None:
            return None, None, None
        with torch.cuda.stream(self._stream):  # no effect without one
            return unit, self.make_batch(*unit), self._stream.record_event() if self._stream else None


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a tensor, a tuple or a dataclass of them."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
