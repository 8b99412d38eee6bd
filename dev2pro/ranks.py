"""torchrun that exits with the stage's own exit code: `python -m dev2pro.ranks --nproc-per-node=8 -m stages.recover ...`.

torchrun itself exits with 1 whatever a rank's exit code is, and prints a long report.
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
KILLED = 137  # by SIGKILL, often out of memory; torchrun then stops the other ranks, which exit with INTERRUPTED
MARGIN = 15.0  # seconds after the ranks' grace: they exit by themselves unless they hang; then they are killed
_since = 0.0  # when the first signal came


def _on_signal(number: int, _frame: Any) -> None:
    global _since
    # a second signal interrupts the wait for the ranks
    if not _since or (time.monotonic() - _since > signals.SAME_SIGNAL and not signals.parent_died()):
        _since = _since or time.monotonic()
        raise SignalException(f"got {number}", signal.Signals(number))


def main(args: list[str]) -> int:
    """Runs the ranks until they exit. Returns the exit code of the rank that failed by its own error, or INTERRUPTED."""
    signals.stop_with_parent()
    os.environ[signals.PARENT] = str(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", f"--shutdown-timeout={grace_seconds(args):.0f}", *args]))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return _exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def grace_seconds(args: list[str]) -> float:
    """Seconds from the stop signal to the ranks until they are killed."""
    values = [arg.removeprefix(GRACE) for arg in args if arg.startswith(GRACE)]
    return MARGIN + (float(values[-1]) if values and values[-1].replace(".", "", 1).isdigit() else 30.0)


def _exit_code(exit_codes: list[int]) -> int:
    """The exit code of the rank that caused the failure; the others fail only because it is gone."""
    codes = [code if code > 0 else 128 - code for code in exit_codes]  # as in a shell for a process that a signal killed
    causes = [code for code in codes if code not in (1, INTERRUPTED) and code < 128]
    return causes[0] if causes else next((code for code in (KILLED, INTERRUPTED) if code in codes), codes[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
