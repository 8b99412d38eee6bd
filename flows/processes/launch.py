"""Starts a stage as a process, passes its words and its progress on to Prefect, and brings back its artifact."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import INTERRUPTED, TryAgainError
from dev2pro.escape import printable
from flows.processes import gpu_slots, liveness, trust
from flows.processes.gpu_slots import Slots
from flows.ui.progress import ProgressReporter
from flows.ui.redact import redact

GRACE = 25.0  # seconds a cancelled flow waits for its stages; Prefect kills it after 30
SAVING = "checkpoint.grace=600"  # a stage may take longer to save: it outlives its flow
SAVES = ("recover", "lora", "distill")
LINES = 20  # of a stage's last words in an error
LOG_EVERY = 10  # percent between two lines of progress in the log
MOST = 1 << 53  # steps; with more, a number is no number of steps
_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class StageFailed(RuntimeError):
    """A stage ended with an exit code other than 0, kept in `exit_code`; the message holds its last words."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def again(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether a stage is worth another try: only where it says so itself."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, StageFailed) and failure.exit_code == TryAgainError.exit_code


RETRY_OPTIONS: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [10, 60, 600], "retry_jitter_factor": 0.2, "retry_condition_fn": again}


def launch(stage: str, words: list[str], out: str, processes: int = 1) -> Artifact:
    """Runs `python -m stages.<stage> <words>` (under torchrun's ranks for several processes) and returns the artifact it left in `out`.

    A finished artifact made by the same command is returned at once. Raises StageFailed.
    """
    log, place = get_run_logger(), ROOT / out
    words = [*words, SAVING] if stage in SAVES else words
    if made := run_folder.up_to_date(str(place), words):
        log.info("%s: finished before, skipped", out)
        return made
    starter = ["-m", "dev2pro.ranks", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    with gpu_slots.acquire(processes, f"{stage} {out}", _stopping.is_set, log.info) as got:
        if got is None:
            raise StageFailed(f"{stage} was stopped before it began", INTERRUPTED)
        log.info(redact(printable(f"python -m stages.{stage} {' '.join(words)}")))
        watch = ProgressReporter(f"{stage} {out}", place, log.warning)
        try:
            _follow(stage, [*starter, "-m", f"stages.{stage}", *words], got, watch, log.info)
        finally:
            watch.end()
    return record.read(str(place))


def command(module: str, words: list[str], handles: tuple[int, ...] = ()) -> None:
    """Runs `python -m <module> <words>`, a cheap one that needs no slot; the handles are open until it has ended. Raises StageFailed."""
    log = get_run_logger()
    log.info(redact(printable(f"python -m {module} {' '.join(words)}")))
    _follow(module, ["-m", module, *words], Slots(handles, {}), None, log.info)


@contextmanager
def run_context() -> Iterator[None]:
    """Around all that a flow launches: the flow counts as alive, and when it fails or is cancelled its stages are asked to stop.

    A cancelled flow leaves a stage alone that is still saving when its own time is over.
    """
    _stopping.clear()
    with liveness.this_run():
        trust.check()
        try:
            yield
        except Exception:
            _stop(None)
            raise
        except BaseException:  # Prefect's TerminationSignal, Ctrl-C
            _stop(GRACE)
            raise


def _stop(grace: float | None) -> None:
    if _stopping.is_set():
        return
    _stopping.set()
    with _lock:
        children = list(_running)
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
    for child in children:
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            get_run_logger().warning(
                "process %d is still saving, and is left to it; nothing else can begin in its folder or on its GPU until then", child.pid
            )


def _follow(what: str, words: list[str], got: Slots, watch: ProgressReporter | None, say: Callable[[str], None]) -> None:
    """Runs Python with these words to its end. Raises StageFailed with its last ones."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DEV2PRO_"))} | got.environment | {
        "DEV2PRO_EVENTS": "1", "DEV2PRO_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, pass_fds=got.handles,
    )  # fmt: skip
    with _lock:
        _running.add(child)
    last = deque[str](maxlen=LINES)
    ears = threading.Thread(target=_listen, args=[child, watch, say, last], daemon=True)  # goes on while the flow is being cancelled
    ears.start()
    try:
        code = child.wait()
    except BaseException:  # the flow is being cancelled; what the stage saves now is to be seen
        _stop(GRACE)
        raise
    ears.join(GRACE)
    with _lock:
        _running.discard(child)
    if code:
        raise StageFailed(f"{what} ended with exit code {code}: {' '.join(last) or 'it said nothing'}", code)


def _listen(child: subprocess.Popen, watch: ProgressReporter | None, say: Callable[[str], None], last: deque[str]) -> None:
    said = 0.0
    assert child.stdout is not None
    for line in child.stdout:
        if (event := _event(line)) is None:
            if line.strip():
                last.append(redact(printable(line.rstrip())))
                say(last[-1])
            continue
        if watch:
            watch.on_event(event)
        if "measured" in event:
            continue
        percent = 100 * event["step"] / event["of"]
        if percent >= said + LOG_EVERY or percent < said or event["step"] == event["of"]:
            said = percent
            say(printable(f"{event['stage']}: {event['step']}/{event['of']}  {event['text']}"))


def _event(line: str) -> dict[str, Any] | None:
    """What a stage tells a flow in a line; None for words, also for those that only begin like an event: another rank may have written into it."""
    try:
        told = json.loads(line[2:]) if line.startswith("@@") else {}
        is_step = isinstance(told["stage"], str) and isinstance(told["text"], str) and 0 <= told["step"] <= told["of"] and 0 < told["of"] < MOST
        return told if is_step else None
    except KeyError:
        return told if isinstance(told.get("measured"), dict) and isinstance(told["measured"].get("step"), int) else None
    except (ValueError, TypeError, RecursionError):
        return None
