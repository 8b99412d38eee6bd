"""What a stage does, shown in the UI while it does it: progress, curves, pictures and checkpoints, each one artifact that is brought up to date.

Nothing here can hold a stage up or end it: the server may be gone for a while.
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

from prefect.artifacts import Artifact as Shown
from prefect.artifacts import MarkdownArtifact, ProgressArtifact, TableArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from dev2pro.artifacts import record
from dev2pro.escape import markdown, printable
from flows.ui import charts

EVERY = 5.0  # seconds between two looks; the progress is told then
SLOWLY = 6  # looks between two of the curves, pictures and checkpoints
WINDOW = 60  # progress events that tell how fast it is
LARGEST = 1 << 20  # bytes of a picture that goes into the server's database
PATIENCE = 20.0  # seconds for the last look


class ProgressReporter:
    """Looks after one stage that writes into `out`, from a thread of its own, until `end`. `tell` takes its progress events."""

    def __init__(self, stage: str, out: Path, warn: Callable[[str], None]) -> None:
        self.stage, self.out, self.warn = stage, out, warn
        self.title = markdown(stage)  # the UI takes descriptions for markdown, with HTML in it
        self.key = key(out)
        self.curve = dict[int, dict[str, Any]]()  # what was measured on held-out pictures, by step
        self.events = deque[tuple[float, dict[str, Any]]](maxlen=WINDOW)
        self.rows = Rows(out / "metrics.jsonl")
        self._shown = dict[str, tuple[UUID, ArtifactUpdate]]()  # by name
        self._ended, self._failing = threading.Event(), False
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=[self._work], daemon=True)  # the run is in the context
        self._thread.start()

    def on_event(self, event: dict[str, Any]) -> None:
        """Where the stage says that it is, or what it has measured."""
        if "measured" in event:
            self.curve = {**self.curve, event["measured"]["step"]: event["measured"]}
            return
        if self.events and self.events[-1][1]["stage"] != event["stage"]:
            self.events.clear()
        self.events.append((time.monotonic(), event))

    def end(self) -> None:
        """The stage has ended: a last look, for which nobody waits long."""
        self._ended.set()
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        looks = 0
        while not self._ended.wait(EVERY):
            self._look(slowly=looks % SLOWLY == 0)
            looks += 1
        self._look(slowly=True)

    def _look(self, slowly: bool) -> None:
        try:
            if self.events:
                self._progress()
            if slowly:
                self._curves()
                self._pictures()
                self._checkpoints()
            self._failing = False
        except Exception as error:  # whatever it is, the stage is worth more
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failing:
            self.warn(printable(f"{self.stage}: cannot be shown at the moment ({type(error).__name__}: {error}); it goes on"))
        self._failing = True

    # ---- what is shown ----

    def _progress(self) -> None:
        event = self.events[-1][1]
        said = f"{markdown(event['stage'])}: {pace(self.events)}  {markdown(event['text'])}"
        self._show(ProgressArtifact(progress=100 * event["step"] / event["of"], description=said))

    def _curves(self) -> None:
        losses = self.rows.read()
        if losses or self.curve:
            drawn = charts.drawn(losses, list(self.curve.values()))
            self._show(MarkdownArtifact(markdown=_picture(drawn, "png"), description=f"{self.title}: loss and recovery"), "curves")

    def _pictures(self) -> None:
        sheets = sorted((self.out / record.PREVIEWS).glob("*.jpg"))
        if sheets and sheets[-1].stat().st_size < LARGEST:
            said = f"{self.title}: what it draws after step {int(sheets[-1].stem)}"
            self._show(MarkdownArtifact(markdown=_picture(sheets[-1].read_bytes(), "jpeg"), description=said), "pictures")

    def _checkpoints(self) -> None:
        found = [(int(name[1]), place) for place in self.out.glob("checkpoint-*") if (name := record.CHECKPOINT.fullmatch(place.name))]
        if rows := [_row(step, place) for step, place in sorted(found)]:
            self._show(TableArtifact(table=rows, description=f"{self.title}: where it would go on from"), "checkpoints")

    def _show(self, what: Shown, name: str = "") -> None:
        """Makes the artifact, or brings it up to date."""
        content = ArtifactUpdate(data=what.format(), description=what.description)
        known, before = self._shown.get(name, (None, None))
        if before == content:
            return
        if known is None:
            what.key = f"{self.key}-{name}" if name else None
            known = what.create().id
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(known, content)
        self._shown[name] = (known, content)


class Rows:
    """The rows of a metrics.jsonl that grows, each read once."""

    def __init__(self, path: Path) -> None:
        self.path, self._at, self._file = path, 0, 0
        self._losses = list[tuple[int, float]]()

    def read(self) -> list[tuple[int, float]]:
        """(step, loss) of every step so far."""
        if not self.path.exists():
            return []
        if (number := self.path.stat().st_ino) != self._file:  # a stage that goes on writes it anew
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
    """Where it is, how fast it goes, and how long it will take."""
    (began, first), (now, last) = events[0], events[-1]
    said = f"step {last['step']:,} of {last['of']:,}"
    if last["step"] <= first["step"]:
        return said
    speed = (last["step"] - first["step"]) / (now - began)
    return f"{said}, {speed:.3g} a second, {duration((last['of'] - last['step']) / speed)} left"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{int(seconds)} s"


def key(out: Path) -> str:
    """How artifacts about a stage's folder begin: its name below runs/, as Prefect allows it."""
    return re.sub("[^a-z0-9]+", "-", _below(record.ROOT / "runs", out).lower()).strip("-")


def _below(root: Path, path: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _row(step: int, folder: Path) -> dict[str, Any]:
    files = [file for file in folder.iterdir() if file.is_file()]
    told = folder / "checkpoint.json"
    held_out = json.loads(told.read_text()).get("held_out") if told.exists() else None
    size = sum(file.stat().st_size for file in files) / 2**20
    return {
        "step": step,
        "loss on held-out pictures": held_out and round(held_out, 5),
        "MiB": round(size, 1),
        "folder": _below(record.ROOT, folder),
    }


def _picture(content: bytes, kind: str) -> str:
    return f"![](data:image/{kind};base64,{base64.b64encode(content).decode()})"
