"""A GPU each: every GPU of this machine, or every core where there is none, works for one stage at a time, whichever flow started it."""

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
EVERY = 0.5  # seconds between two looks for a free one


@dataclass(frozen=True)
class Slots:
    """What a stage got: locked files, which its process inherits and holds until it has ended, and the environment that shows it its GPUs alone."""

    handles: tuple[int, ...]
    environment: dict[str, str]


@cache
def names() -> tuple[str, ...]:
    """What there is on this machine: gpu-0, gpu-1, ... as CUDA_VISIBLE_DEVICES and nvidia-smi have them, else core-0, core-1, ..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        visible = ",".join(said.stdout.split()) if said.returncode == 0 else ""
    gpus = [name.strip() for name in (visible or "").split(",") if name.strip() not in ("", "-1")]
    return tuple(f"gpu-{name}" for name in gpus) or tuple(f"core-{number}" for number in range(len(os.sched_getaffinity(0))))


@contextmanager
def acquire(count: int, what: str, stopping: Callable[[], bool], tell: Callable[[str], None]) -> Iterator[Slots | None]:
    """Within, `count` of them are taken for `what`; None when `stopping` said so before they were free.

    Whoever starts a process within passes the handles on: then they stay taken until that process has ended, even if this one dies.
    Raises ConfigError for more than there are.
    """
    every = names()
    if count > len(every):
        raise ConfigError(f"{what} wants {count} processes, and this machine has {len(every)} ({', '.join(every)}). Give it fewer, one for each.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    got = dict[str, int]()
    try:
        with _turn(stopping):  # kept while it waits, so that who wants many is not overtaken by those who want one
            said = False
            while not (got := _free(every, count)) and not stopping():
                if not said:
                    tell(f"{what} waits for {count} free of {', '.join(f'{name} ({_holder(name)})' for name in every)}")
                said = True
                time.sleep(EVERY)
        for name in got:
            _file(name).write_text(json.dumps({"what": what, "pid": os.getpid()}))
        gpus = [name.removeprefix("gpu-") for name in got if name.startswith("gpu-")]
        yield Slots(tuple(got.values()), {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}) if got else None
    finally:
        for handle in got.values():
            os.close(handle)


def _free(every: tuple[str, ...], count: int) -> dict[str, int]:
    """All `count` of them or none: two that each hold half would wait for ever."""
    found = {name: handle for name in every if (handle := run_folder.lock(_file(name))) is not None}
    for name in list(found)[count if len(found) >= count else 0 :]:
        os.close(found.pop(name))
    return found


@contextmanager
def _turn(stopping: Callable[[], bool]) -> Iterator[None]:
    """One process looks at a time."""
    while (handle := run_folder.lock(_file("turn"))) is None and not stopping():
        time.sleep(0.05)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _file(name: str) -> Path:
    """Folders may be shared by machines, GPUs are not."""
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
