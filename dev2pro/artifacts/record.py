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
CONFIG = "config.json"  # which run a folder belongs to; written when the run starts
PRUNED = "pruned.json"  # which files of a finished artifact were removed on purpose, to make room
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # a folder
CELLS = "cells"  # folder of an evaluation's sampled pictures
TRANSIENT = re.compile(rf"(artifact|pruned)\.json$|checkpoint-|{CELLS}(/|$)|.*\.(partial|lock)$")  # in a stage's folder, but not part of its artifact
PREVIEWS = "previews"  # folder of preview sheets sampled during training
STEPS = "steps"  # folder of the LoRAs of intermediate steps, a folder each
REPORT, FACTS = "data.html", "data.json"  # the report on the data of a training stage: for people, and for programs
# logs, snapshots, previews, LoRAs of steps, what the data holds; indexes, which hold the time of their tar; the id of a snapshot is among the parents
EXCLUDED_FROM_ID = re.compile(rf".*\.(jsonl|log|snapshot)$|{PREVIEWS}/|{STEPS}/|data\.(html|json)$|\d{{6}}\.tar\.index$")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
DATA = "data."  # prefix of the roles of data snapshots; `data/` computes their ids, and `watched` detects changes
ROOT = Path(__file__).resolve().parents[2]
LARGEST = 16 << 20  # bytes of a record
HASH = re.compile(r"[0-9a-f]{64}")  # SHA-256
STORED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*/([0-9a-f]{64})/?")  # an artifact's URL in a store


@dataclass(frozen=True)
class Artifact:
    """The result of a stage. `id` is a hash of the contents; `parents` are (role, uri, id); `inference` is a LoRA's contract."""

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
    watched: dict[str, Any] = field(default_factory=dict)  # local input files and folders -> their state at that time; not part of the id
    schema: int = SCHEMA
    uri: str = ""  # where it was read from; not part of the record


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(path: str) -> str:
    """The identity of a parent: an artifact's id, a hash of a folder's or file's names, sizes and contents, or the hub id unchanged."""
    if stored := STORED.fullmatch(path):
        return stored[1]
    target = Path(path)
    if (target / RECORD).is_file():
        return read(path).id
    if not target.exists():
        return path
    files = sorted(f for f in target.rglob("*") if f.is_file()) if target.is_dir() else [target]
    return digest([[str(f.relative_to(target)), f.stat().st_size, _head_hash(f)] for f in files])


def _head_hash(file: Path) -> str:
    """SHA-256 of the first 16 MiB: pictures and configs whole; of big weights the header, which names every tensor, and some weights."""
    with file.open("rb") as f:
        return hashlib.sha256(f.read(1 << 24)).hexdigest()


Parents = Mapping[str, str | tuple[str, str]]  # role -> path, or (path, id) where the id is known


def with_ids(parents: Parents) -> dict[str, tuple[str, str]]:
    """role -> (path, id) of every parent."""
    return {role: (value, fingerprint(value)) if isinstance(value, str) else value for role, value in parents.items()}


