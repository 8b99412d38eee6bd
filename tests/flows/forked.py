"""Flows as forks of a process that has imported everything, and what they start as forks, too: all of it runs the real code as `python -m` does.

The imports of a flow and a stage are most of a short run; a year of them would take hours. A flow's children are forked when it begins, before it has
any threads, and wait for the command, the environment and the open files that it starts them with. Its pid is their parent's, as ever.
"""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.stages import warm

CHILDREN = 8  # that a flow may start
LONGEST = 1 << 17  # bytes of a message to a child
Lurk = Callable[[str, list[str]], None]  # (module, args): called in the process that becomes it


def imported() -> None:
    """Imports what flows, stages and commands import. Modules that are run as scripts are left to the child."""
    warnings.filterwarnings("ignore", module="runpy")  # that what is to be run was imported
    warm.imported()
    for name in ("data.index", "data.snapshot", "dev2pro.artifacts", "flows.recurring", "prefect.server.utilities.encryption"):
        importlib.import_module(name)
    for name in ("data.index", "flows.recurring"):
        package, _, module = name.partition(".")
        delattr(sys.modules[package], module)
        del sys.modules[name]


def flow(command: list[str], environment: dict[str, str], log: Path, lurk: Lurk) -> int:
    """The pid of `python -m <command>`, in a session of its own."""

    def prepare(_rank: int) -> None:
        _children_in_waiting(lurk)
        lurk(command[0], command[1:])

    return warm.forked(["-m", *command], environment, log, prepare)


def _children_in_waiting(lurk: Lurk) -> None:
    waiting: list[tuple[int, socket.socket]] = []
    for _ in range(CHILDREN):
        its, mine = socket.socketpair()
        pid = os.fork()
        if not pid:
            its.close()
            for _, other in waiting:
                other.close()
            _wait(mine, lurk)
        mine.close()
        waiting.append((pid, its))

    class Waiting(subprocess.Popen):
        """What a flow starts a process with."""

        def _execute_child(self, popen_args: Any, executable: Any, preexec: Any, close: Any, passed: Any, cwd: Any, env: Any, *rest: Any) -> None:
            if "-m" not in popen_args:
                return super()._execute_child(popen_args, executable, preexec, close, passed, cwd, env, *rest)  # type: ignore[misc]
            self.pid, channel = waiting.pop(0)
            self._child_created = True
            pipes = rest[3:9]  # p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
            socket.send_fds(channel, [json.dumps([list(popen_args), dict(env)]).encode()], [pipes[3], *passed])
            channel.close()
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    subprocess.Popen = Waiting  # type: ignore[misc]


def _wait(mine: socket.socket, lurk: Lurk) -> NoReturn:
    """Becomes the command that the flow sends, with its output in the flow's pipe and the passed files open."""
    for number in warm.ASKING:
        signal.signal(number, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(mine, LONGEST, 16)
    if not message:  # the flow has ended
        os._exit(0)
    command, environment = json.loads(message)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(files[0], 1)
    os.dup2(files[0], 2)
    os.close(files[0])
    mine.close()
    os.environ.clear()
    os.environ.update(environment)
    module, *args = command[command.index("-m") + 1 :]
    lurk(module, args)
    warm.become(["-m", module, *args])


def leave(work: Callable[[], None]) -> NoReturn:
    """Does the work and ends as Python does, but for taking apart all that was imported, which takes seconds."""
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
