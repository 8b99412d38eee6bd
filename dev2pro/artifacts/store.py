"""Artifacts in stores, each at <store>/<id>: pushes them record last, pulls and verifies them. A store is a folder or an s3 prefix."""

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
from dev2pro.redact import redact_url

CACHE = "runs/cache/artifacts"
MB = 1_000_000
PROGRESS_FROM = 100  # MB from which on progress is printed


def resolve(path: str) -> str:
    """Returns a local path: pulls an artifact in s3, leaves other paths unchanged. Raises ConfigError for other URLs."""
    url = backends.parse_url(path)
    return pull(url) if url.startswith("s3://") else url


# ---- push ---------------------------------------------------------------------------------------------------------------------------


def push(out: str, store: str) -> str:
    """Publishes a verified artifact and returns its URL. Uploads the record last, so no reader sees half an artifact; skips existing files."""
    artifact = record.read(out)
    before = _file_states(artifact)
    with _progress("check", artifact) as on_progress:
        verify.check(artifact, on_progress)
    url = f"{backends.parse_url(store).rstrip('/')}/{artifact.id}"
    target = backends.open_backend(url)
    with _locked(url):
        if _is_published(target, url):
            return url
        with _progress("push", artifact) as on_progress:
            _send(artifact, target, on_progress)
        if _file_states(artifact) != before:
            raise DataError(f"{out} changed while it was pushed, and is not published. Push it again once the run in it has come to its end.")
        target.put(Path(out) / RECORD, record.entry(Path(out), Path(out) / RECORD), lambda _done: None)
    return url


def _is_published(target: Backend, url: str) -> bool:
    """Whether the artifact is complete in the store. A record whose files are incomplete is deleted first."""
    try:
        published = read_record(url)
        if published is None:
            return False
        if not verify.record_mismatch(published) and all(target.contains(entry) for entry in published.files):
            return True
    except DataError:
        pass
    target.delete(RECORD)
    return False


def _send(artifact: Artifact, target: Backend, on_progress: ProgressCallback) -> None:
    for offset, entry in _files_with_offsets(artifact):
        if not target.contains(entry):
            target.put(Path(artifact.uri) / entry["path"], entry, _from_offset(offset, on_progress))
        on_progress(offset + entry["bytes"])


def _files_with_offsets(artifact: Artifact) -> Iterator[tuple[int, dict[str, Any]]]:
    offset = 0
    for entry in artifact.files:
        yield offset, entry
        offset += entry["bytes"]


def _from_offset(offset: int, on_progress: ProgressCallback) -> ProgressCallback:
    return lambda done: on_progress(offset + done)


def _file_states(artifact: Artifact) -> list[Any]:
    """Sizes and times of the record and all files, to detect writes."""
    return [record.state(str(Path(artifact.uri) / name)) for name in (RECORD, *(entry["path"] for entry in artifact.files))]


# ---- read and pull ------------------------------------------------------------------------------------------------------------------


def read_record(url: str) -> Artifact | None:
    """Reads the record at a URL; None if there is none. Raises DataError for a damaged one."""
    text, path = backends.open_backend(url).read_small(RECORD), redact_url(f"{url}/{RECORD}")
    if text is None:
        return None
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return record.parse(values, path, url)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). Push the artifact again.") from error
    except ConfigError as error:
        raise DataError(str(error)) from error


def list_store(store: str) -> Iterator[Artifact]:
    """The finished artifacts in a store in s3, without damaged and half pushed ones."""
    names = backends.s3_with_retries(store, lambda: s3.client().ls(store, detail=False, refresh=True), "listed")
    for name in sorted(names):
        try:
            if record.HASH.fullmatch(name.rpartition("/")[2]) and (artifact := read_record(f"s3://{name}")):
                yield artifact
        except DataError:
            continue


def pull(url: str, cache: str = CACHE) -> str:
    """Downloads an artifact into a temporary folder, verifies it, renames the folder and returns its path. Returns at once if it is cached."""
    url = backends.parse_url(url).rstrip("/")
    id = url.rpartition("/")[2]
    if not record.HASH.fullmatch(id):
        raise ConfigError(f"{redact_url(url)} names no artifact in a store: such an address ends with an id, 64 digits, as push prints it.")
    folder = Path(cache) / id
    if not _is_cached(folder):
        with _locked(str(folder)):
            if not _is_cached(folder):
                _fetch(url, folder)
    return str(folder)


