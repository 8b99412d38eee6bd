"""Which flow runs have a living process on this machine: each holds a file lock, which the system releases when the process dies."""

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
    """The process of a flow run that started on this machine. `pid` is 0 if it is dead."""

    run_id: UUID
    pid: int


@contextmanager
def this_run() -> Iterator[None]:
    """Marks the current flow run as alive within the context."""
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
    """Flow runs of this process's server that started on this machine and have not removed their lock file."""
    return [process for file in sorted(FOLDER.glob(f"{gethostname()}-*.json")) if (process := _read(file))]


def remove(run_id: UUID) -> None:
    """Removes the lock file of a dead run, once its state on the server is right."""
    _file(run_id).unlink(missing_ok=True)


def _read(file: Path) -> RunProcess | None:
    try:
        run_id, content = UUID(file.stem.removeprefix(f"{gethostname()}-")), json.loads(file.read_text())
        if content["server"] != _server():
            return None
        if (handle := run_folder.lock(file)) is not None:
            os.close(handle)
            return RunProcess(run_id, 0)
        return RunProcess(run_id, int(content["pid"]))
    except (OSError, ValueError, KeyError, TypeError):  # the file is being created or removed
        return None


def _server() -> str:
    return os.environ.get("PREFECT_API_URL", "")


def _file(run_id: UUID) -> Path:
    return FOLDER / f"{gethostname()}-{run_id}.json"
