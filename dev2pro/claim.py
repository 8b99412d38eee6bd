"""Who may work in a stage's folder: claims it for one configuration, and knows what is begun, finished, or another's."""

from pathlib import Path
from typing import Any

from dev2pro import artifact
from dev2pro.artifact import Artifact
from dev2pro.errors import ConfigError

STARTED = {artifact.CONFIG, "config.partial", "metrics.jsonl", "train.snapshot", "heldout.snapshot"}  # what a run has written before it made anything


def begun(out: str) -> bool:
    """Whether a run has made something in `out`; if not, whoever comes next may have the folder."""
    folder = Path(out)
    return folder.is_dir() and bool({f.name for f in folder.iterdir()} - STARTED)


def begin(out: str, stage: str, config: Any, parents: artifact.Parents) -> Artifact | None:
    """Claims the folder `out` for one configuration.

    Returns the finished artifact if this configuration with these parents already made it and its files are whole; None when
    there is work to do, begun or not. Raises ConfigError when the folder belongs to another configuration.
    """
    folder = Path(out)
    claim = {"stage": stage, "config": artifact.identity(config), "parents": {role: known for role, (_, known) in artifact.known(parents).items()}}
    there = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if begun(out):
        if artifact.CONFIG not in there:
            raise ConfigError(f"out={out} is not empty and no stage of dev2pro wrote it. Choose another out=, or empty that folder.")
        _refuse_other(out, artifact.read_json(folder / artifact.CONFIG), claim)
        return _finished(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if artifact.CONFIG not in there or artifact.read_json(folder / artifact.CONFIG) != claim:  # the other ranks of a run find it written
        artifact.write_json(folder / artifact.CONFIG, claim)
    return None


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
    if not (folder / artifact.RECORD).is_file():
        return None
    found = artifact.read(str(folder))
    artifact.sweep(folder)
    whole = all((folder / f["path"]).is_file() and artifact.entry(folder, folder / f["path"]) == f for f in found.files)
    return found if whole else None


def stands(out: str, command: list[str]) -> Artifact | None:
    """The finished artifact in `out` if this very command made it, from conf/ and parents that are still the same, and it is whole.

    What lets a flow skip a stage without starting a process. None means: start the stage, it knows.
    """
    made = artifact.origin(out)
    if made is None or (made.command, made.conf) != (command, artifact.conf_digest()):
        return None
    if any(artifact.state(path) != was for path, was in made.watched.items()):
        return None
    if any(artifact.fingerprint(p["uri"]) != p["id"] for p in made.parents if not p["role"].startswith(artifact.DATA)):
        return None
    return _finished(Path(out))
