"""Artifacts that nobody needs any more: found by id through the parents of those that are kept, and removed, records first; or only their weights."""

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
    """What may go, what stays, and what had to be guessed."""

    unneeded: list[Artifact] = field(default_factory=list)
    kept: list[Artifact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def artifacts(place: str) -> list[Artifact]:
    """Every finished artifact in a folder and below it, or in a store in s3. Raises ConfigError where there is no such place."""
    where = backends.parse_url(place)
    if where.startswith("s3://"):
        if record.STORED.fullmatch(where):
            return [made] if (made := store.read_record(where.rstrip("/"))) else []
        return list(store.listed(where))
    if not Path(where).is_dir():
        raise ConfigError(f"{place} is no folder. Correct the path.")
    return [made for folder, _, files in os.walk(where) if RECORD in files and (made := _readable(folder))]


def _readable(folder: str) -> Artifact | None:
    try:
        return record.read(folder)
    except ConfigError:
        return None


def plan_gc(folders: list[str], keep: list[str]) -> GcPlan:
    """What lies in `folders` and is neither kept, nor an ancestor of what is kept, nor in use.

    Raises ConfigError for a place to keep that holds no artifact, TryAgainError where a parent's store is not reached: it may have parents here.
    """
    candidates = [made for folder in folders for made in artifacts(folder)]
    wanted = list[Artifact]()
    for place in keep:
        if not (there := artifacts(place)):
            raise ConfigError(f"--keep {place} holds no finished artifact. Correct it: what is not kept would be removed.")
        wanted += there
    candidates = list({_absolute(made): made for made in candidates}.values())
    begun = needed(folders)
    wanted += [made for made in candidates if begun(made) or _in_use(made)]
    return _reached(candidates, wanted)


def needed(folders: list[str]) -> Callable[[Artifact], bool]:
    """Whether an unfinished run in one of these folders was given an artifact, by its id or by a place in it: it needs that to go on."""
    begun = {word for folder in folders for word in _unfinished(folder)}
    return lambda made: made.id in begun or any(_at_or_below(one, made) for one in begun)


def _reached(candidates: list[Artifact], wanted: list[Artifact]) -> GcPlan:
    """Goes up from what is wanted, by id, and by place where a record names a file in an artifact's folder or another artifact lies in it."""
    known = {made.id: made for made in [*candidates, *wanted]}
    found, ids, seen = GcPlan(), set[str](), set[str]()
    todo = list(wanted)
    while todo:
        made = todo.pop()
        if _absolute(made) in seen:
            continue
        seen.add(_absolute(made))
        ids.add(made.id)
        for parent in lineage.parents(made, known):
            ids.add(parent.id)
            if parent.state == lineage.AWAY:
                raise TryAgainError(f"{parent.uri}, which {made.uri} was made from, is not reached, and may itself need what lies here. Try again.")
            if parent.state == lineage.GONE and not parent.role.startswith(record.DATA):
                found.notes.append(f"{made.uri} was made from {parent.uri} ({parent.id[:12]}), which is gone: what that was made from is not known.")
            todo += [parent.made] if parent.made else []
        named = [place for place in _places(made) if place != _absolute(made)]
        todo += [one for one in candidates if one.id in ids or _below(_absolute(one), made) or any(_below(place, one) for place in named)]
    found.kept = [made for made in candidates if _absolute(made) in seen]
    found.unneeded = [made for made in candidates if _absolute(made) not in seen]
    return found


def _places(made: Artifact) -> list[str]:
    """Where on this machine an artifact's record says that something lies that it was made from."""
    uris = [place for parent in made.parents for place in parent["uri"].split(", ")]
    return [_real(place) for place in (*uris, *made.watched) if "://" not in place]


def _below(place: str, made: Artifact) -> bool:
    return "://" not in place and place.startswith(f"{_absolute(made)}{os.sep}")


def _at_or_below(place: str, made: Artifact) -> bool:
    return _real(place) == _absolute(made) or _below(_real(place), made)


def _absolute(made: Artifact) -> str:
    return _real(made.uri)


def _real(uri: str) -> str:
    return uri if "://" in uri or "\0" in uri else _realpath(os.path.abspath(uri))


_realpath = functools.lru_cache(None)(os.path.realpath)


def _unfinished(place: str) -> Iterator[str]:
    """The ids and the places that runs name which were begun."""
    if backends.parse_url(place).startswith("s3://"):
        return
    for folder, _, files in os.walk(backends.parse_url(place)):
        if CONFIG in files and RECORD not in files and (run := _claim(Path(folder))):
            yield from _words([run["config"], run["parents"]])


def _words(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _words(inner)


def _claim(folder: Path) -> dict | None:
    """The claim of a run on a folder; a model's config.json is none."""
    try:
        values = record.read_json(folder / CONFIG)
    except (ConfigError, OSError):
        return None
    return values if set(values) == CLAIM and isinstance(values["parents"], dict) else None


# ---- removal ----------------------------------------------------------------------------------------------------------------------


def bytes_of(made: Artifact) -> int:
    """What its removal frees: its files, and what an earlier run left in its folder."""
    if "://" in made.uri:
        return sum(one["bytes"] for one in made.files)
    return sum(file.stat().st_size for file in _own(made) if file.is_file())


def remove(made: Artifact) -> list[str]:
    """Takes the record away, then the files it names and what comes and goes beside them. Returns what it left: files that were never part of it."""
    if "://" in made.uri:
        away = backends.open_backend(made.uri)
        for name in (RECORD, *(one["path"] for one in made.files)):
            away.drop(name)
        return []
    folder = Path(made.uri)
    with backends.on_disk(made.uri), _held(folder) as free:
        there = _readable(made.uri)
        if not free or there is None or there.id != made.id:
            return [f"{folder}: in use, or changed meanwhile"]
        own = _own(made)
        (folder / RECORD).unlink()
        for file in own:
            file.unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for place in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
            _prune(place)
        _prune(folder)
        return [str(file) for file in sorted(folder.rglob("*")) if file.is_file()] if folder.exists() else []


def prune(made: Artifact) -> tuple[int, str]:
    """Removes weights and checkpoints, and notes which before it does. Returns (bytes freed, why nothing was done)."""
    folder = Path(made.uri)
    with backends.on_disk(made.uri), _held(folder) as free:
        if not free:
            return 0, "it is in use"
        gone = [file for file in _own(made) if file.name.endswith(WEIGHTS) or file.relative_to(folder).parts[0].startswith("checkpoint-")]
        size = sum(file.stat().st_size for file in gone)
        weights = [one["path"] for one in made.files if one["path"].endswith(WEIGHTS)]
        record.write_json(folder / record.PRUNED, {"files": weights, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        for file in gone:
            file.unlink(missing_ok=True)
        record.remove_temporary(folder, keep=0)
    return size, ""


def _own(made: Artifact) -> list[Path]:
    """The files that are an artifact's alone: those of its record, bar what lies in folders of other artifacts and runs, and leftovers."""
    folder = Path(made.uri)
    others = {place for place, _, files in os.walk(folder) if place != str(folder) and (RECORD in files or (CONFIG in files and _claim(Path(place))))}
    named = [folder / one["path"] for one in made.files]
    leftovers = [file for top in folder.iterdir() if record.TRANSIENT.match(top.name) for file in ([top] if top.is_file() else top.rglob("*"))]
    return [
        file
        for file in dict.fromkeys([*named, *leftovers])
        if (file.is_file() or file.is_symlink()) and verify.leads_inside(folder, file.parent) and not others & {str(p) for p in file.parents}
    ]


def _prune(place: Path) -> None:
    if not any(place.iterdir()):
        place.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether the folder is this process's for now, as runs hold theirs."""
    handle = run_folder.lock(folder)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _in_use(made: Artifact) -> bool:
    if "://" in made.uri:
        return False
    with _held(Path(made.uri)) as free:
        return not free
