"""Progress and metrics: a bar on a terminal, events for a flow, metrics.jsonl in the artifact's folder."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dev2pro import signals
from dev2pro.escape import printable

EVENTS = "DEV2PRO_EVENTS"  # set by a flow: progress is printed as lines "@@{json}" for it
EVENT_EVERY = 1.0  # seconds
LINE_EVERY = 15.0  # seconds, if the output is neither a terminal nor a flow's pipe


class Progress:
    """`with Progress(name, total) as progress: ... progress.step(n, loss=...)`. Silent on every rank but the first."""

    def __init__(self, name: str, total: int, main: bool = True) -> None:
        self.name, self.total, self.main = printable(name), total, main
        self.events = bool(os.environ.get(EVENTS))
        self._last_emit = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if self.main and sys.stdout.isatty() and not self.events:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._task = self._bar.add_task(self.name, total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int, **numbers: Any) -> None:
        """Shows the steps finished so far, and numbers beside them."""
        if self.main:
            self._update(done, "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    def _update(self, done: int, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last_emit < (EVENT_EVERY if self.events else LINE_EVERY) and done < self.total:
            return
        self._last_emit = now
        if self.events:
            signals.emit("@@" + json.dumps({"stage": self.name, "step": done, "of": self.total, "text": text}))
        else:
            signals.emit(f"{self.name}: {done}/{self.total}  {text}")


class Log(Progress):
    """Progress with a row of metrics.jsonl for every step; rows after step `first` belong to an interrupted run and are dropped."""

    def __init__(self, out: str, name: str, total: int, main: bool = True, first: int = 0) -> None:
        super().__init__(name, total, main)
        self._path, self._first = Path(out) / "metrics.jsonl", first

    def __enter__(self) -> Self:
        if self.main:
            rows = [line for line in _lines(self._path) if json.loads(line)["step"] <= self._first] if self._first else []
            partial = self._path.with_suffix(".partial")  # so that a run killed here keeps its rows
            self._file = partial.open("w")
            self._file.writelines(rows)
            self._file.flush()
            partial.rename(self._path)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        if self.main:
            self._file.close()
        super().__exit__()

    def write(self, done: int, **numbers: Any) -> None:
        """Writes one row of metrics.jsonl."""
        if self.main:
            self._file.write(json.dumps({"step": done, **numbers}) + "\n")
            self._file.flush()

    def emit_validation(self, *points: dict[str, Any]) -> None:
        """Emits held-out measurements as events, from which a flow plots curves."""
        for point in points if self.main and self.events else ():
            signals.emit("@@" + json.dumps({"stage": self.name, "measured": point}))


def _lines(path: Path) -> list[str]:
    """The complete lines of a file whose last line may be cut off, because its run was killed."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
