"""Garbage collection: finds artifacts not reachable from the kept ones, removes them record first, or prunes only their weights."""

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev2pro.artifacts import backends, lineage, record, run_folder, store, verify
from dev2pro.artifacts.record import CONFIG, RECORD, Artifact
from dev2pro.errors import ConfigError, TryAgainError

CLAIM = {"stage", "config", "parents"}  # the keys of a run's config.json
WEIGHTS = ".safetensors"


@dataclass
class GcPlan:
    """Artifacts to remove, artifacts to keep, and notes on parents that are unknown."""

    unneeded: list[Artifact] = field(default_factory=list)
    kept: list[Artifact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def artifacts(url: str) -> list[Artifact]:
    """Every finished artifact in a folder and below it, or in a store in s3. Raises ConfigError if the folder does not exist."""
    root = backends.parse_url(url)
    if root.startswith("s3://"):
        if record.STORED.fullmatch(root):
            return [artifact] if (artifact := store.read_record(root.rstrip("/"))) else []
        return list(store.list_store(root))
    if not Path(root).is_dir():
        raise ConfigError(f"{url} is no folder. Correct the path.")
    return [artifact for folder, _, files in os.walk(root) if RECORD in files and (artifact := _readable(folder))]


def _readable(folder: str) -> Artifact | None:
    try:
        return record.read(folder)
    except ConfigError:
        return None


def plan_gc(folders: list[str], keep: list[str]) -> GcPlan:
    """Finds the artifacts in `folders` that are neither in `keep`, nor ancestors of those, nor in use.

    Raises ConfigError for a path to keep that holds no artifact, TryAgainError if a parent's store is unreachable: it may have parents here.
    """
    candidates = [artifact for folder in folders for artifact in artifacts(folder)]
    roots = list[Artifact]()
    for url in keep:
        if not (matches := artifacts(url)):
            raise ConfigError(f"--keep {url} holds no finished artifact. Correct it: what is not kept would be removed.")
        roots += matches
    candidates = list({_real_uri(artifact): artifact for artifact in candidates}.values())
    is_needed = needed(folders)
    roots += [artifact for artifact in candidates if is_needed(artifact) or _in_use(artifact)]
    return _trace(candidates, roots)


def needed(folders: list[str]) -> Callable[[Artifact], bool]:
    """Returns a test whether an unfinished run in these folders uses an artifact as input, by id or path; it needs that to continue."""
    inputs = {text for folder in folders for text in _unfinished_inputs(folder)}
    return lambda artifact: artifact.id in inputs or any(_is_at_or_below(text, artifact) for text in inputs)


def _trace(candidates: list[Artifact], roots: list[Artifact]) -> GcPlan:
    """Follows parents up from the roots: by id, and by path where a record names a file in an artifact's folder or an artifact is nested in it."""
    by_id = {artifact.id: artifact for artifact in [*candidates, *roots]}
    plan, ids, seen = GcPlan(), set[str](), set[str]()
    todo = list(roots)
    while todo:
        artifact = todo.pop()
        if _real_uri(artifact) in seen:
            continue
        seen.add(_real_uri(artifact))
        ids.add(artifact.id)
        for parent in lineage.parents(artifact, by_id):
            ids.add(parent.id)
            if parent.state == lineage.UNREACHABLE:
                raise TryAgainError(
                    f"{parent.uri}, which {artifact.uri} was made from, is not reached, and may itself need what lies here. Try again."
                )
            if parent.state == lineage.GONE and not parent.role.startswith(record.DATA):
                plan.notes.append(
                    f"{artifact.uri} was made from {parent.uri} ({parent.id[:12]}), which is gone: what that was made from is not known."
                )
            todo += [parent.artifact] if parent.artifact else []
        inputs = [path for path in _input_paths(artifact) if path != _real_uri(artifact)]
        todo += [c for c in candidates if c.id in ids or _is_below(_real_uri(c), artifact) or any(_is_below(path, c) for path in inputs)]
    plan.kept = [artifact for artifact in candidates if _real_uri(artifact) in seen]
    plan.unneeded = [artifact for artifact in candidates if _real_uri(artifact) not in seen]
    return plan


def _input_paths(artifact: Artifact) -> list[str]:
    """Local paths of an artifact's inputs, from its record."""
    uris = [path for parent in artifact.parents for path in parent["uri"].split(", ")]
    return [_resolve(path) for path in (*uris, *artifact.watched) if "://" not in path]


def _is_below(path: str, artifact: Artifact) -> bool:
    return "://" not in path and path.startswith(f"{_real_uri(artifact)}{os.sep}")


def _is_at_or_below(path: str, artifact: Artifact) -> bool:
    return _resolve(path) == _real_uri(artifact) or _is_below(_resolve(path), artifact)


def _real_uri(artifact: Artifact) -> str:
    return _resolve(artifact.uri)


def _resolve(uri: str) -> str:
    return uri if "://" in uri or "\0" in uri else _realpath(os.path.abspath(uri))


_realpath = functools.lru_cache(None)(os.path.realpath)


def _unfinished_inputs(path: str) -> Iterator[str]:
    """Every string in the configurations and parents of unfinished runs: ids and paths of their inputs are among them."""
    if backends.parse_url(path).startswith("s3://"):
        return
    for folder, _, files in os.walk(backends.parse_url(path)):
        if CONFIG in files and RECORD not in files and (run := _claim(Path(folder))):
            yield from _strings([run["config"], run["parents"]])


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _claim(folder: Path) -> dict | None:
    """The claim of a run on a folder; None for a model's config.json."""
    try:
        values = record.read_json(folder / CONFIG)
    except (ConfigError, OSError):
        return None
    return values if set(values) == CLAIM and isinstance(values["parents"], dict) else None


# ---- removal ----------------------------------------------------------------------------------------------------------------------


def bytes_of(artifact: Artifact) -> int:
    """Bytes that removal frees: the artifact's files, and leftovers of an earlier run in its folder."""
    if "://" in artifact.uri:
        return sum(entry["bytes"] for entry in artifact.files)
    return sum(file.stat().st_size for file in _owned_files(artifact) if file.is_file())


def remove(artifact: Artifact) -> list[str]:
    """Deletes the record, then the files it lists and transient ones. Returns the files that remain, which were never part of it."""
    if "://" in artifact.uri:
        backend = backends.open_backend(artifact.uri)
        for name in (RECORD, *(entry["path"] for entry in artifact.files)):
            backend.delete(name)
        return []
    folder = Path(artifact.uri)
    with backends.translate_os_errors(artifact.uri), _locked(folder) as locked:
        current = _readable(artifact.uri)
        if not locked or current is None or current.id != artifact.id:
            return [f"{folder}: in use, or changed meanwhile"]
        owned = _owned_files(artifact)
        (folder / RECORD).unlink()
        for file in owned:
            file.unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for subfolder in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
            _remove_if_empty(subfolder)
        _remove_if_empty(folder)
        return [str(file) for file in sorted(folder.rglob("*")) if file.is_file()] if folder.exists() else []


def prune(artifact: Artifact) -> tuple[int, str]:
    """Removes weights and checkpoints, after it has written down which. Returns (bytes freed, why nothing was done)."""
    folder = Path(artifact.uri)
    with backends.translate_os_errors(artifact.uri), _locked(folder) as locked:
        if not locked:
            return 0, "it is in use"
        files = [f for f in _owned_files(artifact) if f.name.endswith(WEIGHTS) or f.relative_to(folder).parts[0].startswith("checkpoint-")]
        size = sum(file.stat().st_size for file in files)
        weights = [entry["path"] for entry in artifact.files if entry["path"].endswith(WEIGHTS)]
        record.write_json(folder / record.PRUNED, {"files": weights, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        for file in files:
            file.unlink(missing_ok=True)
        record.remove_temporary(folder, keep=0)
    return size, ""


def _owned_files(artifact: Artifact) -> list[Path]:
    """The files of an artifact's record and leftovers, except those in folders of other artifacts and runs."""
    folder = Path(artifact.uri)
    others = {path for path, _, files in os.walk(folder) if path != str(folder) and (RECORD in files or (CONFIG in files and _claim(Path(path))))}
    named = [folder / entry["path"] for entry in artifact.files]
    leftovers = [file for top in folder.iterdir() if record.TRANSIENT.match(top.name) for file in ([top] if top.is_file() else top.rglob("*"))]
    return [
        file
        for file in dict.fromkeys([*named, *leftovers])
        if (file.is_file() or file.is_symlink()) and verify.leads_inside(folder, file.parent) and not others & {str(p) for p in file.parents}
    ]


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks the folder as a run does; yields whether that worked."""
    handle = run_folder.lock(folder)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _in_use(artifact: Artifact) -> bool:
    if "://" in artifact.uri:
        return False
    with _locked(Path(artifact.uri)) as locked:
        return not locked
