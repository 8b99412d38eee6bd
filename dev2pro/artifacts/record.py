"""The record stages exchange: a folder with `artifact.json`, written last and atomically. Imports no torch, flows read it too."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_origin, get_type_hints

from dev2pro.errors import ConfigError

SCHEMA = 1
RECORD = "artifact.json"
CONFIG = "config.json"  # which run a folder belongs to, from its start on
PRUNED = "pruned.json"  # which files of a finished artifact were removed on purpose, to make room
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # a folder
TRANSIENT = re.compile(r"(artifact|pruned)\.json$|checkpoint-|.*\.(partial|lock)$")  # under a stage's folder, but no part of what it made
PREVIEWS = "previews"  # the folder with what a model drew while it was trained
UNIDENTIFYING = re.compile(rf".*\.(jsonl|log|snapshot)$|{PREVIEWS}/")  # times, places, looks; what a snapshot pins is among the parents
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
DATA = "data."  # how the roles of snapshots begin: their ids come from the data room, and `watched` says whether they still hold
ROOT = Path(__file__).resolve().parents[2]
LARGEST = 16 << 20  # bytes of a record
HASH = re.compile(r"[0-9a-f]{64}")  # SHA-256
STORED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*/([0-9a-f]{64})/?")  # an artifact's address in a store


@dataclass(frozen=True)
class Artifact:
    """What a stage made. `id` is a hash of the contents; `parents` are (role, uri, id); `inference` is a LoRA's contract."""

    kind: str
    stage: str
    id: str
    config: dict[str, Any]
    config_digest: str
    parents: list[dict[str, str]]
    step: int
    metrics: dict[str, Any]
    files: list[dict[str, Any]]
    inference: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    conf: str = ""  # digest of conf/, which the command was composed with
    git_revision: str = "unknown"
    packages: dict[str, str] = field(default_factory=dict)
    created: str = ""
    watched: dict[str, Any] = field(default_factory=dict)  # local files and folders that went in: state when it was made; no part of the id
    schema: int = SCHEMA
    uri: str = ""  # where it was read from; not part of the record


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(path: str) -> str:
    """The identity of a parent: an artifact's id, a hash of a folder's or file's names, sizes and contents, or a hub id as it stands."""
    if stored := STORED.fullmatch(path):
        return stored[1]
    place = Path(path)
    if (place / RECORD).is_file():
        return read(path).id
    if not place.exists():
        return path
    files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
    return digest([[str(f.relative_to(place)), f.stat().st_size, _head(f)] for f in files])


def _head(file: Path) -> str:
    """SHA-256 of the first 16 MiB: pictures and configs whole; of big weights the header, which names every tensor, and some weights."""
    with file.open("rb") as f:
        return hashlib.sha256(f.read(1 << 24)).hexdigest()


Parents = Mapping[str, str | tuple[str, str]]  # role -> path, or (path, id) where the id is known


def known(parents: Parents) -> dict[str, tuple[str, str]]:
    """role -> (path, id) of every parent."""
    return {role: (one, fingerprint(one)) if isinstance(one, str) else one for role, one in parents.items()}


