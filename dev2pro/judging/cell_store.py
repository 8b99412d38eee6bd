"""Sampled cells on disk, so that an evaluation that was killed goes on, and one with another arm samples only what is new.

A cell's folder is named after the hash of everything that its pictures depend on. It holds `cell.json`, which says what that is, a file of
pictures for each batch, and the embeddings of each judge that has seen them. Every file is written under another name and renamed, and holds
the cell's id and the SHA-256 of its tensor: one that is damaged or of another cell is noticed.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dev2pro import signals
from dev2pro.artifacts import record
from dev2pro.errors import ConfigError, DataError, SpaceError

DESCRIPTION = "cell.json"
SAMPLED = ("guidance", "cfg_scale", "steps", "seed")  # in the header of every file
MARGIN = 1.02  # for headers and embeddings


class CellFiles:
    """The files of one cell: `count` pictures in batches of `batch`, and the judges' embeddings of them.

    `what`: everything the pictures depend on. `exact`: they are kept as float32, else as uint8. `out`: the run's folder; what a run that
    was killed left half written is overwritten when the run goes on, and is nobody else's.
    """

    def __init__(self, root: Path, what: dict[str, Any], *, count: int, batch: int, exact: bool, out: str) -> None:
        self.dtype = torch.float32 if exact else torch.uint8
        self.what = {**what, "pictures": str(self.dtype).removeprefix("torch.")}
        self.id = record.digest(self.what)
        self.folder = root / self.id
        self.batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        self._writer = record.digest(os.path.realpath(out))[:8]

    def create(self) -> None:
        """Creates the folder and its description."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._replace(DESCRIPTION, json.dumps(self.what, indent=1).encode())

    def check(self, number: int) -> str:
        """The SHA-256 of a batch's pictures; empty if there are none, or if what is there cannot be used, which is printed."""
        if _file_name(number) not in os.listdir(self.folder):  # asking for the file, a network file system would remember that it is missing
            return ""
        try:
            return self._read(_file_name(number), {"batch": str(number)}, len(self.batches[number]))[1]
        except DataError as error:
            signals.emit(f"{error} Its pictures are sampled again.")
            return ""

    def write(self, number: int, pictures: Tensor) -> str:
        """Writes a batch (B, 3, H, W) in [0, 1]; its SHA-256."""
        stored = pictures if self.dtype == torch.float32 else (pictures * 255).byte()  # cut off, as the judge's processor does with exact ones
        return self._write(_file_name(number), {"batch": str(number)}, stored)

    def read(self, number: int) -> Tensor:
        """The pictures (B, 3, H, W) of a batch, float32 in [0, 1] or uint8. Raises DataError if they were changed or removed."""
        return self._read(_file_name(number), {"batch": str(number)}, len(self.batches[number]))[0]

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        """Pictures by number, in ascending order."""
        size = len(self.batches[0])
        by_batch = itertools.groupby(rows, lambda row: row // size)
        return torch.cat([self.read(number)[[row - number * size for row in group]] for number, group in by_batch])

    def write_embeddings(self, judge: str, pictures: str, embeddings: Tensor) -> None:
        """Writes a judge's embeddings (N, D); `judge` and `pictures` are the hashes of what they come from."""
        self._write(f"embeddings-{judge[:16]}.safetensors", {"judge": judge, "of": pictures}, embeddings)

    def read_embeddings(self, judge: str, pictures: str) -> Tensor | None:
        """The embeddings (N, D) of these pictures by this judge; None if there are none that can be used."""
        try:
            return self._read(f"embeddings-{judge[:16]}.safetensors", {"judge": judge, "of": pictures}, self.batches[-1].stop)[0]
        except DataError:
            return None

    def bytes_of(self, number: int) -> int:
        """The size of a batch's pictures."""
        return len(self.batches[number]) * 3 * self.what["resolution"] ** 2 * self.dtype.itemsize

    def _write(self, name: str, labels: dict[str, str], tensor: Tensor) -> str:
        tensor = tensor.contiguous()
        sha256 = _sha256(tensor)
        sampled = {key: str(self.what[key]) for key in SAMPLED if key in self.what}  # for people: a picture says by itself how it was made
        self._replace(name, save({"data": tensor}, {"cell": self.id, "sha256": sha256, **sampled, **labels}))
        return sha256

    def _replace(self, name: str, content: bytes) -> None:
        partial = self.folder / f"{name}.{self._writer}.partial"
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / name)

    def _read(self, name: str, labels: dict[str, str], count: int) -> tuple[Tensor, str]:
        """(tensor, SHA-256) of a file with these labels. Raises DataError for anything else."""
        file = self.folder / name
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensor = opened.get_tensor("data").clone()  # aligned as any tensor is: a product's last bits depend on it
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} cannot be read ({error}).") from error
        if any(metadata.get(key) != value for key, value in {"cell": self.id, **labels}.items()):
            raise DataError(f"{file} belongs to something else.")
        if metadata.get("sha256") != (sha256 := _sha256(tensor)) or len(tensor) != count:
            raise DataError(f"{file} is damaged (its SHA-256 is not the one it was written with).")
        return tensor, sha256


def check_folder(path: str | None) -> None:
    """Raises ConfigError for `cells=` in a store."""
    if path and "://" in path:
        raise ConfigError(f"cells={path} is no folder of this machine. Give a folder; pictures are not kept in a store.")


def check_space(root: Path, need: int) -> None:
    """Raises SpaceError if pictures of `need` bytes do not fit."""
    if (free := shutil.disk_usage(root).free) < MARGIN * need:
        raise SpaceError(
            f"The pictures to be sampled need {MARGIN * need / 1e9:.3g} GB in {root}, and {free / 1e9:.3g} GB are free. "
            "Make room, or choose another folder with cells=."
        )


def _file_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().data).hexdigest()
