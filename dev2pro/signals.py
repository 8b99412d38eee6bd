"""Being asked to stop: SIGTERM (a scheduler, a preemption notice, the UI) or SIGINT. Training goes on to the end of its step and is saved first.

Imports no torch. A second signal, or the end of the grace, ends the process at once; what was saved before stays whole.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dev2pro.errors import INTERRUPTED
from dev2pro.escape import lines

ONE = 2.0  # seconds within which several signals are one: a terminal and torchrun both pass theirs on
PR_SET_PDEATHSIG = 1
PARENT = "DEV2PRO_PARENT"  # set by whoever starts a process that is not to outlive it: its pid
FLOW = "DEV2PRO_EVENTS"  # set by a flow
_since = 0.0  # when the first signal came
_held = 0.0  # seconds of grace, while a step is to be finished
_timer: threading.Timer | None = None  # ends the process when they are over
_parent = 0  # the pid of what started this process, where that is a flow or torchrun


def install_handlers() -> None:
    """From now on SIGTERM and SIGINT raise KeyboardInterrupt, or wait for the step (see `finishing`)."""
    global _since
    _since = 0.0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    stop_with_parent()


def stop_with_parent() -> None:
    """A process that was started by a flow or by torchrun is asked to stop, too, when its parent dies; it ends at once when that is dead already."""
    global _parent
    if "TORCHELASTIC_RUN_ID" in os.environ or FLOW in os.environ:
        _parent = os.getppid()
        signal_at_parent_death(signal.SIGTERM)
        if os.environ.get(PARENT, str(_parent)) != str(_parent):
            _end("what started it is gone")


def parent_died() -> bool:
    """Whether the flow that started this process has died since this was asked last: then the signal that tells so is no second one.

    Prefect kills the process of a cancelled flow after 30 seconds, while its stage may still be saving. Ranks end with their launcher.
    """
    global _parent
    before, _parent = _parent, os.getppid()
    return FLOW in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and before not in (0, _parent)


def signal_at_parent_death(number: int) -> None:
    """Has the system send this process a signal when its parent dies. Linux; elsewhere nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ignore_signals_in_child() -> None:
    """In a child that only its parent is to end: it is deaf when all processes of a job are asked to stop, and it does not outlive the parent."""
    os.setpgid(0, 0)  # a terminal's signals do not come here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_at_parent_death(signal.SIGKILL)
    if hasattr(signal, "sigwaitinfo"):  # else SIGTERM ends it, whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads inherit this
        threading.Thread(target=_until_parent_ends_it, daemon=True).start()


def _until_parent_ends_it() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def grace_period(grace: float) -> Iterator[None]:
    """Within, a signal is only noted (`asked`), and `grace` seconds are left to save and to come to the end of this."""
    global _held, _timer
    _held = grace
    try:
        yield
    finally:
        _held = 0.0
        if _timer:
            _timer.cancel()
        _timer = None


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _since > 0


def emit(text: str) -> None:
    """A line for whoever started this process. That nobody reads it any more is being asked to stop, too: a flow was killed, a window closed."""
    if not _write_line(text, sys.stdout) and not stop_requested():
        _request_stop("nobody reads what it says")


def _on_signal(number: int, _frame: Any) -> None:
    _request_stop(signal.Signals(number).name)


def _request_stop(why: str) -> None:
    global _since, _timer
    now = time.monotonic()
    if stop_requested() and now - _since < ONE:
        return
    if not _held:
        _since = _since or now
        raise KeyboardInterrupt
    if stop_requested():
        return None if parent_died() else _end("asked twice")
    _since = now
    _write_line(f"asked to stop ({why}): finishing the step and saving, for up to {_held:.0f} s", sys.stderr)
    _timer = threading.Timer(_held, _end, [f"{_held:.0f} s were not enough to save"])
    _timer.daemon = True
    _timer.start()


def _end(why: str) -> None:
    _write_line(f"stopped at once ({why}). The same command goes on from the last checkpoint, if there is one.", sys.stderr)
    os._exit(INTERRUPTED)


def _write_line(text: str, stream: Any) -> bool:
    """Whether a line went out. A stream that is broken leads to nowhere from then on, so that the next line raises nothing."""
    try:
        print(lines(text), file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    return True
