"""Starts stages as forks of a process that has imported everything: what a child then runs is `python -m`'s own code, in a session of its own.

The imports of a stage are most of a short run. Processes that are to be killed by the dozen are forked from here instead; some are `spawned`
as real ones all the same.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

STAGES = ("recover", "lora", "distill")
ASKING = (signal.SIGTERM, signal.SIGINT)


class Become(BaseException):
    """Raised in a forked child to unwind the parent's frames, so that the child ends like an ordinary process."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work


def became(main: Callable[[], None]) -> Callable[[], None] | None:
    """Runs it. In a forked child: what that is to do, outside of all that its parent was doing; in the parent None."""
    try:
        main()
    except Become as become:
        return become.work
    return None


def imported() -> None:
    """Imports what stages and torchrun import. The stages' own modules are left to the child."""
    for name in (*(f"stages.{stage}" for stage in STAGES), "dev2pro.ranks", "torch.distributed.elastic.multiprocessing.subprocess_handler"):
        importlib.import_module(name)
    for name in ("dev2pro.ranks", *(f"stages.{stage}" for stage in STAGES)):
        package, _, module = name.partition(".")
        delattr(sys.modules[package], module)
        del sys.modules[name]


def spawned(args: list[str], environment: dict[str, str], log: Path) -> int:
    """The pid of `python args`, in a session of its own."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(sys.executable, [sys.executable, *args], {**os.environ, **environment}, file_actions=actions, setsid=True)


def forked(args: list[str], environment: dict[str, str], log: Path, prepare: Callable[[int], None]) -> int:
    """The same from here, `args` being -m and what follows. `prepare(rank)` runs in the process that is to be the stage, or a rank of it."""
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)  # a fork forgets what comes before it is done
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        return pid
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    if args[1] == "dev2pro.ranks":
        _ranks_in_waiting(int(next(word for word in args if word.startswith("--nproc")).partition("=")[2]), prepare)
    else:
        prepare(0)
    become(args)


def become(args: list[str]) -> NoReturn:
    """Continues as `python -m module arguments`."""

    def work() -> None:
        sys.argv = [args[1], *args[2:]]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)

    raise Become(work)


def _ranks_in_waiting(number: int, prepare: Callable[[int], None]) -> None:
    """Forks the ranks before torchrun's code has any threads; each waits for the args and the environment that torchrun starts it with."""
    waiting: list[tuple[int, int]] = []
    for _ in range(number):
        mine, its = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(its)
            for _, other in waiting:
                os.close(other)
            _wait(mine, prepare)
        os.close(mine)
        waiting.append((pid, its))

    class Waiting(subprocess.Popen):
        """What torchrun starts a rank with; its parent is torchrun's process, as ever."""

        def _execute_child(self, popen_args: Any, executable: Any, preexec: Any, close: Any, passed: Any, cwd: Any, env: Any, *rest: Any) -> None:
            self.pid, its = waiting.pop(0)
            self._child_created = True
            os.write(its, json.dumps([list(popen_args), env]).encode())
            os.close(its)

    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = Waiting  # type: ignore[attr-defined]


def _wait(mine: int, prepare: Callable[[int], None]) -> NoReturn:
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)
    with os.fdopen(mine) as pipe:
        message = pipe.read()
    if not message:  # torchrun's process is gone
        os._exit(0)
    args, environment = json.loads(message)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    prepare(int(environment["RANK"]))
    become(args[args.index("-m") :])
