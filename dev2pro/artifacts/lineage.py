"""Who comes from whom: an artifact's parents, where they lie today, and whether they are still what they were."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dev2pro.artifacts import record, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DataError, TryAgainError

THERE, CHANGED, GONE, NAMED, AWAY, PRUNED = "there", "changed", "gone", "by name", "not reached", "pruned"
EMPTY: Mapping[str, Artifact] = {}


@dataclass(frozen=True)
class Parent:
    """`state`: there, changed (something else lies there now), gone, by name (a hub id, which is not looked at), not reached (its store),
    pruned (its weights were removed on purpose; its record still tells what it was).
    """

    role: str
    uri: str
    id: str
    state: str
    place: str  # where it was found, which need not be its uri
    made: Artifact | None = None  # what it is, if it is an artifact


def parents(made: Artifact, known: Mapping[str, Artifact] = EMPTY) -> Iterator[Parent]:
    """Every parent that is recorded, found by its id: among the known ones, where it was, beside the artifact, or in the cache."""
    for one in made.parents:
        role, uri, id = one["role"], one["uri"], one["id"]
        state, place, found = _snapshot(uri, id) if role.startswith(record.DATA) else _found(uri, id, made, known)
        yield Parent(role, uri, id, state, place, found)


def _found(uri: str, id: str, made: Artifact, known: Mapping[str, Artifact]) -> tuple[str, str, Artifact | None]:
    if id in known:
        return _whole(known[id].uri), known[id].uri, known[id]
    here = "://" not in uri and Path(uri).exists()
    if here and _identity(uri) == id:
        return _whole(uri), uri, _origin(uri)
    for place in (f"{made.uri.rstrip('/').rpartition('/')[0]}/{id}", f"{store.CACHE}/{id}", uri):
        state, there = _stored(place, id)
        if state != GONE:
            return state, place, there
    return (NAMED if uri == id else CHANGED if here else GONE), uri, None


def _whole(uri: str) -> str:
    return PRUNED if (Path(uri) / record.PRUNED).is_file() else THERE


def _stored(place: str, id: str) -> tuple[str, Artifact | None]:
    """What lies at a place in a store, of this machine or in s3, if it has the id."""
    if not record.HASH.fullmatch(place.rstrip("/").rpartition("/")[2]):
        return GONE, None
    try:
        there = store.read_record(place)
    except TryAgainError:
        return AWAY, None
    except (ConfigError, DataError):
        return GONE, None
    return (THERE, there) if there and there.id == id else (GONE, None)


def _origin(path: str) -> Artifact | None:
    try:
        return record.read_if_artifact(path)
    except ConfigError:
        return None


def _identity(path: str) -> str:
    try:
        return record.fingerprint(path)
    except (ConfigError, OSError):
        return ""


def _snapshot(uri: str, id: str) -> tuple[str, str, None]:
    """A snapshot holds its id; shards, which a stage encoded, are there or not."""
    places = uri.split(", ")
    if any("://" in place for place in places):
        return NAMED, uri, None
    if not all(glob.glob(glob.escape(place)) or glob.glob(place) for place in places):
        return GONE, uri, None
    if not uri.endswith(".snapshot"):
        return THERE, uri, None
    try:
        with safe_open(uri, "numpy") as file:
            held = json.loads(file.metadata()["head"])["id"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        held = ""
    return (THERE if held == id else CHANGED), uri, None


def watched(made: Artifact) -> Iterator[tuple[str, str]]:
    """(path, changed or gone) for what went in from this machine and is not as it was."""
    for path, was in made.watched.items():
        if (now := record.state(path)) != was:
            yield path, GONE if now is None else CHANGED
