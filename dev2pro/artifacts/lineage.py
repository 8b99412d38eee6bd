"""Lineage: finds an artifact's parents and checks whether they are unchanged."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dev2pro.artifacts import record, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DataError, TryAgainError

PRESENT, CHANGED, GONE, NAMED, UNREACHABLE, PRUNED = "there", "changed", "gone", "by name", "not reached", "pruned"
EMPTY: Mapping[str, Artifact] = {}


@dataclass(frozen=True)
class Parent:
    """`state`: there, changed (something else has its path now), gone, by name (a hub id, which is not checked), not reached (its store),
    pruned (its weights were removed on purpose; its record is still complete).
    """

    role: str
    uri: str
    id: str
    state: str
    location: str  # the path or URL where it was found, which may differ from its uri
    artifact: Artifact | None = None  # its record, if it is an artifact


def parents(artifact: Artifact, by_id: Mapping[str, Artifact] = EMPTY) -> Iterator[Parent]:
    """Every recorded parent, searched by id: in `by_id`, at its uri, beside the artifact, or in the cache."""
    for parent in artifact.parents:
        role, uri, id = parent["role"], parent["uri"], parent["id"]
        state, location, ancestor = _snapshot_state(uri, id) if role.startswith(record.DATA) else _locate(uri, id, artifact, by_id)
        yield Parent(role, uri, id, state, location, ancestor)


def _locate(uri: str, id: str, artifact: Artifact, by_id: Mapping[str, Artifact]) -> tuple[str, str, Artifact | None]:
    if id in by_id:
        return _present_or_pruned(by_id[id].uri), by_id[id].uri, by_id[id]
    exists = "://" not in uri and Path(uri).exists()
    if exists and _fingerprint(uri) == id:
        return _present_or_pruned(uri), uri, _read_artifact(uri)
    for location in (f"{artifact.uri.rstrip('/').rpartition('/')[0]}/{id}", f"{store.CACHE}/{id}", uri):
        state, candidate = _look_up(location, id)
        if state != GONE:
            return state, location, candidate
    return (NAMED if uri == id else CHANGED if exists else GONE), uri, None


def _present_or_pruned(uri: str) -> str:
    return PRUNED if (Path(uri) / record.PRUNED).is_file() else PRESENT


def _look_up(location: str, id: str) -> tuple[str, Artifact | None]:
    """The artifact at a location in a store, local or s3, if it has the id."""
    if not record.HASH.fullmatch(location.rstrip("/").rpartition("/")[2]):
        return GONE, None
    try:
        artifact = store.read_record(location)
    except TryAgainError:
        return UNREACHABLE, None
    except (ConfigError, DataError):
        return GONE, None
    return (PRESENT, artifact) if artifact and artifact.id == id else (GONE, None)


def _read_artifact(path: str) -> Artifact | None:
    try:
        return record.read_if_artifact(path)
    except ConfigError:
        return None


def _fingerprint(path: str) -> str:
    try:
        return record.fingerprint(path)
    except (ConfigError, OSError):
        return ""


def _snapshot_state(uri: str, id: str) -> tuple[str, str, None]:
    """A snapshot holds its id; encoded shards are only checked for existence."""
    paths = uri.split(", ")
    if any("://" in path for path in paths):
        return NAMED, uri, None
    if not all(glob.glob(glob.escape(path)) or glob.glob(path) for path in paths):
        return GONE, uri, None
    if not uri.endswith(".snapshot"):
        return PRESENT, uri, None
    try:
        with safe_open(uri, "numpy") as file:
            stored_id = json.loads(file.metadata()["head"])["id"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        stored_id = ""
    return (PRESENT if stored_id == id else CHANGED), uri, None


def changed_inputs(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """(path, changed or gone) of each local input that differs from the record."""
    for path, recorded in artifact.watched.items():
        if (current := record.state(path)) != recorded:
            yield path, GONE if current is None else CHANGED
