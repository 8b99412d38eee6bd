"""Memory for pixels that is used again and again, because fresh pages cost the system a third of the time that decoding takes.

Workers fill it and the main process gives it back. It needs nothing of /dev/shm, which is small in containers.
"""

import ctypes
import math
import mmap
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import get_worker_info

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


def tune_allocator() -> None:
    """Has this process keep what it frees for the next picture, which glibc would give back to the system, and Pillow give a picture in one piece."""
    ImageFile.MAXBLOCK = 1 << 22  # bytes; at its 64 KiB every picture is put together from pieces
    with suppress(AttributeError, OSError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, 1 << 28)
        mallopt(MMAP_THRESHOLD, 1 << 25)


@dataclass(frozen=True)
class BufferHandle:
    """The beginning of a piece of memory, as it goes from the worker that filled it to the main process."""

    number: int
    shape: tuple[int, ...]


class BufferPool:
    """`each` pieces of `size` bytes for every worker, of the process that makes it; workers are forked from it afterwards."""

    def __init__(self, workers: int, each: int, size: int) -> None:
        self.each, self.size, self._owner = each, size, os.getpid()
        self._pieces = [mmap.mmap(-1, size) for _ in range(workers * each)]  # shared, and no memory before they are used
        self._free = mmap.mmap(-1, workers * each)  # 1 for each that nobody has; one worker takes it, and the main process gives it back
        self._free[:] = b"\1" * len(self._free)

    def acquire(self, size: int) -> int | None:
        """In a worker: the number of a piece for `size` bytes. None while all its pieces are in use, and where they are too small."""
        worker = get_worker_info()
        first = worker.id * self.each if worker else 0
        number = self._free.find(b"\1", first, first + self.each)
        if number < 0 or size > self.size or not worker:
            return None
        self._free[number] = 0
        return number

    def array(self, piece: BufferHandle) -> np.ndarray:
        """A view of the piece."""
        return np.frombuffer(self._pieces[piece.number], np.uint8, math.prod(piece.shape)).reshape(piece.shape)

    def tensor(self, piece: BufferHandle) -> Tensor:
        """In the main process: the piece, which is free again once no tensor shares its memory."""
        array = self.array(piece)
        weakref.finalize(array, self._give_back, piece.number).atexit = False
        return torch.from_numpy(array)

    def _give_back(self, number: int) -> None:
        if os.getpid() == self._owner:  # a worker has copies of what the main process held when it was forked
            self._free[number] = 1


class Buffer:
    """Where the pixels of a batch come to lie: in lent memory, if there is some."""

    def __init__(self, lender: BufferPool | None, shape: tuple[int, ...]) -> None:
        number = lender.acquire(math.prod(shape)) if lender else None
        self.piece = BufferHandle(number, shape) if lender and number is not None else None
        self.array = lender.array(self.piece) if lender and self.piece else np.empty(shape, np.uint8)

    def filled(self, count: int) -> Any:
        """The first `count` pictures: a tensor, or the piece that is one for the main process."""
        return replace(self.piece, shape=(count, *self.piece.shape[1:])) if self.piece else torch.from_numpy(self.array[:count])
