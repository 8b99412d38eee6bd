"""Starts a stage as a process, passes its progress and its words on to Prefect, and brings back its artifact."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from dev2pro import artifact, claim
from dev2pro.artifact import ROOT, Artifact

GRACE = 25.0  # seconds a stage gets to stop; Prefect kills a cancelled flow after 30
PROGRESS_EVERY = 5  # percent between two updates of the progress artifact
_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_turn = threading.BoundedSemaphore(1)


class StageFailed(RuntimeError):
    """A stage ended with an exit code other than 0, kept in `exit_code`; the message holds its last words."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(stage: str, words: list[str], out: str, processes: int = 1) -> Artifact:
    """Runs `python -m stages.<stage> <words>` (under torchrun's ranks for several processes) and returns the artifact it left in `out`.

    A finished artifact made by the same command is returned at once. Raises StageFailed.
    """
    log = get_run_logger()
    if made := claim.stands(str(ROOT / out), words):
        log.info("%s: finished before, skipped", out)
        return made
    starter = ["-m", "dev2pro.ranks", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *starter, "-m", f"stages.{stage}", *words]
    with _turn:
        log.info("python -m stages.%s %s", stage, " ".join(words))
        last, code = _follow(command)
    if code:
        raise StageFailed(f"{stage} ended with exit code {code}: {' '.join(last) or 'it said nothing'}", code)
    return artifact.read(str(ROOT / out))


@contextmanager
def at_most(parallel: int) -> Iterator[None]:
    """Within, so many stages run at a time; at its end, a failure or a cancellation included, none is left running."""
    global _turn
    _turn = threading.BoundedSemaphore(parallel)
    try:
        yield
    finally:
        _stop_all()


def _stop_all() -> None:
    with _lock:
        children = list(_running)
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
    for child in children:
        try:
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)


def _follow(command: list[str]) -> tuple[list[str], int]:
    """Runs the command to its end: (its last words, its exit code)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "DEV2PRO_EVENTS": "1", "DEV2PRO_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    with _lock:
        _running.add(child)
    try:
        return _listen(child), child.wait()
    finally:
        with _lock:
            _running.discard(child)


def _listen(child: subprocess.Popen) -> list[str]:
    log, last, progress = get_run_logger(), deque[str](maxlen=20), _Progress()
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("@@"):
            progress.tell(json.loads(line[2:]))
        elif line.strip():
            last.append(line.rstrip())
            log.info(line.rstrip())
    return list(last)


class _Progress:
    """A stage's progress as a Prefect artifact and, now and then, a line of the log."""

    def __init__(self) -> None:
        self.id, self.said = None, -PROGRESS_EVERY

    def tell(self, event: dict) -> None:
        percent = 100 * event["step"] / event["of"]
        if percent < self.said + PROGRESS_EVERY and percent < 100:
            return
        text = f"{event['stage']}: {event['step']}/{event['of']}  {event['text']}"
        if self.id is None:
            self.id = create_progress_artifact(progress=percent, description=text)
        else:
            update_progress_artifact(artifact_id=self.id, progress=percent, description=text)
        self.said = percent
        get_run_logger().info(text)
