"""torchrun that exits with the stage's own exit code: `python -m dev2pro.ranks --nproc-per-node=8 -m stages.recover ...`.

torchrun itself exits with 1 whatever a rank's exit code is, and prints a long report. On several machines each starts its own, with --nnodes
and one --rdzv-endpoint (docs/clusters.md).
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from operator import itemgetter
from typing import Any

import psutil
from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from dev2pro import schedulers, signals
from dev2pro.errors import INTERRUPTED, LOST, TryAgainError
from dev2pro.escape import lines

GRACE = "checkpoint.grace="
KILLED = 137  # by SIGKILL, often out of memory; torchrun then stops the other ranks, which exit with INTERRUPTED
MARGIN = 15.0  # seconds after the ranks' grace: they exit by themselves unless they hang; then they are killed
LINGER = 330.0  # seconds from the end of the last rank; torchrun waits up to 300 for the launchers of other machines
_since = 0.0  # when the first signal came


def _on_signal(number: int, _frame: Any) -> None:
    global _since
    # a second signal interrupts the wait for the ranks
    if not _since or (time.monotonic() - _since > signals.SAME_SIGNAL and not signals.parent_died()):
        _since = _since or time.monotonic()
        raise SignalException(f"got {number}", signal.Signals(number))


def main(args: list[str]) -> int:
    """Runs the ranks until they exit. Returns the exit code of the rank that failed by its own error, or INTERRUPTED.

    TryAgainError's if the cause is on another machine, or if the machines do not find each other.
    """
    signals.stop_with_parent()
    os.environ[signals.PARENT] = str(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    threading.Thread(target=_end_after_ranks, daemon=True).start()
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", f"--shutdown-timeout={grace_seconds(args):.0f}", *args]))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        code = _exit_code([(failure.exitcode, failure.timestamp) for failure in error.failures.values()])
        return _lost("the ranks here lost the others") if code == LOST else code
    except (RendezvousError, DistError) as error:
        return _lost(str(error) or type(error).__name__)
    return 0


def _end_after_ranks() -> None:
    """Ends this process LINGER after its ranks: where the machine with the rendezvous hangs, torch's store waits for its answer without a limit."""
    last = 0.0
    while not last or time.monotonic() - last < LINGER:
        time.sleep(1)
        if any(_is_rank(child) for child in psutil.Process().children()):
            last = time.monotonic()
    os._exit(_lost("the rendezvous does not answer"))


def _is_rank(child: psutil.Process) -> bool:
    with suppress(psutil.Error, ProcessLookupError):
        return os.getsid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE
    return False


def _lost(why: str) -> int:
    message = f"another machine is gone or hangs, or a rank of this one hangs ({why}). What they printed last says more. "
    print(lines(f"ranks: {message}The same command, given on every machine, goes on from the last checkpoint."), file=sys.stderr, flush=True)
    return TryAgainError.exit_code


def grace_seconds(args: list[str]) -> float:
    """Seconds from the stop signal to the ranks until they are killed. Ranks that derive their grace end by it themselves, unless they hang."""
    values = [arg.removeprefix(GRACE) for arg in args if arg.startswith(GRACE)]
    return MARGIN + (float(values[-1]) if values and values[-1].replace(".", "", 1).isdigit() else schedulers.LAUNCHER)


def _exit_code(failures: list[tuple[int, int]]) -> int:
    """The exit code of the rank that caused the failure, from (exit code, second it was noticed) of each in the order of their ends.

    The others fail only because it is gone, or torchrun stops them: what was stopped or killed counts only in the first second.
    """
    ends = [(code if code > 0 else 128 - code, second) for code, second in failures]  # as in a shell for a process that a signal killed
    codes, first = [code for code, _ in ends], [code for code, second in ends if second == min(failures, key=itemgetter(1))[1]]
    causes = [code for code in codes if code not in (1, LOST, INTERRUPTED) and code < 128]
    stops = [code for code in (KILLED, INTERRUPTED) if code in first]
    bugs = [code for code in codes if code == 1]
    return next(iter(causes + stops + bugs + first))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
