"""A sweep of one stage, by Hydra's multirun: each job in a process and a folder of its own, one table of all."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dev2pro import allowed, command_line, signals
from dev2pro.artifacts import record
from dev2pro.errors import INTERRUPTED, ConfigError
from dev2pro.escape import lines, printable
from dev2pro.sweeps import table
from dev2pro.sweeps.jobs import FLAG, Job
from dev2pro.sweeps.table import Row

STOPS = (signal.SIGTERM, signal.SIGINT)


class Sweep:
    """Runs the jobs that Hydra gives it one after the other. A failed one does not stop the others; a stop signal does.

    A job is a fork of this process, which has imported everything and computed nothing: it leaves no memory, no GPU context and no setting
    behind for the next one, and one that is killed ends alone.
    """

    def __init__(self, stage: str, jobs: Sequence[Job]) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            raise ConfigError(f"{FLAG} starts one job after the other and cannot be a rank of torchrun. Start each job with its own command.")
        self.stage, self.jobs, self.folder = stage, {tuple(job.words): job for job in jobs}, ""
        self.exit_codes: dict[str, int] = {}
        self._stopping, self._child = False, 0

    def run(self, values: DictConfig, work: Callable[[], int]) -> int:
        """Runs `work` as the job that Hydra has composed `values` for, with its own `out`. Returns its exit code, and raises KeyboardInterrupt if
        it was stopped. Raises ConfigError if the sweep's folder cannot be used.
        """  # fmt: skip
        for number in STOPS:
            signal.signal(number, self._on_signal)
        job = self.jobs[tuple(word for word in HydraConfig.get().overrides.task if not word.startswith("out="))]
        self._claim(values)
        values.out = self._out(job)
        print(printable(f"{self.stage}: job {len(self.exit_codes) + 1} of {len(self.jobs)}: {job.name}"), flush=True)
        code = self._in_child(work, [*job.words, f"out={command_line.quoted(values.out)}"])
        self.exit_codes[job.name] = code
        self._report(write=not values.get("plan") and not values.get("check"))
        if self._stopping or code == INTERRUPTED:
            raise KeyboardInterrupt
        return code

    def end(self) -> int:
        """Names the jobs that failed; the exit code of the first of them, 0 if there is none."""
        failed = {name: code for name, code in self.exit_codes.items() if code not in (0, INTERRUPTED)}
        if failed:
            named = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
            print(lines(f"{self.stage}: {len(failed)} of {len(self.jobs)} jobs failed: {named}"), file=sys.stderr, flush=True)
        return next(iter(failed.values()), 0)

    def _claim(self, values: DictConfig) -> None:
        """The sweep's folder: `out`, the same for all jobs."""
        if OmegaConf.is_missing(values, "out"):
            raise ConfigError("These values are required and were not given: out. Add for example out=... to the command.")
        folder = allowed.checked("out", values.out)
        if any((Path(folder) / name).is_file() for name in (record.CONFIG, record.RECORD)):
            raise ConfigError(f"out={folder} holds a run of its own, and a sweep needs a folder for those of its jobs. Choose another out=.")
        if self.folder not in ("", folder):
            raise ConfigError(f"out= is {self.folder} for one job and {folder} for another. Give one out= for the whole sweep.")
        self.folder = folder

    def _out(self, job: Job) -> str:
        return os.path.join(self.folder, job.name)

    def _report(self, write: bool) -> None:
        rows = table.table([Row(job.values, self._out(job), self.exit_codes.get(job.name)) for job in self.jobs.values()], self.stage)
        if write:
            table.write(self.folder, rows)
        print(table.as_text(rows), flush=True)

    def _in_child(self, work: Callable[[], int], words: list[str]) -> int:
        """The exit code of `work` in a fork, in which the command has these words; as in a shell for one that a signal killed."""
        parent, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the child has handlers, and this process its id

        def child() -> None:
            signals.install_handlers()
            signals.signal_at_parent_death(signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(INTERRUPTED)
            sys.argv[1:] = words
            code = INTERRUPTED
            with suppress(KeyboardInterrupt):
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                code = work()
            signals.nothing_left_to_stop(code)
            sys.exit(code)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        self._child = process.pid or 0
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        process.join()
        self._child = 0
        code = process.exitcode or 0
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, _frame: Any) -> None:
        """Passes a stop signal on to the job, which saves and ends as a single run does."""
        self._stopping = True
        if not self._child:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):
            os.kill(self._child, number)
