"""Handles SIGTERM (a scheduler, a preemption notice, the UI) and SIGINT: training finishes its step and saves before it stops.

Imports no torch. A second signal, or the end of the grace period, ends the process at once; earlier checkpoints stay complete.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dev2pro.errors import INTERRUPTED
from dev2pro.escape import lines

SAME_SIGNAL = 2.0  # seconds within which several signals count as one: a terminal and torchrun both send theirs
PR_SET_PDEATHSIG = 1
PARENT = "DEV2PRO_PARENT"  # pid of the parent, set by a parent that its child must not outlive
FLOW = "DEV2PRO_EVENTS"  # set by a flow
_since = 0.0  # when the first signal came
_grace: Callable[[], float] | None = None  # seconds, inside `grace_period`
_timer: threading.Timer | None = None  # ends the process after the grace period
_parent = 0  # pid of the parent, if that is a flow or torchrun


def install_handlers() -> None:
    """Makes SIGTERM and SIGINT raise KeyboardInterrupt, or wait for the step (see `grace_period`)."""
    global _since
    _since = 0.0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    stop_with_parent()


def nothing_left_to_stop(exit_code: int) -> None:
    """Call when the work is over: a signal then ends the process at once, with its own exit code. torchrun sends one to ranks that are ending."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(exit_code))


def stop_with_parent() -> None:
    """Sends a stop signal to a process started by a flow or by torchrun when its parent dies; ends it at once if the parent is already dead."""
    global _parent
    if "TORCHELASTIC_RUN_ID" in os.environ or FLOW in os.environ:
        _parent = os.getppid()
        signal_at_parent_death(signal.SIGTERM)
        if os.environ.get(PARENT, str(_parent)) != str(_parent):
            _end("what started it is gone")


def parent_died() -> bool:
    """Whether the parent flow died since the last call. The signal sent on its death then does not count as a second stop signal.

    Prefect kills the process of a cancelled flow after 30 seconds, while its stage may still be saving. Ranks end with their launcher.
    """
    global _parent
    before, _parent = _parent, os.getppid()
    return FLOW in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and before not in (0, _parent)


def signal_at_parent_death(number: int) -> None:
    """Makes the kernel send this process a signal when its parent dies. Linux only; elsewhere a no-op."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ignore_signals_in_child() -> None:
    """Call in a child that only its parent may end. The child ignores stop signals to the whole job and exits when the parent dies."""
    os.setpgid(0, 0)  # excludes the child from a terminal's signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_at_parent_death(signal.SIGKILL)
    if hasattr(signal, "sigwaitinfo"):  # else SIGTERM from any sender ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads inherit this
        threading.Thread(target=_until_parent_ends_it, daemon=True).start()


def _until_parent_ends_it() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def grace_period(grace: Callable[[], float]) -> Iterator[None]:
    """Inside this context a signal only sets the flag that `stop_requested` returns. The process then has `grace()` seconds to save and leave it."""
    global _grace, _timer
    _grace = grace
    try:
        yield
    finally:
        _grace = None
        if _timer:
            _timer.cancel()
        _timer = None


def stop_requested() -> bool:
    """Whether this process received a stop signal."""
    return _since > 0


def emit(text: str) -> None:
    """Prints a line to stdout. A broken pipe counts as a stop signal: the flow was killed or the terminal closed."""
    if not _write_line(text, sys.stdout) and not stop_requested():
        _request_stop("nobody reads what it says")


def _on_signal(number: int, _frame: Any) -> None:
    _request_stop(signal.Signals(number).name)


def _request_stop(why: str) -> None:
    global _since, _timer
    now = time.monotonic()
    if stop_requested() and now - _since < SAME_SIGNAL:
        return
    if not _grace:
        _since = _since or now
        raise KeyboardInterrupt
    if stop_requested():
        return None if parent_died() else _end("asked twice")
    _since, seconds = now, _grace()
    _write_line(f"asked to stop ({why}): finishing the step and saving, for up to {seconds:.0f} s", sys.stderr)
    _timer = threading.Timer(seconds, _end, [f"{seconds:.0f} s were not enough to save"])
    _timer.daemon = True
    _timer.start()


def _end(why: str) -> None:
    _write_line(f"stopped at once ({why}). The same command goes on from the last checkpoint, if there is one.", sys.stderr)
    os._exit(INTERRUPTED)


def _write_line(text: str, stream: Any) -> bool:
    """Prints a line; False if the stream is broken. Redirects a broken stream to /dev/null, so that later prints do not raise."""
    try:
        print(lines(text), file=stream, flush=True)
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
        return False
    return True
