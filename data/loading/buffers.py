"""Reusable shared-memory buffers for pixels. New pages would cost a third of the decoding time.

Workers fill a buffer and the main process releases it. No /dev/shm is used, because it is small in containers.
"""

import math
import mmap
import os
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class BufferHandle:
    """A handle to a filled buffer (number, shape), sent from a worker to the main process."""

    number: int
    shape: tuple[int, ...]


class BufferPool:
    """`per_worker` buffers of `size` bytes for every worker. The creating process owns them; create it before workers are forked."""

    def __init__(self, workers: int, per_worker: int, size: int) -> None:
        self.per_worker, self.size, self._owner = per_worker, size, os.getpid()
        self._memory = [mmap.mmap(-1, size) for _ in range(workers * per_worker)]  # shared; pages are allocated at first use
        self._free = mmap.mmap(-1, workers * per_worker)  # 1 if the buffer is free; a worker sets 0, the main process sets 1
        self._free[:] = b"\1" * len(self._free)

    def acquire(self, size: int) -> int | None:
        """In a worker: reserves a buffer for `size` bytes and returns its number. None if all are in use or too small."""
        worker = get_worker_info()
        first = worker.id * self.per_worker if worker else 0
        number = self._free.find(b"\1", first, first + self.per_worker)
        if number < 0 or size > self.size or not worker:
            return None
        self._free[number] = 0
        return number

    def array(self, handle: BufferHandle) -> np.ndarray:
        """The array in the buffer of `handle`."""
        return np.frombuffer(self._memory[handle.number], np.uint8, math.prod(handle.shape)).reshape(handle.shape)

    def tensor(self, handle: BufferHandle) -> Tensor:
        """In the main process: the tensor in a buffer, which is released when no tensor shares its memory."""
        array = self.array(handle)
        weakref.finalize(array, self._release, handle.number).atexit = False
        return torch.from_numpy(array)

    def _release(self, number: int) -> None:
        if os.getpid() == self._owner:  # a forked worker holds copies of the parent's finalizers
            self._free[number] = 1


class Buffer:
    """The array for a batch's pixels: a pooled buffer if one is free, else new memory."""

    def __init__(self, pool: BufferPool | None, shape: tuple[int, ...]) -> None:
        number = pool.acquire(math.prod(shape)) if pool else None
        self.handle = BufferHandle(number, shape) if pool and number is not None else None
        self.array = pool.array(self.handle) if pool and self.handle else np.empty(shape, np.uint8)

    def filled(self, count: int) -> Any:
        """The first `count` pictures: a tensor, or a handle from which the main process makes one."""
        return replace(self.handle, shape=(count, *self.handle.shape[1:])) if self.handle else torch.from_numpy(self.array[:count])
