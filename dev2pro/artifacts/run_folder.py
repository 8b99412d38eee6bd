"""Who may work in a stage's folder: claims it for one configuration, and knows what is begun, finished, or another's."""

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record, verify
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.escape import printable

# what a run has written before it made anything
STARTED = {record.CONFIG, record.PREVIEWS, "metrics.jsonl", "train.snapshot", "heldout.snapshot"}
PATIENCE = 5.0  # seconds to wait for a folder that is in use
ELSEWHERE = ("ledger", "publish")  # keys of what a stage does besides its artifact: only it knows whether that is done


def has_output(out: str) -> bool:
    """Whether a run has made something in `out`; if not, whoever comes next may have the folder."""
    folder = Path(out)
    return folder.is_dir() and any(f.name not in STARTED and f.suffix != ".partial" for f in folder.iterdir())


def acquire(out: str, stage: str, config: Any, parents: record.Parents) -> Artifact | None:
    """Claims the folder `out` for one configuration, and on the first rank holds it until `release` or the end of the process.

    Returns the finished artifact if this configuration with these parents already made it and its files are whole; None when
    there is work to do: new, begun, or more `steps` than a finished or begun run had. Raises ConfigError when the folder belongs to another
    configuration, TryAgainError while another process works in it.
    """
    folder = Path(out)
    claim = {"stage": stage, "config": record.identity(config), "parents": {role: known for role, (_, known) in record.known(parents).items()}}
    folder.mkdir(parents=True, exist_ok=True)
    _hold(folder)
    if not has_output(out):
        if not (folder / record.CONFIG).exists() or record.read_json(folder / record.CONFIG) != claim:  # other ranks find it written
            record.write_json(folder / record.CONFIG, claim)
        return None
    if not (folder / record.CONFIG).is_file():
        raise ConfigError(f"out={out} is not empty and no stage of dev2pro wrote it. Choose another out=, or empty that folder.")
    there = record.read_json(folder / record.CONFIG)
    if _extends(there, claim):
        _extend(folder, there["config"]["steps"], claim)
        return None
    _refuse_other(out, there, claim)
    return _finished(folder)


def _extends(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a run differs from the one in the folder by more steps and nothing else."""
    before, now = (claim.get("config", {}).get("steps", 0) for claim in (there, here))
    return now > before and there == {**here, "config": {**here["config"], "steps": before}}


def _extend(folder: Path, before: int, claim: dict[str, Any]) -> None:
    finished = (folder / record.RECORD).is_file()
    if finished and not any(record.CHECKPOINT.fullmatch(place.name) for place in folder.iterdir()):
        raise ConfigError(f"out={folder} has finished {before} steps, and the checkpoint it would go on from was removed. Choose another out=.")
    record.write_json(folder / record.CONFIG, claim)
    what = "the finished run" if finished else "the run"
    print(
        f"extending {what} from {before} to {claim['config']['steps']} steps; a learning rate that falls with them falls more slowly now", flush=True
    )


_held: dict[str, int] = {}  # folder -> open handle with the lock


def lock(folder: Path) -> int | None:
    """An open handle on the folder, which is this process's until it is closed; None while another process has it.

    There is no file to be left behind, and the system lifts the lock when the process dies, however it does.
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


def _hold(folder: Path) -> None:
    """Waits a moment for a run that was killed to be gone."""
    name, patience = os.path.realpath(folder), time.monotonic() + PATIENCE
    if name in _held or os.environ.get("RANK", "0") != "0":
        return
    while (handle := lock(folder)) is None:
        if time.monotonic() > patience:
            raise TryAgainError(f"Another process works in out={folder}. Wait for it or stop it, or choose another out=.")
        time.sleep(0.1)
    _held[name] = handle


def release() -> None:
    """Lets go of every folder that this process holds."""
    while _held:
        os.close(_held.popitem()[1])


def _refuse_other(out: str, there: dict, here: dict) -> None:
    changed = [f"{key} is {old} there and {new} here" for key, old, new in _differences(_flat(there), _flat(here))]
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


def _differences(there: dict, here: dict) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*there, *here])
    return [(k.removeprefix("config."), there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]


def _finished(folder: Path) -> Artifact | None:
    found = record.read_if_artifact(str(folder))
    return found if found and not any(verify.find_problems(found)) else None


def up_to_date(out: str, command: list[str]) -> Artifact | None:
    """The finished artifact in `out` if this very command made it, from conf/ and parents that are still the same, and it is whole.

    What lets a flow skip a stage without starting a process. None means: start the stage, it knows.
    """
    made = record.read_if_artifact(out)
    if made is None or (made.command, made.conf) != (command, record.conf_digest()):
        return None
    if any(word.partition("=")[0] in ELSEWHERE for word in command):
        return None
    if any(record.state(path) != was for path, was in made.watched.items()):
        return None
    if any(record.fingerprint(p["uri"]) != p["id"] for p in made.parents if not p["role"].startswith(record.DATA)):
        return None
    return _finished(Path(out))
