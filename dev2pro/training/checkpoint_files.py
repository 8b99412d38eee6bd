"""Checkpoints as folders: which there are, whether they are whole, which of them may go, and whether another one fits."""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dev2pro.artifacts.record import CHECKPOINT, digest
from dev2pro.errors import SpaceError
from dev2pro.training.optim import OptimConfig

NUMBERS = "checkpoint.json"
MARGIN = 1.05  # what files need beyond their tensors


def sealed(file: Path) -> list[Any]:
    """[bytes, SHA-256] of a file that is on the disk."""
    fsync_paths(file)
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]


def fsync_paths(*places: Path) -> None:
    """Files and folders, until a power cut cannot take them back."""
    for place in places:
        handle = os.open(place, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def list_checkpoints(out: Path) -> dict[int, Path]:
    """step -> folder of every checkpoint that was published."""
    return {int(name[1]): folder for folder in out.glob("checkpoint-*") if (name := CHECKPOINT.fullmatch(folder.name))}


def prune(out: Path, keep: int) -> None:
    """Removes all but the newest ones and the one with the lowest held-out loss."""
    there = list_checkpoints(out)
    scored = [(score, step) for step, folder in there.items() if (score := _held_out(folder)) is not None]
    kept = {*sorted(there)[-keep:], *(step for _, step in sorted(scored)[:1])}
    for step in there.keys() - kept:
        remove(there[step])


def _held_out(folder: Path) -> float | None:
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / NUMBERS).read_text())["held_out"]
    return None


def remove(folder: Path) -> None:
    """Under another name first: what is called a checkpoint is whole."""
    if folder.exists():
        going = folder.with_name(f"{folder.name}-old.partial")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


def has_space(out: Path, need: float) -> bool:
    """Whether `need` bytes fit."""
    return shutil.disk_usage(out).free >= MARGIN * need


def check_space(out: Path, need: float) -> None:
    """Raises SpaceError where `need` bytes do not fit."""
    if not has_space(out, need):
        free = shutil.disk_usage(out).free
        raise SpaceError(
            f"A checkpoint needs {MARGIN * need / 1e9:.3g} GB in {out}, and {free / 1e9:.3g} GB are free. Make room, or choose another out=."
        )


def check_start(out: str, parameters: int, optim: OptimConfig, dtype: torch.dtype, ema: float) -> None:
    """Raises SpaceError where no checkpoint of a full fine-tune would fit: weights, their average, two moments."""
    moment = 1 if optim.name == "adamw_8bit" else dtype.itemsize
    check_space(Path(out), parameters * (dtype.itemsize * (2 if ema else 1) + 2 * moment))


def damage(folder: Path, rank: int, ranks: int) -> str:
    """What is wrong with this rank's share of the files, or nothing."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        if numbers.pop("digest") != digest(numbers):
            return f"{NUMBERS} is not as it was written"
        for name in sorted(numbers["files"])[rank::ranks]:
            if sealed(folder / re.sub("[^a-z0-9.-]", "", name)) != numbers["files"][name]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
