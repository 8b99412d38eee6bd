"""Locks a stage's folder for one configuration and tells whether its run is new, unfinished, finished or another run's."""

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record, verify
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, TryAgainError, out_of_space
from dev2pro.escape import printable

# files that a run writes before its first result; cells are named after what they depend on, so any run may find them
STARTUP_FILES = {record.CONFIG, record.PREVIEWS, record.CELLS, "metrics.jsonl", "train.snapshot", "heldout.snapshot", record.REPORT, record.FACTS}
LOCK_TIMEOUT = 5.0  # seconds to wait for a folder that is in use
SIDE_EFFECTS = ("ledger", "publish")  # config keys with effects outside the artifact; only the stage can check whether they are done


def has_output(out: str) -> bool:
    """Whether a run has produced output in `out`. If not, another run may use the folder."""
    folder = Path(out)
    return folder.is_dir() and any(f.name not in STARTUP_FILES and f.suffix != ".partial" for f in folder.iterdir())


def acquire(out: str, stage: str, config: Any, parents: record.Parents, *, look: bool = False) -> Artifact | None:
    """Claims the folder `out` for one configuration, and on the first rank locks it until `release` or the end of the process.

    Returns the finished artifact if it has this configuration and these parents and its files are unchanged. Returns None if there is work
    to do: a new run, an unfinished one, or one with more `steps` than before. Raises ConfigError if the folder belongs to another
    configuration, TryAgainError while another process works in it. `look`: only looks, and writes nothing.
    """
    folder = Path(out)
    claim = {"stage": stage, "config": record.identity(config), "parents": {role: id for role, (_, id) in record.with_ids(parents).items()}}
    if look and not folder.is_dir():
        return None
    _make(folder)
    _wait_for_lock(folder)
    if not has_output(out):
        if not look and (not (folder / record.CONFIG).exists() or record.read_json(folder / record.CONFIG) != claim):  # other ranks find it written
            record.write_json(folder / record.CONFIG, claim)
        return None
    if not (folder / record.CONFIG).is_file():
        raise ConfigError(f"out={out} is not empty and no stage of dev2pro wrote it. Choose another out=, or empty that folder.")
    existing = record.read_json(folder / record.CONFIG)
    if _extends(existing, claim):
        _extend(folder, existing["config"]["steps"], claim, look)
        return None
    _refuse_other(out, existing, claim)
    return _finished(folder)


def _extends(existing: dict[str, Any], requested: dict[str, Any]) -> bool:
    """Whether a run differs from the one in the folder only by more steps."""
    before, now = (claim.get("config", {}).get("steps", 0) for claim in (existing, requested))
    return now > before and existing == {**requested, "config": {**requested["config"], "steps": before}}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if out_of_space(error):
            raise
        raise ConfigError(f"out={folder} cannot be made ({error.strerror}). Choose another out=.") from error


def _extend(folder: Path, before: int, claim: dict[str, Any], look: bool) -> None:
    finished = (folder / record.RECORD).is_file()
    if finished and not any(record.CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()):
        raise ConfigError(f"out={folder} has finished {before} steps, and the checkpoint it would go on from was removed. Choose another out=.")
    if not look:
        record.write_json(folder / record.CONFIG, claim)
    what = "the finished run" if finished else "the run"
    print(
        f"extending {what} from {before} to {claim['config']['steps']} steps; a learning rate that falls with them falls more slowly now", flush=True
    )


_locks: dict[str, int] = {}  # folder -> open handle with the lock


def lock(folder: Path) -> int | None:
    """Locks the folder and returns the open handle; closing it releases the lock. None if another process holds it.

    The lock is on the folder itself, so there is no lock file, and the system releases it when the process dies.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        print(
            f"{printable(str(folder))} cannot be locked ({error.strerror}): see to it yourself that no two processes work in it.",
            file=sys.stderr,
            flush=True,
        )
    return handle


def _wait_for_lock(folder: Path) -> None:
    """Locks the folder; waits up to LOCK_TIMEOUT seconds for a killed run to exit."""
    name, deadline = os.path.realpath(folder), time.monotonic() + LOCK_TIMEOUT
    if name in _locks or os.environ.get("RANK", "0") != "0":
        return
    while (handle := lock(folder)) is None:
        if time.monotonic() > deadline:
            raise TryAgainError(f"Another process works in out={folder}. Wait for it or stop it, or choose another out=.")
        time.sleep(0.1)
    _locks[name] = handle


def release() -> None:
    """Releases every folder lock of this process."""
    while _locks:
        os.close(_locks.popitem()[1])


def _refuse_other(out: str, existing: dict, requested: dict) -> None:
    changed = [f"{key} is {old} there and {new} here" for key, old, new in _differences(_flat(existing), _flat(requested))]
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"out={out} holds a run of another configuration ({'; '.join(changed[:3])}{more}). "
            "Choose another out=, or remove that folder if it is no longer needed."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _differences(existing: dict, requested: dict) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*existing, *requested])
    return [(k.removeprefix("config."), existing.get(k), requested.get(k)) for k in keys if existing.get(k) != requested.get(k)]


def _finished(folder: Path) -> Artifact | None:
    artifact = record.read_if_artifact(str(folder))
    return artifact if artifact and not any(verify.find_problems(artifact)) else None


def up_to_date(out: str, command: list[str]) -> Artifact | None:
    """The finished artifact in `out` if it has this command, its conf/ and parents are still the same, and its files are unchanged.

    Lets a flow skip a stage without starting a process. None means: start the stage, which checks in full.
    """
    artifact = record.read_if_artifact(out)
    if artifact is None or (artifact.command, artifact.conf) != (command, record.conf_digest()):
        return None
    if any(arg.partition("=")[0] in SIDE_EFFECTS for arg in command):
        return None
    if any(record.state(path) != recorded for path, recorded in artifact.watched.items()):
        return None
    if any(record.fingerprint(p["uri"]) != p["id"] for p in artifact.parents if not p["role"].startswith(record.DATA)):
        return None
    return _finished(Path(out))
