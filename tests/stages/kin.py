"""The descendants of this process: finds, signals and reaps them."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG = 36, 1
TICK = 0.002  # seconds between two looks


@dataclass(frozen=True)
class Seen:
    """A process as /proc has it."""

    pid: int
    state: str
    parent: int
    session: int


def adopt() -> None:
    """Makes this process the parent of every orphan below it, so that none is missed. It ends with its own parent."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def family(of: int = 0) -> list[Seen]:
    """All living descendants of a process, by default of this one."""
    of = of or os.getpid()
    processes: dict[int, Seen] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent, _, session, *_ = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        processes[int(name)] = Seen(int(name), state, int(parent), int(session))
    kin = {of}
    while more := {process.pid for process in processes.values() if process.parent in kin} - kin:
        kin |= more
    return [processes[pid] for pid in kin - {of} if processes[pid].state not in "ZX"]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(bool(int(line.split()[1], 16) >> (number - 1) & 1) for line in lines if line.startswith("SigCgt"))


def send(pids: list[int], number: signal.Signals) -> None:
    """Sends the signal to the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def until(true: Callable[[], Any], seconds: float) -> bool:
    """Polls until the result is true; whether it became true within so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(TICK)
    return True


def reap() -> bool:
    """Reaps adopted processes that have ended. Whether none is left alive."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return not family()
