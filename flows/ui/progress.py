"""Shows a running stage in the UI: progress, curves, pictures and checkpoints, each a Prefect artifact that is updated.

Errors here never block or end a stage; the server may be down for a while.
"""

import base64
import contextvars
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import Artifact as PrefectArtifact
from prefect.artifacts import MarkdownArtifact, ProgressArtifact, TableArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from dev2pro.artifacts import record
from dev2pro.escape import markdown, printable
from flows.ui import charts, dataset

POLL_SECONDS = 5.0  # seconds between two updates of the progress
FULL_EVERY = 6  # updates of the progress per update of curves, pictures and checkpoints
WINDOW = 60  # progress events that the speed is computed from
MAX_PICTURE_BYTES = 1 << 20  # bytes of a picture that goes into the server's database
END_TIMEOUT = 20.0  # seconds for the last update


class ProgressReporter:
    """Reports one stage that writes into `out`, from its own thread, until `end`. `on_event` takes the stage's progress events."""

    def __init__(self, stage: str, out: Path, warn: Callable[[str], None]) -> None:
        self.stage, self.out, self.warn = stage, out, warn
        self.title = markdown(stage)  # the UI renders descriptions as markdown with HTML
        self.key = key(out)
        self.curve = dict[int, dict[str, Any]]()  # held-out measurements by step
        self.events = deque[tuple[float, dict[str, Any]]](maxlen=WINDOW)
        self.rows = Rows(out / "metrics.jsonl")
        self._published = dict[str, tuple[UUID, ArtifactUpdate]]()  # artifact id and content by name
        self._ended, self._failing = threading.Event(), False
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=[self._work], daemon=True)  # the context holds the flow run
        self._thread.start()

    def on_event(self, event: dict[str, Any]) -> None:
        """Stores a progress event or a measurement of the stage."""
        if "measured" in event:
            self.curve = {**self.curve, event["measured"]["step"]: event["measured"]}
            return
        if self.events and self.events[-1][1]["stage"] != event["stage"]:
            self.events.clear()
        self.events.append((time.monotonic(), event))

    def end(self) -> None:
        """Publishes a last time after the stage has ended, waiting at most END_TIMEOUT seconds."""
        self._ended.set()
        self._thread.join(END_TIMEOUT)

    def _work(self) -> None:
        updates = 0
        while not self._ended.wait(POLL_SECONDS):
            self._update(full=updates % FULL_EVERY == 0)
            updates += 1
        self._update(full=True)

    def _update(self, full: bool) -> None:
        try:
            if self.events:
                self._progress()
            if full:
                self._data()
                self._curves()
                self._pictures()
                self._checkpoints()
            self._failing = False
        except Exception as error:  # no error here may end the stage
            self._warn_once(error)

    def _warn_once(self, error: Exception) -> None:
        if not self._failing:
            self.warn(printable(f"{self.stage}: cannot be shown at the moment ({type(error).__name__}: {error}); it goes on"))
        self._failing = True

    # ---- artifacts ----

    def _progress(self) -> None:
        event = self.events[-1][1]
        description = f"{markdown(event['stage'])}: {pace(self.events)}  {markdown(event['text'])}"
        self._show(ProgressArtifact(progress=100 * event["step"] / event["of"], description=description))

    def _data(self) -> None:
        if page := dataset.page(self.out):
            self._show(MarkdownArtifact(markdown=page, description=f"{self.title}: what it is trained on"), "data")

    def _curves(self) -> None:
        losses = self.rows.read()
        if losses or self.curve:
            chart = charts.draw(losses, list(self.curve.values()))
            self._show(MarkdownArtifact(markdown=_picture(chart, "png"), description=f"{self.title}: loss and recovery"), "curves")

    def _pictures(self) -> None:
        sheets = sorted((self.out / record.PREVIEWS).glob("*.jpg"))
        if sheets and sheets[-1].stat().st_size < MAX_PICTURE_BYTES:
            description = f"{self.title}: what it draws after step {int(sheets[-1].stem)}"
            self._show(MarkdownArtifact(markdown=_picture(sheets[-1].read_bytes(), "jpeg"), description=description), "pictures")

    def _checkpoints(self) -> None:
        checkpoints = [(int(name[1]), folder) for folder in self.out.glob("checkpoint-*") if (name := record.CHECKPOINT.fullmatch(folder.name))]
        if rows := [_row(step, folder) for step, folder in sorted(checkpoints)]:
            self._show(TableArtifact(table=rows, description=f"{self.title}: where it would go on from"), "checkpoints")

    def _show(self, artifact: PrefectArtifact, name: str = "") -> None:
        """Creates or updates the artifact."""
        content = ArtifactUpdate(data=artifact.format(), description=artifact.description)
        artifact_id, previous = self._published.get(name, (None, None))
        if previous == content:
            return
        if artifact_id is None:
            artifact.key = f"{self.key}-{name}" if name else None
            artifact_id = artifact.create().id
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(artifact_id, content)
        self._published[name] = (artifact_id, content)


class Rows:
    """Reads a growing metrics.jsonl incrementally."""

    def __init__(self, path: Path) -> None:
        self.path, self._at, self._file = path, 0, 0
        self._losses = list[tuple[int, float]]()

    def read(self) -> list[tuple[int, float]]:
        """(step, loss) of every step so far."""
        if not self.path.exists():
            return []
        if (number := self.path.stat().st_ino) != self._file:  # a resumed stage writes a new file
            self._at, self._file, self._losses = 0, number, []
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                row = json.loads(line)
                if "loss" in row:
                    self._losses.append((row["step"], row["loss"]))
        return self._losses


def pace(events: deque[tuple[float, dict[str, Any]]]) -> str:
    """Step, steps per second and remaining time."""
    (began, first), (now, last) = events[0], events[-1]
    description = f"step {last['step']:,} of {last['of']:,}"
    if last["step"] <= first["step"]:
        return description
    speed = (last["step"] - first["step"]) / (now - began)
    return f"{description}, {speed:.3g} a second, {duration((last['of'] - last['step']) / speed)} left"


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{int(seconds)} s"


def key(out: Path) -> str:
    """The prefix of the artifact keys of a stage's folder: its path below runs/, in Prefect's alphabet."""
    return re.sub("[^a-z0-9]+", "-", _below(record.ROOT / "runs", out).lower()).strip("-")


def _below(root: Path, path: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _row(step: int, folder: Path) -> dict[str, Any]:
    files = [file for file in folder.iterdir() if file.is_file()]
    path = folder / "checkpoint.json"
    held_out = json.loads(path.read_text()).get("held_out") if path.exists() else None
    size = sum(file.stat().st_size for file in files) / 2**20
    return {
        "step": step,
        "loss on held-out pictures": held_out and round(held_out, 5),
        "MiB": round(size, 1),
        "folder": _below(record.ROOT, folder),
    }


def _picture(content: bytes, kind: str) -> str:
    return f"![](data:image/{kind};base64,{base64.b64encode(content).decode()})"
