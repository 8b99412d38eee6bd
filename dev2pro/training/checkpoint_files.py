"""Checkpoint folders: lists, verifies and prunes them, and checks that the next one fits."""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dev2pro.artifacts.record import CHECKPOINT, digest
from dev2pro.errors import SpaceError

NUMBERS = "checkpoint.json"
THREADS = 4  # files that are verified at a time
MARGIN = 1.05  # size of the files relative to their tensors


def read_and_hash(file: Path) -> list[Any]:
    """[bytes, SHA-256] of a file."""
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


def find_damage(folder: Path, rank: int, ranks: int) -> str:
    """Describes the damage in this rank's share of the files; empty if there is none."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        if numbers.pop("digest") != digest(numbers):
            return f"{NUMBERS} is not as it was written"
        names = sorted(numbers["files"])[rank::ranks]
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda name: read_and_hash(folder / re.sub("[^a-z0-9.-]", "", name)), names))
        for name, entry in zip(names, found, strict=True):
            if entry != numbers["files"][name]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
