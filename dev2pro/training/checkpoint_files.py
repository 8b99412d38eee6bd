"""Checkpoint folders: lists, verifies and prunes them, and checks disk space."""

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
MARGIN = 1.05  # size of the files relative to their tensors


def fsync_and_hash(file: Path) -> list[Any]:
    """Calls fsync on a file and returns [bytes, SHA-256]."""
    fsync_paths(file)
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]


def fsync_paths(*paths: Path) -> None:
    """Calls fsync on files and folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def list_checkpoints(out: Path) -> dict[int, Path]:
    """step -> folder of every complete checkpoint."""
    return {int(name[1]): folder for folder in out.glob("checkpoint-*") if (name := CHECKPOINT.fullmatch(folder.name))}


def prune(out: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints and the one with the lowest held-out loss."""
    checkpoints = list_checkpoints(out)
    scored = [(score, step) for step, folder in checkpoints.items() if (score := _held_out(folder)) is not None]
    retained = {*sorted(checkpoints)[-keep:], *(step for _, step in sorted(scored)[:1])}
    for step in checkpoints.keys() - retained:
        remove(checkpoints[step])


def _held_out(folder: Path) -> float | None:
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / NUMBERS).read_text())["held_out"]
    return None


def remove(folder: Path) -> None:
    """Renames the folder before deleting it, so that a folder named checkpoint-N is always complete."""
    if folder.exists():
        renamed = folder.with_name(f"{folder.name}-old.partial")
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
        shutil.rmtree(renamed)


def has_space(out: Path, need: float) -> bool:
    """Whether `need` bytes fit."""
    return shutil.disk_usage(out).free >= MARGIN * need


def check_space(out: Path, need: float) -> None:
    """Raises SpaceError if `need` bytes do not fit."""
    if not has_space(out, need):
        free = shutil.disk_usage(out).free
        raise SpaceError(
            f"A checkpoint needs {MARGIN * need / 1e9:.3g} GB in {out}, and {free / 1e9:.3g} GB are free. Make room, or choose another out=."
        )


def check_start(out: str, parameters: int, optim: OptimConfig, dtype: torch.dtype, ema: float) -> None:
    """Raises SpaceError if a checkpoint of a full fine-tune would not fit: weights, their average, two moments."""
    moment = 1 if optim.name == "adamw_8bit" else dtype.itemsize
    check_space(Path(out), parameters * (dtype.itemsize * (2 if ema else 1) + 2 * moment))


def find_damage(folder: Path, rank: int, ranks: int) -> str:
    """Describes the damage in this rank's share of the files; empty if there is none."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        if numbers.pop("digest") != digest(numbers):
            return f"{NUMBERS} is not as it was written"
        for name in sorted(numbers["files"])[rank::ranks]:
            if fsync_and_hash(folder / re.sub("[^a-z0-9.-]", "", name)) != numbers["files"][name]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
