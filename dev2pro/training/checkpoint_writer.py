"""Copies this rank's share of the state to host memory and streams it to disk as safetensors, hashed on the way: no byte is held or read twice.

torch's HuggingFaceStorageWriter turns each file into one bytes object before it writes it, which doubles the host memory of a checkpoint. The
files here have the same names and metadata as its own (torch 2.13), so its reader reads them on any number of ranks.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.cuda import _pin_memory_utils
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DATA_OFFSETS_KEY,
    DCP_VERSION_KEY,
    DEFAULT_EXTRA_METADATA_KEY,
    DTYPE_KEY,
    DTYPE_MAP,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    SHAPE_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

FILE = 1 << 29  # bytes of a file; its reader maps one file at a time, and files are written and hashed side by side
THREADS = 4  # files at a time: SHA-256 takes a second per GB on one core, a good disk less
CHUNK = 1 << 24  # bytes hashed and written at a time, outside Python's lock
ALIGNMENT = 64  # bytes, of a tensor in the buffer
NAMES = {dtype: name for name, dtype in DTYPE_MAP.items()}


def size(value: Tensor) -> int:
    """Bytes of a tensor; of a sharded one on all ranks together."""
    return value.numel() * value.element_size()


def share(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What this rank writes: its part of every sharded tensor, and those of the others, which all ranks have, that fall to it.

    The largest goes first, to the rank that has least, so that the ranks of a machine copy the state once and not once each.
    """
    mine, filled = dict[str, Tensor](), [0] * ranks
    for name, value in sorted(tensors.items(), key=lambda item: (-size(item[1]), item[0])):
        if isinstance(value, DTensor):
            mine[name] = value
            continue
        owner = filled.index(min(filled))
        filled[owner] += size(value)
        if owner == rank:
            mine[name] = value
    return mine


class Staging:
    """A buffer in host memory, as large as what is copied, that is used again for every checkpoint; pinned where the tensors are on a GPU.

    One buffer and not one per tensor: torch's allocator of pinned memory rounds each up to a power of two.
    """

    def __init__(self) -> None:
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, valid until the next call; of a sharded tensor this rank's part is copied. Returns when all is copied."""
        local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
        starts, end = dict[str, int](), 0
        for name, value in local.items():
            starts[name], end = end, end + -(-size(value) // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() < end:
            self._allocate(end, pin=any(value.is_cuda for value in local.values()))
        copies = dict[str, Tensor]()
        for name, value in local.items():
            copy = self._buffer[starts[name] : starts[name] + size(value)].view(value.dtype).view(value.shape)
            copies[name] = copy.copy_(value, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()
        return {name: _sharded_as(tensors[name], copy) for name, copy in copies.items()}

    def release(self) -> None:
        """Gives the memory back."""
        if self._pinned:
            _pin_memory_utils.unpin_memory(self._buffer.data_ptr())
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def _allocate(self, count: int, pin: bool) -> None:
        self.release()
        self._buffer = torch.empty(count, dtype=torch.uint8)
        if pin:
            _pin_memory_utils.pin_memory(self._buffer.data_ptr(), count)
            self._pinned = True


def _sharded_as(original: Tensor, copy: Tensor) -> Tensor:
    """The copy with the original's layout over ranks. (`DTensor.from_local` would move it to the GPU.)"""
    return DTensor(copy, original._spec, requires_grad=False) if isinstance(original, DTensor) else copy


class StreamingWriter(HuggingFaceStorageWriter):
    """Writes into an existing folder. `files` then has what this rank wrote: name -> [bytes, SHA-256]."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.files = folder, dict[str, list[Any]]()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by torch.distributed.checkpoint with the items that fall to this rank; their tensors must lie in host memory."""
        groups = _groups([(item, value) for item in plan.items if isinstance(value := planner.resolve_data(item), Tensor)])  # there is nothing else
        names = [_gen_file_name(at, len(groups), (plan.storage_data or {}).get("shard_index")) for at in range(1, len(groups) + 1)]
        with ThreadPoolExecutor(THREADS, "checkpoint file") as pool:
            entries = pool.map(lambda name, group: write_file(self.folder / name, group), names, groups)
            self.files = dict(zip(names, entries, strict=True))
        written = Future[list[WriteResult]]()
        written.set_result([WriteResult(item.index, size(value), name) for name, group in zip(names, groups, strict=True) for item, value in group])
        return written


def _groups(entries: list[tuple[WriteItem, Tensor]]) -> list[list[tuple[WriteItem, Tensor]]]:
    """The tensors of each file: up to FILE bytes, at least one; those with the largest elements first, so that all are aligned."""
    groups, filled = list[list[tuple[WriteItem, Tensor]]](), FILE
    for item, value in sorted(entries, key=lambda entry: (-entry[1].element_size(), entry[0].index.fqn)):
        if filled + size(value) > FILE:
            groups.append([])
            filled = 0
        groups[-1].append((item, value))
        filled += size(value)
    return groups


def write_file(file: Path, entries: list[tuple[WriteItem, Tensor]]) -> list[Any]:
    """Writes and fsyncs one file: [bytes, SHA-256]. Beside its copy of the header it needs no memory."""
    header, end, total, digest = _metadata(entries), 0, 0, hashlib.sha256()
    for item, value in entries:
        start, end = end, end + size(value)
        header[item.index.fqn] = {DTYPE_KEY: NAMES[value.dtype], SHAPE_KEY: list(value.shape), DATA_OFFSETS_KEY: [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        for chunk in _chunks([len(text).to_bytes(8, "little") + text, *(value for _, value in entries)]):
            digest.update(chunk)
            total += len(chunk)
            while len(chunk):
                chunk = chunk[os.write(out.fileno(), chunk) :]
        os.fsync(out.fileno())
    return [total, digest.hexdigest()]


def _metadata(entries: list[tuple[WriteItem, Tensor]]) -> dict[str, Any]:
    """Where in its tensor each part belongs, as torch's reader wants it."""
    offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)} for item, _ in entries if item.tensor_data}
    named = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION), FORMAT_KEY: FORMAT_VALUE}
    return {DEFAULT_EXTRA_METADATA_KEY: named}


def _chunks(parts: Iterable[bytes | Tensor]) -> Iterable[memoryview]:
    for part in parts:
        view = memoryview(part if isinstance(part, bytes) else part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield from (view[at : at + CHUNK] for at in range(0, len(view), CHUNK))
