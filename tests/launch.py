"""Runs a script on ranks that are forks of a process which has imported torch, diffusers and the stages: in a short run the imports are the most.

The launchers themselves, torchrun and dev2pro.ranks, are tested in tests/stages/ and in tests/dev2pro/test_ranks.py.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stages.recover", "torch.distributed.checkpoint.hf_storage", "torch.distributed.tensor"])


def on_ranks(words: Sequence[str], ranks: int) -> str:
    """What the ranks of `torchrun --standalone --nproc-per-node=ranks words...` print. Raises AssertionError with it if one fails."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's: no other can take the port in between
    common = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": f"{store.port}", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    return forks(words, [{**common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)])


def forks(words: Sequence[str], environments: Sequence[dict[str, str]]) -> str:
    """The same of `python words...` once for each environment. When one fails, or after five minutes, the others are killed."""
    with contextlib.chdir(ROOT), TemporaryDirectory() as folder:
        forkserver.ensure_running()
        processes = [CONTEXT.Process(target=_become, args=(list(words), os.environ | one, f"{folder}/log")) for one in environments]
        for process in processes:
            process.start()
        end = time.monotonic() + 300
        while alive := [process for process in processes if process.is_alive()]:
            connection.wait([process.sentinel for process in alive], max(0, end - time.monotonic()))
            if time.monotonic() >= end or any(process.exitcode for process in processes):
                for process in alive:
                    process.kill()
        printed = Path(folder, "log").read_text()
        assert [process.exitcode for process in processes] == [0] * len(processes), printed[-3000:]
        return printed


def _become(words: list[str], environment: dict[str, str], log: str) -> None:
    """Continues as `python words...`, a script and its arguments, in a process that has just been forked."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
