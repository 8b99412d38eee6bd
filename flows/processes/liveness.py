"""Which flow runs have a living process on this machine: each holds a lock on a file, which the system lifts when it dies, however it does."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from uuid import UUID

from prefect.runtime import flow_run

from dev2pro.artifacts import run_folder
from dev2pro.artifacts.record import ROOT

FOLDER = ROOT / "runs" / ".flow-runs"


@dataclass(frozen=True)
class RunProcess:
    """A flow run that has begun here. `pid` is 0 when its process is dead."""

    run: UUID
    pid: int


@contextmanager
def this_run() -> Iterator[None]:
    """Within, the flow run of the context counts as alive."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = _file(UUID(flow_run.id))
    file.write_text(json.dumps({"pid": os.getpid(), "server": _server()}))
    handle = run_folder.lock(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def started_runs() -> list[RunProcess]:
    """Flow runs of this process's server that began on this machine and have not ended by themselves."""
    return [life for file in sorted(FOLDER.glob(f"{gethostname()}-*.json")) if (life := _life(file))]


def forget(run: UUID) -> None:
    """A dead one whose state is true now."""
    _file(run).unlink(missing_ok=True)


def _life(file: Path) -> RunProcess | None:
    try:
        run, told = UUID(file.stem.removeprefix(f"{gethostname()}-")), json.loads(file.read_text())
        if told["server"] != _server():
            return None
        if (handle := run_folder.lock(file)) is not None:
            os.close(handle)
            return RunProcess(run, 0)
        return RunProcess(run, int(told["pid"]))
    except (OSError, ValueError, KeyError, TypeError):  # it has just ended, or just begun
        return None


def _server() -> str:
    return os.environ.get("PREFECT_API_URL", "")


def _file(run: UUID) -> Path:
    return FOLDER / f"{gethostname()}-{run}.json"