def _is_cached(folder: Path) -> bool:
    """Whether an artifact is in the cache. Checks names and sizes only: `pull` verified the contents."""
    try:
        artifact = record.read_if_artifact(str(folder))
        return artifact is not None and artifact.id == folder.name and all((folder / f["path"]).stat().st_size == f["bytes"] for f in artifact.files)
    except (ConfigError, OSError):
        return False


def _fetch(url: str, folder: Path) -> None:
    artifact = read_record(url)
    if artifact is None:
        raise ConfigError(f"{redact_url(url)} is no finished artifact: {RECORD} is missing. Correct the address, or push the artifact there.")
    if why := verify.record_mismatch(artifact) or (f"it is that of {artifact.id[:12]}" if artifact.id != folder.name else ""):
        raise DataError(f"{redact_url(url)}/{RECORD}: {why}. The record was changed or damaged: do not use it, and ask who pushed it.")
    partial, source = folder.with_name(f"{folder.name}.partial"), backends.open_backend(url)
    with backends.translate_os_errors(str(partial)):
        partial.mkdir(exist_ok=True)
        _check_space(artifact, partial)
        with _progress("pull", artifact) as on_progress:
            for offset, entry in _files_with_offsets(artifact):
                _fetch_file(source, entry, partial, _from_offset(offset, on_progress))
                on_progress(offset + entry["bytes"])
        _remove_untracked(artifact, partial)
        record.write_json(partial / RECORD, {key: value for key, value in vars(artifact).items() if key != "uri"})
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


def _check_space(artifact: Artifact, partial: Path) -> None:
    """Raises SpaceError if the files will not fit, before any is fetched."""
    need = sum(entry["bytes"] for entry in artifact.files) - sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    if (free := shutil.disk_usage(partial).free) < need:
        raise SpaceError(f"{artifact.id[:12]} needs {need / 1e9:.3g} GB more in {partial.parent}, and {free / 1e9:.3g} GB are free. Make room there.")


def _fetch_file(source: Backend, entry: dict[str, Any], folder: Path, on_progress: ProgressCallback) -> None:
    """Keeps a correct file, resumes a partial one, and fetches it again if its hash is wrong."""
    if not verify.file_problem(folder, entry):
        return
    target = folder / entry["path"]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    for _ in range(2):
        if _download(source, entry, partial, on_progress) == entry["sha256"]:
            partial.rename(target)
            return
        partial.unlink()
    raise DataError(
        f"{redact_url(source.url)}/{entry['path']} has other contents than the record says (another SHA-256), and was thrown away. The store is "
        "damaged: remove that file there and push the artifact again, or make it again."
    )


def _download(source: Backend, entry: dict[str, Any], partial: Path, on_progress: ProgressCallback) -> str:
    """Fetches the rest of a file and returns the SHA-256 of the whole file."""
    digest, done = hashlib.sha256(), 0
    with partial.open("a+b") as file:
        if file.tell() > entry["bytes"]:
            file.truncate(0)
        file.seek(0)
        while chunk := file.read(backends.CHUNK):
            digest.update(chunk)
            done += len(chunk)
        for chunk in source.read_chunks(entry, done):
            file.write(chunk)
            digest.update(chunk)
            on_progress(done := done + len(chunk))
        backends.fsync(file)
    return digest.hexdigest()


def _remove_untracked(artifact: Artifact, folder: Path) -> None:
    names = {entry["path"] for entry in artifact.files}
    for file in folder.rglob("*"):
        if file.is_file() and str(file.relative_to(folder)) not in names:
            file.unlink()


# ---- both ---------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Holds a file lock on a local path. s3 needs none."""
    if path.startswith("s3://"):
        yield
        return
    lock = FileLock(f"{path}.lock")
    with backends.translate_os_errors(path):
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
def _progress(what: str, artifact: Artifact) -> Iterator[ProgressCallback]:
    """Shows a progress bar for large artifacts: megabytes done and in all."""
    total = sum(entry["bytes"] for entry in artifact.files) // MB
    if total < PROGRESS_FROM:
        yield lambda _done: None
        return
    with Progress(f"{what} {artifact.id[:12]} (MB)", total) as bar:
        yield lambda done: bar.step(min(done // MB, total - 1))
        bar.step(total)
