"""torchrun that ends with the stage's own exit code: `python -m dev2pro.ranks --nproc-per-node=8 -m stages.recover ...`.

torchrun itself ends with 1 whatever a rank ended with, and prints a page about it.
"""

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dev2pro import stop
from dev2pro.errors import INTERRUPTED


def main(words: list[str]) -> int:
    """Runs the ranks to their end. Returns the exit code of the rank that knows what went wrong, or that of an interruption."""
    stop.follow()
    os.environ[stop.PARENT] = str(os.getpid())
    try:
        run.run(run.parse_args(words))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return _code([failure.exitcode for failure in error.failures.values()])
    return 0


def _code(ended: list[int]) -> int:
    """Of ranks that failed together: the others only know that one was lost."""
    codes = [code if code > 0 else 128 - code for code in ended]  # as a shell has it for a rank that a signal ended
    return next((code for code in codes if code not in (1, INTERRUPTED) and code < 128), codes[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
