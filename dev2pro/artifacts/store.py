"""Artifacts in stores, each at <store>/<id>: pushed record last, pulled and verified. A store is a folder, or a place in s3."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dev2pro import s3
from dev2pro.artifacts import backends, record, verify
from dev2pro.artifacts.backends import Backend, ProgressCallback
from dev2pro.artifacts.record import RECORD, Artifact
from dev2pro.errors import ConfigError, DataError, SpaceError
from dev2pro.log import Progress
from dev2pro.s3 import redact_url

CACHE = "runs/cache/artifacts"
MB = 1_000_000
LONG = 100  # MB from which on progress is told


def resolve(path: str) -> str:
    """A path on this machine: an artifact in s3 is pulled, anything else is returned as it is. Raises ConfigError for other addresses."""
    where = backends.parse_url(path)
    return pull(where) if where.startswith("s3://") else where


# ---- push ---------------------------------------------------------------------------------------------------------------------------


def push(out: str, store: str) -> str:
    """Publishes a whole artifact and returns its address. The record goes last, so nobody finds half of one; what is there is not sent again."""
    made = record.read(out)
    known = _states(made)
    with _progress("check", made) as told:
        verify.check(made, told)
    address = f"{backends.parse_url(store).rstrip('/')}/{made.id}"
    target = backends.open_backend(address)
    with _alone(address):
        if _published(target, address):
            return address
        with _progress("push", made) as told:
            _send(made, target, told)
        if _states(made) != known:
            raise DataError(f"{out} changed while it was pushed, and is not published. Push it again once the run in it has come to its end.")
        target.put(Path(out) / RECORD, record.entry(Path(out), Path(out) / RECORD), lambda _done: None)
    return address


def _published(target: Backend, address: str) -> bool:
    """Whether the artifact is there, whole. A record that promises more than is there is taken away before anything else is done."""
    try:
        there = read_record(address)
        if there is None:
            return False
        if not verify.record_mismatch(there) and all(target.holds(one) for one in there.files):
            return True
    except DataError:
        pass
    target.drop(RECORD)
    return False


def _send(made: Artifact, target: Backend, told: ProgressCallback) -> None:
    for before, one in _with_bytes_before(made):
        if not target.holds(one):
            target.put(Path(made.uri) / one["path"], one, _from(before, told))
        told(before + one["bytes"])


def _with_bytes_before(made: Artifact) -> Iterator[tuple[int, dict[str, Any]]]:
    before = 0
    for one in made.files:
        yield before, one
        before += one["bytes"]


def _from(before: int, told: ProgressCallback) -> ProgressCallback:
    return lambda done: told(before + done)


def _states(made: Artifact) -> list[Any]:
    """What changes when somebody writes to the files."""
    return [record.state(str(Path(made.uri) / name)) for name in (RECORD, *(one["path"] for one in made.files))]


# ---- look and pull ------------------------------------------------------------------------------------------------------------------


def read_record(address: str) -> Artifact | None:
    """What the record at an address says, or None where there is none. Raises DataError for a damaged one."""
    text, path = backends.open_backend(address).text(RECORD), redact_url(f"{address}/{RECORD}")
    if text is None:
        return None
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return record.parse(values, path, address)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). Push the artifact again.") from error
    except ConfigError as error:
        raise DataError(str(error)) from error


def listed(store: str) -> Iterator[Artifact]:
    """The finished artifacts in a store in s3; what is damaged or half pushed is none."""
    names = backends.call_s3(store, lambda: s3.client().ls(store, detail=False, refresh=True), "listed")
    for name in sorted(names):
        try:
            if record.HASH.fullmatch(name.rpartition("/")[2]) and (made := read_record(f"s3://{name}")):
                yield made
        except DataError:
            continue


def pull(address: str, cache: str = CACHE) -> str:
    """A folder of this machine with the artifact of an address: fetched beside, verified, renamed. At once where it was pulled before."""
    where = backends.parse_url(address).rstrip("/")
    id = where.rpartition("/")[2]
    if not record.HASH.fullmatch(id):
        raise ConfigError(f"{redact_url(where)} names no artifact in a store: such an address ends with an id, 64 digits, as push prints it.")
    folder = Path(cache) / id
    if not _there(folder):
        with _alone(str(folder)):
            if not _there(folder):
                _fetch(where, folder)
    return str(folder)


def _there(folder: Path) -> bool:
    """Whether an artifact lies in the cache, as far as names and sizes tell: it was verified when it came."""
    try:
        made = record.read_if_artifact(str(folder))
        return made is not None and made.id == folder.name and all((folder / f["path"]).stat().st_size == f["bytes"] for f in made.files)
    except (ConfigError, OSError):
        return False


def _fetch(where: str, folder: Path) -> None:
    made = read_record(where)
    if made is None:
        raise ConfigError(f"{redact_url(where)} is no finished artifact: {RECORD} is missing. Correct the address, or push the artifact there.")
    if why := verify.record_mismatch(made) or (f"it is that of {made.id[:12]}" if made.id != folder.name else ""):
        raise DataError(f"{redact_url(where)}/{RECORD}: {why}. The record was changed or damaged: do not use it, and ask who pushed it.")
    partial, source = folder.with_name(f"{folder.name}.partial"), backends.open_backend(where)
    with backends.on_disk(str(partial)):
        partial.mkdir(exist_ok=True)
        _room(made, partial)
        with _progress("pull", made) as told:
            for before, one in _with_bytes_before(made):
                _fetch_file(source, one, partial, _from(before, told))
                told(before + one["bytes"])
        _keep_only(made, partial)
        record.write_json(partial / RECORD, {key: value for key, value in vars(made).items() if key != "uri"})
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


def _room(made: Artifact, partial: Path) -> None:
    """Raises SpaceError before anything is fetched that will not fit."""
    need = sum(one["bytes"] for one in made.files) - sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    if (free := shutil.disk_usage(partial).free) < need:
        raise SpaceError(f"{made.id[:12]} needs {need / 1e9:.3g} GB more in {partial.parent}, and {free / 1e9:.3g} GB are free. Make room there.")


def _fetch_file(source: Backend, one: dict[str, Any], folder: Path, told: ProgressCallback) -> None:
    """A file that is there and right stays; one that was begun is gone on with, and where that comes out wrong, fetched anew."""
    if not verify.file_problem(folder, one):
        return
    target = folder / one["path"]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    for _ in range(2):
        if _filled(source, one, partial, told) == one["sha256"]:
            partial.rename(target)
            return
        partial.unlink()
    raise DataError(
        f"{redact_url(source.url)}/{one['path']} has other contents than the record says (another SHA-256), and was thrown away. The store is damaged: "
        "remove that file there and push the artifact again, or make it again."
    )


def _filled(source: Backend, one: dict[str, Any], partial: Path, told: ProgressCallback) -> str:
    """Brings the rest of a file; the SHA-256 of all of it."""
    found, done = hashlib.sha256(), 0
    with partial.open("a+b") as file:
        if file.tell() > one["bytes"]:
            file.truncate(0)
        file.seek(0)
        while piece := file.read(backends.PIECE):
            found.update(piece)
            done += len(piece)
        for piece in source.pieces(one, done):
            file.write(piece)
            found.update(piece)
            told(done := done + len(piece))
        backends.settle(file)
    return found.hexdigest()


def _keep_only(made: Artifact, folder: Path) -> None:
    names = {one["path"] for one in made.files}
    for file in folder.rglob("*"):
        if file.is_file() and str(file.relative_to(folder)) not in names:
            file.unlink()


# ---- both ---------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Of several processes one at a time works on a path of this machine. In s3 they do not disturb each other."""
    if path.startswith("s3://"):
        yield
        return
    lock = FileLock(f"{path}.lock")
    with backends.on_disk(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that works on {redact_url(str(path))}", file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress(what: str, made: Artifact) -> Iterator[ProgressCallback]:
    """A line for what takes long: megabytes done, and in all."""
    total = sum(one["bytes"] for one in made.files) // MB
    if total < LONG:
        yield lambda _done: None
        return
    with Progress(f"{what} {made.id[:12]} (MB)", total) as bar:
        yield lambda done: bar.step(min(done // MB, total - 1))
        bar.step(total)
