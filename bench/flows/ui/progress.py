"""What it costs a training to be shown in the UI: one recovery, watched and left alone in turns, so that both meet the same machine."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow

from dev2pro.artifacts.record import ROOT
from flows.processes.launch import _parse_event
from flows.ui.progress import ProgressReporter

PAIRS, WINDOW = 10, 30.0  # seconds: one full refresh, six progress updates
OUT = "runs/bench-progress"
ARGS = ["experiment=miniature", "steps=100000", "batch=4", "probe.every=100000", "probe.samples=16", "checkpoint.every=500", f"out={OUT}"]


class Training:
    """A recovery that runs until it is killed. Its events go to `reporter`, if set."""

    def __init__(self) -> None:
        self.reporter: ProgressReporter | None = None
        args = [sys.executable, "-m", "stages.recover", *ARGS]
        self.process = subprocess.Popen(args, cwd=ROOT, env=os.environ | {"DEV2PRO_EVENTS": "1"}, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            if (event := _parse_event(line)) and (reporter := self.reporter):
                reporter.on_event(event)

    @contextmanager
    def reported(self, wanted: bool) -> Iterator[None]:
        """Reports its progress within the block, if `wanted`."""
        self.reporter = ProgressReporter("recover", ROOT / OUT, print) if wanted else None
        yield
        if self.reporter:
            self.reporter.end()

    def speed(self) -> float:
        """Steps a second over the next WINDOW seconds."""
        (steps, began) = self._steps()
        time.sleep(WINDOW)
        (more, ended) = self._steps()
        return (more - steps) / (ended - began)

    def _steps(self) -> tuple[int, float]:
        """Waits for the next step. Returns (number of steps, time)."""
        before = self._rows()
        while (now := self._rows()) == before:
            time.sleep(0.001)
        return now, time.monotonic()

    def _rows(self) -> int:
        rows = ROOT / OUT / "metrics.jsonl"
        return rows.read_bytes().count(b'"lr"') if rows.exists() else 0


@flow
def pairs() -> dict[str, object]:
    """Speeds (alone, watched), their ratios, and what the watching process computed meanwhile, in seconds of a core per second."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    training, speeds, busy = Training(), {False: [], True: []}, []
    try:
        while training._rows() < 100:
            time.sleep(0.2)
        for turn in range(2 * PAIRS):
            wanted = turn % 4 in (1, 2)  # alone, watched, watched, alone
            with training.reported(wanted):
                began = time.process_time()
                speeds[wanted].append(training.speed())
                if wanted:
                    busy.append((time.process_time() - began) / WINDOW)
    finally:
        training.process.kill()
        shutil.rmtree(ROOT / OUT, ignore_errors=True)
    ratios = [watched / alone for alone, watched in zip(speeds[False], speeds[True], strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {
        "steps a second, alone": speeds[False], "watched": speeds[True], "watched to alone": ratios,
        "mean": statistics.mean(ratios), "standard error": error, "median": statistics.median(ratios), "cores busy with it": statistics.mean(busy),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(pairs()))
