"""The prefetcher's batches are those of `make_batch`, whether they are made ahead or not."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dev2pro import draws
from dev2pro.errors import DataError
from dev2pro.training.prefetch import Prefetcher, tensors

CPU = torch.device("cpu")
STEPS, SLOTS = range(2, 5), [range(0, 2), range(2, 4)]
UNITS = [(step, slots) for step in STEPS for slots in SLOTS]


class Recorder:
    """A feed that notes where it starts, and makes batches of random numbers, noting which and in which thread."""

    def __init__(self) -> None:
        self.begun: tuple | None = None
        self.made: list[tuple[int, range]] = []
        self.threads: set[str] = set()
        self.each = threading.Condition()

    def begin(self, *args: Any) -> None:
        self.begun = args

    def make(self, step: int, slots: range) -> torch.Tensor:
        with self.each:
            self.made.append((step, slots))
            self.threads.add(threading.current_thread().name)
            self.each.notify()
        return draws.normal(0, "x", step, slots, (3,))

    def prefetcher(self, ahead: bool | None) -> Prefetcher:
        return Prefetcher(self, self.make, STEPS, SLOTS, CPU, ahead=ahead)

    def wait(self, count: int) -> None:
        with self.each:
            assert self.each.wait_for(lambda: len(self.made) >= count, timeout=60)


def test_the_same_batches_in_the_same_order_made_ahead_or_not():
    ahead, now = Recorder(), Recorder()
    with ahead.prefetcher(True) as first, now.prefetcher(None) as second:
        for step, slots in UNITS:
            assert torch.equal(first.get(step, slots), second.get(step, slots))
    assert ahead.made == now.made == UNITS
    assert ahead.begun == now.begun == (2, 5, SLOTS)


def test_one_batch_is_made_ahead_in_a_thread_and_none_after_the_last():
    recorder = Recorder()
    with recorder.prefetcher(True) as prefetcher:
        assert recorder.made == UNITS[:1]
        assert recorder.threads == {"MainThread"}  # worker processes are forked by the first batch
        for number, unit in enumerate(UNITS):
            prefetcher.get(*unit)
            recorder.wait(min(number + 2, len(UNITS)))
            assert recorder.made == UNITS[: number + 2]
        assert recorder.threads == {"MainThread", "prefetch_0"}
    assert "prefetch_0" not in {thread.name for thread in threading.enumerate()}


def test_on_the_cpu_there_is_no_thread():
    recorder = Recorder()
    with recorder.prefetcher(None) as prefetcher:
        assert recorder.made == []
        prefetcher.get(*UNITS[0])
        assert (recorder.made, recorder.threads) == (UNITS[:1], {"MainThread"})


def test_an_error_is_raised_where_the_batch_is_asked_for():
    def make(step: int, slots: range) -> int:
        if (step, slots) == UNITS[2]:
            raise DataError("nothing to read")
        return step

    with Prefetcher(Recorder(), make, STEPS, SLOTS, CPU, ahead=True) as prefetcher:
        assert [prefetcher.get(*unit) for unit in UNITS[:2]] == [2, 2]
        with pytest.raises(DataError, match="nothing to read"):
            prefetcher.get(*UNITS[2])


def test_another_batch_than_the_next_is_refused():
    with Recorder().prefetcher(True) as prefetcher, pytest.raises(AssertionError, match="was prepared"):
        prefetcher.get(*UNITS[1])


def test_every_tensor_of_a_batch_is_found():
    @dataclass(frozen=True)
    class Pair:
        one: torch.Tensor
        other: Any

    parts = [torch.full((1,), float(i)) for i in range(4)]
    assert [t.item() for t in tensors((Pair(parts[0], Pair(parts[1], (4, 4))), parts[2], (parts[3],)))] == [0, 1, 2, 3]


@pytest.mark.gpu
def test_on_a_cuda_device_batches_are_made_on_another_stream():
    device, streams = torch.device("cuda"), []

    def make(step: int, slots: range) -> tuple[torch.Tensor, torch.Tensor]:
        streams.append(torch.cuda.current_stream())
        torch.cuda._sleep(50_000_000)  # cycles, so that what does not wait reads too early
        return torch.full((1 << 20,), float(step), device=device), torch.ones(1, device=device)

    with Prefetcher(Recorder(), make, range(20), SLOTS, device) as prefetcher:
        sums = [prefetcher.get(step, slots)[0].sum() for step in range(20) for slots in SLOTS]
    assert torch.cuda.current_stream() not in streams
    assert [value.item() for value in sums] == [float(step) * (1 << 20) for step in range(20) for _ in SLOTS]
