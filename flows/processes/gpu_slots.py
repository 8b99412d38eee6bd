"""GPU slots: locks every GPU of this machine, or every core if it has none, for one stage at a time across all flows."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from socket import gethostname

from dev2pro.artifacts import run_folder
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError

FOLDER = ROOT / "runs" / ".slots"
POLL_SECONDS = 0.5  # seconds between two attempts to lock slots
_waiting: list[object] = []  # one for every thread that waits for its turn


@dataclass(frozen=True)
class Slots:
    """The slots of a stage: handles of lock files, which its process inherits and holds, and the environment that limits it to its GPUs."""

    handles: tuple[int, ...]
    environment: dict[str, str]


@cache
def names() -> tuple[str, ...]:
    """The slots of this machine: gpu-0, gpu-1, ... as CUDA_VISIBLE_DEVICES or nvidia-smi name them, else core-0, core-1, ..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        query = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        visible = ",".join(query.stdout.split()) if query.returncode == 0 else ""
    gpus = [name.strip() for name in (visible or "").split(",") if name.strip() not in ("", "-1")]
    return tuple(f"gpu-{name}" for name in gpus) or tuple(f"core-{number}" for number in range(len(os.sched_getaffinity(0))))


@contextmanager
def acquire(count: int, what: str, stopping: Callable[[], bool], log: Callable[[str], None]) -> Iterator[Slots | None]:
    """Locks `count` slots for `what` within the context; None if `stopping` returned true before they were free.

    A process that inherits the handles keeps the slots locked until it ends, even if this one dies.
    Raises ConfigError for more slots than the machine has.
    """
    all_names = names()
    if count > len(all_names):
        raise ConfigError(
            f"{what} wants {count} processes, and this machine has {len(all_names)} ({', '.join(all_names)}). Give it fewer, one for each."
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    acquired = dict[str, int]()
    try:
        with _queue_turn(stopping):  # held while waiting, so that a stage that needs many slots is not starved
            logged = False
            while not (acquired := _lock_free(all_names, count)) and not stopping():
                if not logged:
                    log(f"{what} waits for {count} free of {', '.join(f'{name} ({_holder(name)})' for name in all_names)}")
                logged = True
                time.sleep(POLL_SECONDS)
        for name in acquired:
            _file(name).write_text(json.dumps({"what": what, "pid": os.getpid()}))
        gpus = [name.removeprefix("gpu-") for name in acquired if name.startswith("gpu-")]
        yield Slots(tuple(acquired.values()), {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}) if acquired else None
    finally:
        for handle in acquired.values():
            os.close(handle)


def _lock_free(all_names: tuple[str, ...], count: int) -> dict[str, int]:
    """Locks all `count` slots or none, so that two stages cannot deadlock."""
    locked = {name: handle for name in all_names if (handle := run_folder.lock(_file(name))) is not None}
    for name in list(locked)[count if len(locked) >= count else 0 :]:
        os.close(locked.pop(name))
    return locked


@contextmanager
def _queue_turn(stopping: Callable[[], bool]) -> Iterator[None]:
    """Lets one waiter at a time try to lock slots: threads of this process in the order they came, processes as it happens."""
    ticket, handle = object(), None
    _waiting.append(ticket)
    try:
        while (_waiting[0] is not ticket or (handle := run_folder.lock(_file("turn"))) is None) and not stopping():
            time.sleep(POLL_SECONDS)
        yield
    finally:
        _waiting.remove(ticket)
        if handle is not None:
            os.close(handle)


def _file(name: str) -> Path:
    """The lock file of a slot, with the host name: machines may share the folder, but not their GPUs."""
    file = FOLDER / f"{gethostname()}-{name}"
    file.touch()
    return file


def _holder(name: str) -> str:
    if (handle := run_folder.lock(_file(name))) is not None:
        os.close(handle)
        return "free"
    try:
        return str(json.loads(_file(name).read_text())["what"])
    except (ValueError, KeyError, TypeError):
        return "taken"
