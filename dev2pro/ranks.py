"""torchrun that ends with the stage's own exit code: `python -m dev2pro.ranks --nproc-per-node=8 -m stages.recover ...`.

torchrun itself ends with 1 whatever a rank ended with, and prints a page about it.
"""

import os
import signal
import sys
import time
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dev2pro import signals
from dev2pro.errors import INTERRUPTED

GRACE = "checkpoint.grace="
KILLED = 137  # by SIGKILL, often for want of memory; the other ranks were then asked to stop, and say that they were interrupted
MARGIN = 15.0  # seconds: ranks that were asked to stop end by themselves with their grace, unless they hang; then they are killed
_since = 0.0  # when the first signal came


def _on_signal(number: int, _frame: Any) -> None:
    global _since
    if not _since or (time.monotonic() - _since > signals.ONE and not signals.parent_died()):  # a second wish takes this process out of its waiting
        _since = _since or time.monotonic()
        raise SignalException(f"got {number}", signal.Signals(number))


def main(words: list[str]) -> int:
    """Runs the ranks to their end. Returns the exit code of the rank that knows what went wrong, or that of an interruption."""
    signals.stop_with_parent()
    os.environ[signals.PARENT] = str(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", f"--shutdown-timeout={grace_seconds(words):.0f}", *words]))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return _code([failure.exitcode for failure in error.failures.values()])
    return 0


def grace_seconds(words: list[str]) -> float:
    """Seconds from asking the ranks to stop to killing them."""
    said = [word.removeprefix(GRACE) for word in words if word.startswith(GRACE)]
    return MARGIN + (float(said[-1]) if said and said[-1].replace(".", "", 1).isdigit() else 30.0)


def _code(ended: list[int]) -> int:
    """Of ranks that failed together: the others only know that one was lost."""
    codes = [code if code > 0 else 128 - code for code in ended]  # as a shell has it for a rank that a signal ended
    known = [code for code in codes if code not in (1, INTERRUPTED) and code < 128]
    return known[0] if known else next((code for code in (KILLED, INTERRUPTED) if code in codes), codes[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
