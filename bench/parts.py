"""Where the time of a step goes, and what it is measured against: its parts, its FLOPs, and the rate of the device."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("data", "encoding", "noise", "forward", "backward", "optimizer", "rest")
MATMUL = {"cuda": 8192, "cpu": 1024}  # rows of a square matrix


def in_backward() -> bool:
    """Whether autograd is running a backward pass here: an optimizer may step inside it."""
    return torch._C._current_graph_task_id() != -1


def wait(device: torch.device) -> None:
    """Waits for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Parts:
    """Seconds of each part of a step. Off, it costs nothing; on, it waits for the device at every border.

    optimizer is what happens inside any torch optimizer's step; rest is schedule, average, zeroing and the loop.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.seconds = device, False, Counter[str]()
        self._now, self._since = "rest", 0.0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Measures within the block."""
        hooks = (
            register_optimizer_step_pre_hook(lambda *_: self._hooked("optimizer")),
            register_optimizer_step_post_hook(lambda *_: self._hooked("backward" if in_backward() else "rest")),
        )
        self.on = True
        self.enter("rest")
        self.seconds.clear()
        yield
        self.enter("rest")
        self.on = False
        for hook in hooks:
            hook.remove()

    def enter(self, name: str) -> str:
        """Ends the present part and begins another; returns the name of the ended one."""
        before = self._now
        if self.on:
            wait(self.device)
            now = time.perf_counter()
            self.seconds[before] += now - self._since
            self._now, self._since = name, now
        return before

    def _hooked(self, name: str) -> None:
        self.enter(name)  # an optimizer's hook must return nothing

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A part inside another."""
        outer = self.enter(name)
        yield
        self.enter(outer)

    def shares(self) -> dict[str, float]:
        """Of the whole, in the order of a step."""
        return {name: round(self.seconds[name] / sum(self.seconds.values()), 4) for name in NAMES}


class Watched:
    """A stream whose waiting for samples counts as data."""

    def __init__(self, stream: Any, parts: Parts) -> None:
        self._stream, self._parts = stream, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def steps(self, first: int, last: int, slots: Sequence[range]) -> Iterator[Any]:
        """Batches for the slots of every step."""
        batches = iter(self._stream.steps(first, last, slots))
        while True:
            with self._parts.within("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def counted(compute_loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    """FLOPs of a loss (forward) and of it with its gradients (step), as torch counts matrix multiplications, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        loss = compute_loss()
        forward = counter.get_total_flops()
        loss.backward()
        return {"forward": float(forward), "step": float(counter.get_total_flops())}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of ten multiplications of random square matrices, or of a second's, on this process's threads or the GPU."""
    side = MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, began, number = float("inf"), time.perf_counter(), 0
    while number < 10 and time.perf_counter() - began < 1:
        number += 1
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