def identity(config: Any) -> dict[str, Any]:
    """A config as JSON values, without `out` and the fields with identity=False, which do not change the result.

    A field with identity="if set" is left out while it has its default, so that a new key changes no id of earlier runs.
    """
    values = {
        field.name: identity(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
        if field.name != "out"
        and (rule := field.metadata.get("identity", True))
        and (rule != "if set" or getattr(config, field.name) != _default(field))
    }
    return json.loads(json.dumps(values))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def compute_id(kind: str, stage: str, config_digest: str, parents: list[dict[str, str]], files: list[dict[str, Any]]) -> str:
    """The id of an artifact: a hash of its kind, stage, config, parents and file contents."""
    content = [f for f in files if not EXCLUDED_FROM_ID.match(f["path"])]
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
    """Records everything under `out` as finished: removes temporary files, hashes the others, then writes `artifact.json` by rename.

    `watched`: local files and folders; when one changes, the stage runs its checks again (see `run_folder.up_to_date`).
    """
    folder = Path(out)
    remove_temporary(folder)  # before the record is written: a folder with a record no longer changes
    files = [entry(folder, f) for f in sorted(folder.rglob("*")) if f.is_file() and is_valid_name(str(f.relative_to(folder)))]
    settings = identity(config)
    parent_entries = [{"role": role, "uri": uri, "id": id} for role, (uri, id) in with_ids(parents).items()]
    artifact = Artifact(
        kind=kind,
        stage=stage,
        id=compute_id(kind, stage, digest(settings), parent_entries, files),
        config=settings,
        config_digest=digest(settings),
        parents=parent_entries,
        step=step,
        metrics=metrics,
        files=files,
        inference=inference or {},
        command=[arg for arg in sys.argv[1:] if not arg.startswith("hydra")],
        conf=conf_digest(),
        git_revision=_revision(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        watched={path: state(path) for path in watched},
    )
    values = dataclasses.asdict(artifact)
    values.pop("uri")
    write_json(folder / RECORD, values)
    return dataclasses.replace(artifact, uri=out)


def remove_temporary(folder: Path, keep: int = 1) -> None:
    """Removes all but the `keep` newest checkpoints of a finished run, and leftovers of killed runs. The newest allows training for more steps."""
    checkpoints = sorted((int(name[1]), checkpoint) for checkpoint in folder.iterdir() if (name := CHECKPOINT.fullmatch(checkpoint.name)))
    for _, checkpoint in checkpoints[: len(checkpoints) - keep]:
        renamed = checkpoint.with_name(f"{checkpoint.name}-old.partial")  # a folder named checkpoint-N is always complete
        shutil.rmtree(renamed, ignore_errors=True)
        checkpoint.rename(renamed)
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def invalidate(out: str) -> None:
    """Removes the record, so the folder is no artifact until `write`. Call before overwriting files of a finished one."""
    for name in (RECORD, PRUNED):
        (Path(out) / name).unlink(missing_ok=True)


def pruned(path: str) -> frozenset[str]:
    """The files of an artifact that were removed on purpose (see `gc.prune`); its record stays for the lineage of its descendants."""
    note = Path(path) / PRUNED
    return frozenset(map(str, read_json(note).get("files", ()))) if note.is_file() else frozenset()


def publish(accelerator: Any, out: str, stage: str, kind: str, config: Any, parents: Parents, **what: Any) -> Artifact:
    """Waits for all ranks, calls `write` on the main process and returns the record on every rank. `accelerator` is accelerate's."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write(out, stage, kind, config, parents, **what)
    accelerator.wait_for_everyone()
    return read(out)


def read(path: str) -> Artifact:
    """The artifact in a folder. Raises ConfigError if there is none or its record has another schema."""
    record_file = Path(path) / RECORD
    if not record_file.is_file():
        raise ConfigError(f"{path} is no finished artifact: {record_file} is missing. Run the stage that makes it, or correct the path.")
    return parse(read_json(record_file), str(record_file), str(path))


def parse(values: dict[str, Any], name: str, uri: str) -> Artifact:
    """Builds the artifact from a record's values, which are untrusted. Raises ConfigError, naming `name`, for malformed values."""
    if values.get("schema") != SCHEMA:
        raise ConfigError(f"{name} has schema {str(values.get('schema'))[:20]}; this version reads schema {SCHEMA}. Make it again.")
    try:
        artifact = Artifact(**{**values, "uri": uri})
        problem = _format_problem(artifact)
    except (TypeError, KeyError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"{name} is damaged ({problem}). Remove the folder and make it again.")
    return artifact


def _format_problem(artifact: Artifact) -> str:
    """Describes the first malformed field of a record; empty if there is none."""
    for name, hint in get_type_hints(Artifact).items():
        if not isinstance(getattr(artifact, name), kind := get_origin(hint) or hint):
            return f"{name} is no {kind.__name__}"
    if not HASH.fullmatch(artifact.id):
        return "its id is no SHA-256"
    if not all(isinstance(p, dict) and all(isinstance(p[key], str) for key in ("role", "uri", "id")) for p in artifact.parents):
        return "parents are (role, uri, id)"
    for f in artifact.files:
        if not (isinstance(f, dict) and isinstance(f["path"], str) and type(f["bytes"]) is int and f["bytes"] >= 0):
            return "files are (path, bytes, sha256)"
        if not is_valid_name(f["path"]):
            return f"no file of an artifact may be called {f['path'][:80]!r}"
        if not (isinstance(f["sha256"], str) and HASH.fullmatch(f["sha256"])):
            return f"{f['path']} has no SHA-256"
    names = {f["path"] for f in artifact.files}
    if len(names) < len(artifact.files) or any(str(above) in names for name in names for above in PurePosixPath(name).parents):
        return "two files have one name"
    return ""


def is_valid_name(name: str) -> bool:
    """Whether a name is valid for an artifact's file: a relative path inside the folder that is not a transient file."""
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
    """The artifact in a folder, or None if the folder, file or hub id is no dev2pro artifact."""
    return read(path) if (Path(path) / RECORD).is_file() else None


def conf_digest() -> str:
    """SHA-256 over every yaml of conf/: the same command and conf compose the same configuration."""
    return digest([[str(f.relative_to(ROOT)), f.read_text()] for f in sorted((ROOT / "conf").rglob("*.yaml"))])


def state(path: str) -> Any:
    """Size and time of a file; of a folder a digest of those of its files; null for nothing."""
    target = Path(path)
    if target.is_dir():
        return digest([[str(f.relative_to(target)), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(target.rglob("*")) if f.is_file()])
    return [target.stat().st_size, target.stat().st_mtime_ns] if target.is_file() else None


def entry(folder: Path, file: Path) -> dict[str, Any]:
    """A file as the record lists it: path, bytes, sha256."""
    with file.open("rb") as f:
        return {"path": str(file.relative_to(folder)), "bytes": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Writes a temporary file and renames it: a reader sees the old object or the new one."""
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