def identity(config: Any) -> dict[str, Any]:
    """A config as JSON values without `out` and what else does not change what a run makes (fields with identity=False)."""
    values = {
        field.name: identity(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
        if field.name != "out" and field.metadata.get("identity", True)
    }
    return json.loads(json.dumps(values))


def compute_id(kind: str, stage: str, config_digest: str, parents: list[dict[str, str]], files: list[dict[str, Any]]) -> str:
    """The id of an artifact: what it was made from and how, and the contents of its files."""
    content = [f for f in files if not UNIDENTIFYING.match(f["path"])]
    return digest([kind, stage, config_digest, [p["id"] for p in parents], content])


def write(
    out: str,
    stage: str,
    kind: str,
    config: Any,
    parents: Parents,
    *,
    step: int,
    metrics: dict,
    inference: dict | None = None,
    watched: Iterable[str] = (),
) -> Artifact:
    """Records everything under `out` as finished: sweeps it, hashes the files, then writes `artifact.json` by rename.

    `watched`: local files and folders whose change means that the stage must look again (see `stands`).
    """
    folder = Path(out)
    remove_temporary(folder)  # before the record: a folder that has one is at rest
    files = [entry(folder, f) for f in sorted(folder.rglob("*")) if f.is_file() and proper(str(f.relative_to(folder)))]
    asked = identity(config)
    lineage = [{"role": role, "uri": uri, "id": known} for role, (uri, known) in known(parents).items()]
    record = Artifact(
        kind=kind,
        stage=stage,
        id=compute_id(kind, stage, digest(asked), lineage, files),
        config=asked,
        config_digest=digest(asked),
        parents=lineage,
        step=step,
        metrics=metrics,
        files=files,
        inference=inference or {},
        command=[word for word in sys.argv[1:] if not word.startswith("hydra")],
        conf=conf_digest(),
        git_revision=_revision(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        watched={path: state(path) for path in watched},
    )
    values = dataclasses.asdict(record)
    values.pop("uri")
    write_json(folder / RECORD, values)
    return dataclasses.replace(record, uri=out)


def remove_temporary(folder: Path, keep: int = 1) -> None:
    """Removes what a finished run needs no more: all but `keep` checkpoints, the last one for more steps to go on from, and what killed ones left."""
    there = sorted((int(name[1]), place) for place in folder.iterdir() if (name := CHECKPOINT.fullmatch(place.name)))
    for _, place in there[: len(there) - keep]:
        gone = place.with_name(f"{place.name}-old.partial")  # what is called a checkpoint is whole
        shutil.rmtree(gone, ignore_errors=True)
        place.rename(gone)
    for left in folder.glob("*.partial"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def invalidate(out: str) -> None:
    """What is in the folder is no artifact any more, until `write`: before files of a finished one are written over."""
    for name in (RECORD, PRUNED):
        (Path(out) / name).unlink(missing_ok=True)


def pruned(path: str) -> frozenset[str]:
    """The files of an artifact that were removed on purpose (see `unneeded.prune`); its record is kept for the sake of what was made from it."""
    note = Path(path) / PRUNED
    return frozenset(map(str, read_json(note).get("files", ()))) if note.is_file() else frozenset()


def publish(accelerator: Any, out: str, stage: str, kind: str, config: Any, parents: Parents, **what: Any) -> Artifact:
    """`write` on the main process, once every rank is there; every rank gets the record. `place` is accelerate's."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write(out, stage, kind, config, parents, **what)
    accelerator.wait_for_everyone()
    return read(out)


def read(path: str) -> Artifact:
    """The artifact in a folder. Raises ConfigError when there is none or it was written by another schema."""
    record = Path(path) / RECORD
    if not record.is_file():
        raise ConfigError(f"{path} is no finished artifact: {record} is missing. Run the stage that makes it, or correct the path.")
    return parse(read_json(record), str(record), str(path))


def parse(values: dict[str, Any], record: str, uri: str) -> Artifact:
    """The artifact of a record's values, which may be anybody's; `record` names it in the ConfigError for one that is not as `write` makes them."""
    if values.get("schema") != SCHEMA:
        raise ConfigError(f"{record} has schema {str(values.get('schema'))[:20]}; this version reads schema {SCHEMA}. Make it again.")
    try:
        made = Artifact(**{**values, "uri": uri})
        wrong = _malformed(made)
    except (TypeError, KeyError) as error:
        wrong = str(error)
    if wrong:
        raise ConfigError(f"{record} is damaged ({wrong}). Remove the folder and make it again.")
    return made


def _malformed(made: Artifact) -> str:
    """What in a record has another form than `write` gives it, or nothing."""
    for name, hint in get_type_hints(Artifact).items():
        if not isinstance(getattr(made, name), kind := get_origin(hint) or hint):
            return f"{name} is no {kind.__name__}"
    if not HASH.fullmatch(made.id):
        return "its id is no SHA-256"
    if not all(isinstance(p, dict) and all(isinstance(p[key], str) for key in ("role", "uri", "id")) for p in made.parents):
        return "parents are (role, uri, id)"
    for f in made.files:
        if not (isinstance(f, dict) and isinstance(f["path"], str) and type(f["bytes"]) is int and f["bytes"] >= 0):
            return "files are (path, bytes, sha256)"
        if not proper(f["path"]):
            return f"no file of an artifact may be called {f['path'][:80]!r}"
        if not (isinstance(f["sha256"], str) and HASH.fullmatch(f["sha256"])):
            return f"{f['path']} has no SHA-256"
    names = {f["path"] for f in made.files}
    if len(names) < len(made.files) or any(str(above) in names for name in names for above in PurePosixPath(name).parents):
        return "two files have one name"
    return ""


def proper(name: str) -> bool:
    """Whether a file of an artifact may be called so: a relative path that stays in the folder, and nothing that comes and goes there."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts) and not TRANSIENT.match(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError for anything else."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Remove the folder and make it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged (it holds no JSON object). Remove the folder and make it again.")
    return values


def read_if_artifact(path: str) -> Artifact | None:
    """The artifact in a folder, or None where the folder, file or hub id is no artifact of ours."""
    return read(path) if (Path(path) / RECORD).is_file() else None


def conf_digest() -> str:
    """SHA-256 over every yaml of conf/: the same command and conf compose the same configuration."""
    return digest([[str(f.relative_to(ROOT)), f.read_text()] for f in sorted((ROOT / "conf").rglob("*.yaml"))])


def state(path: str) -> Any:
    """Size and time of a file; of a folder a digest of those of its files; null for nothing."""
    place = Path(path)
    if place.is_dir():
        return digest([[str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(place.rglob("*")) if f.is_file()])
    return [place.stat().st_size, place.stat().st_mtime_ns] if place.is_file() else None


def entry(folder: Path, file: Path) -> dict[str, Any]:
    """A file as the record lists it: path, bytes, sha256."""
    with file.open("rb") as f:
        return {"path": str(file.relative_to(folder)), "bytes": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames: a reader finds the old object or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as f:
        json.dump(value, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    partial.rename(path)


def _revision() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
