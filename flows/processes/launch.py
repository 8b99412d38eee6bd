"""Starts a stage as a process, forwards its output and progress to Prefect, and returns its artifact."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import INTERRUPTED, TryAgainError
from dev2pro.escape import printable
from dev2pro.redact import redact
from flows.processes import gpu_slots, liveness, trust
from flows.processes.gpu_slots import Slots
from flows.ui.progress import ProgressReporter

GRACE = 25.0  # seconds a cancelled flow waits for its stages; Prefect kills it after 30
GRACE_ARG = "checkpoint.grace=600"  # a stage may take longer to save and outlive its flow
CHECKPOINTING = ("recover", "lora", "distill")
ERROR_LINES = 20  # of a stage's last output in an error
LOG_EVERY = 10  # percent between two lines of progress in the log
MAX_STEPS = 1 << 53  # a larger number of steps is no valid event
_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class StageFailed(RuntimeError):
    """A stage ended with an exit code other than 0, kept in `exit_code`; the message holds its last output."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def should_retry(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether to retry a stage: only for the exit code of TryAgainError."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, StageFailed) and failure.exit_code == TryAgainError.exit_code


RETRY_OPTIONS: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [10, 60, 600], "retry_jitter_factor": 0.2, "retry_condition_fn": should_retry}


def launch(stage: str, args: list[str], out: str, processes: int = 1) -> Artifact:
    """Runs `python -m stages.<stage> <args>` (under torchrun's ranks for several processes) and returns the artifact in `out`.

    A finished artifact made by the same command is returned at once. Raises StageFailed.
    """
    log, folder = get_run_logger(), ROOT / out
    args = [*args, GRACE_ARG] if stage in CHECKPOINTING else args
    if artifact := run_folder.up_to_date(str(folder), args):
        log.info("%s: finished before, skipped", out)
        return artifact
    starter = ["-m", "dev2pro.ranks", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    with ExitStack() as afterwards, gpu_slots.acquire(processes, f"{stage} {out}", _stopping.is_set, log.info) as slots:
        if slots is None:
            raise StageFailed(f"{stage} was stopped before it began", INTERRUPTED)
        log.info(redact(printable(f"python -m stages.{stage} {' '.join(args)}")))
        reporter = ProgressReporter(f"{stage} {out}", folder, log.warning)
        afterwards.callback(reporter.end)  # takes seconds, during which another stage can have the slots
        _run_process(stage, [*starter, "-m", f"stages.{stage}", *args], slots, reporter, log.info)
    return record.read(str(folder))


def command(module: str, args: list[str], handles: tuple[int, ...] = ()) -> None:
    """Runs `python -m <module> <args>`, a cheap command that needs no slot. It inherits the handles. Raises StageFailed."""
    log = get_run_logger()
    log.info(redact(printable(f"python -m {module} {' '.join(args)}")))
    _run_process(module, ["-m", module, *args], Slots(handles, {}), None, log.info)


@contextmanager
def run_context() -> Iterator[None]:
    """Context of everything a flow launches: marks the flow as alive, and stops its stages when it fails or is cancelled.

    A stage that is still saving after GRACE seconds is left running.
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


def _run_process(name: str, args: list[str], slots: Slots, reporter: ProgressReporter | None, log: Callable[[str], None]) -> None:
    """Runs Python with these arguments to its end. Raises StageFailed with its last output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DEV2PRO_"))} | slots.environment | {
        "DEV2PRO_EVENTS": "1", "DEV2PRO_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, pass_fds=slots.handles,
    )  # fmt: skip
    with _lock:
        _running.add(child)
    last_lines = deque[str](maxlen=ERROR_LINES)
    reader = threading.Thread(
        target=_forward_output, args=[child, reporter, log, last_lines], daemon=True
    )  # keeps reading while the flow is cancelled
    reader.start()
    try:
        code = child.wait()
    except BaseException:  # the flow is being cancelled; the log still gets the stage's output
        _stop(GRACE)
        raise
    reader.join(GRACE)
    with _lock:
        _running.discard(child)
    if code:
        raise StageFailed(f"{name} ended with exit code {code}: {' '.join(last_lines) or 'it said nothing'}", code)


def _forward_output(child: subprocess.Popen, reporter: ProgressReporter | None, log: Callable[[str], None], last_lines: deque[str]) -> None:
    logged_percent = 0.0
    assert child.stdout is not None
    for line in child.stdout:
        if (event := _parse_event(line)) is None:
            if line.strip():
                last_lines.append(redact(printable(line.rstrip())))
                log(last_lines[-1])
            continue
        if reporter:
            reporter.on_event(event)
        if "measured" in event:
            continue
        percent = 100 * event["step"] / event["of"]
        if percent >= logged_percent + LOG_EVERY or percent < logged_percent or event["step"] == event["of"]:
            logged_percent = percent
            log(printable(f"{event['stage']}: {event['step']}/{event['of']}  {event['text']}"))


def _parse_event(line: str) -> dict[str, Any] | None:
    """The event in a line of a stage's output; None for other lines, also malformed events: another rank may have written into the line."""
    try:
        event = json.loads(line[2:]) if line.startswith("@@") else {}
        is_step = (
            isinstance(event["stage"], str) and isinstance(event["text"], str) and 0 <= event["step"] <= event["of"] and 0 < event["of"] < MAX_STEPS
        )
        return event if is_step else None
    except KeyError:
        return event if isinstance(event.get("measured"), dict) and isinstance(event["measured"].get("step"), int) else None
    except (ValueError, TypeError, RecursionError):
        return None
