"""Storage backends for one artifact, s3 or a local folder: check, write, read in chunks and delete files by name."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from dev2pro import retry, s3
from dev2pro.artifacts import record, verify
from dev2pro.errors import ConfigError, DataError, SpaceError, TryAgainError
from dev2pro.redact import URL, redact_url
from dev2pro.retry import TransientError

T = TypeVar("T")
CHUNK = 16 << 20  # bytes
CONCURRENCY = 8  # chunks transferred at a time
RETRIES = 6  # with growing, jittered pauses: half a minute, in addition to the client's own retries
SHA256_KEY = "sha256"  # key of the contents' hash in an object's metadata
UNREACHABLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)  # of a network file system
ProgressCallback = Callable[[int], None]  # called with the number of bytes of a file that are done


class Backend(Protocol):
    """`entry` is a file's (path, bytes, sha256), as records have them."""

    url: str

    def contains(self, entry: dict[str, Any]) -> bool:
        """Whether the file exists, complete and with these contents."""

    def put(self, file: Path, entry: dict[str, Any], on_progress: ProgressCallback) -> None:
        """Writes the file atomically."""

    def read_chunks(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """Yields the file's bytes from `start` to the recorded size. Raises DataError if it is missing or shorter."""

    def read_small(self, name: str) -> bytes | None:
        """Returns a small file, or None if it does not exist."""

    def delete(self, name: str) -> None:
        """Deletes a file, if it exists."""


def parse_url(url: str) -> str:
    """Normalizes a URL: s3://..., or a local path. Raises ConfigError for others."""
    match = URL.match(url)
    scheme = match[1].lower() if match else ""
    rest = url[match.end() :] if match else url
    if scheme in ("", "file"):
        return rest
    if scheme != "s3":
        raise ConfigError(
            f"{redact_url(url)} is no place for artifacts: they lie in folders of this machine and in s3. Give a path, or s3://bucket/store."
        )
    if "@" in rest or "?" in rest or "#" in rest:
        raise ConfigError(f"{redact_url(url)} holds a password or a query. Give s3://bucket/store, with the credentials in the environment.")
    if not rest.partition("/")[0]:
        raise ConfigError(f"{redact_url(url)} names no bucket. Give s3://bucket/store.")
    return f"s3://{rest}"


def open_backend(url: str) -> Backend:
    """Returns the backend of an artifact at <store>/<id>."""
    url = parse_url(url)
    return S3Backend(url) if url.startswith("s3://") else LocalBackend(url)


# ---- s3 ----------------------------------------------------------------------------------------------------------------------------


class S3Backend:
    """Objects below an s3 URL. They are written atomically; the SHA-256 is in their metadata."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def contains(self, entry: dict[str, Any]) -> bool:
        """Whether an object has this size, and this hash in its metadata."""
        head = self._head(entry["path"])
        return head is not None and head["ContentLength"] == entry["bytes"] and head.get("Metadata", {}).get(SHA256_KEY) == entry["sha256"]

    def put(self, file: Path, entry: dict[str, Any], on_progress: ProgressCallback) -> None:
        """Uploads one object; a large one in parts, which the store joins at the end."""
        url, metadata = f"{self.url}/{entry['path']}", {SHA256_KEY: entry["sha256"]}
        chunk = max(CHUNK, -(-entry["bytes"] // 9000))  # a store takes 10,000 parts

        def upload() -> None:
            s3.client().put_file(str(file), url, callback=_ByteCounter(on_progress), chunksize=chunk, max_concurrency=CONCURRENCY, Metadata=metadata)

        s3_with_retries(url, upload, "written")

    def read_chunks(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """Reads several ranges at a time and yields them in order."""
        url, size = f"{self.url}/{entry['path']}", entry["bytes"]
        for first in range(start, size, CHUNK * CONCURRENCY):
            starts = list(range(first, min(first + CHUNK * CONCURRENCY, size), CHUNK))
            ends = [min(begin + CHUNK, size) for begin in starts]

            def fetch(starts: list[int] = starts, ends: list[int] = ends) -> list[bytes]:
                return s3.client().cat_ranges([url] * len(starts), starts, ends, on_error="raise")

            try:
                chunks = s3_with_retries(url, fetch, "read")
            except _Missing:
                raise _incomplete(url, "is missing") from None
            if sum(map(len, chunks)) != ends[-1] - first:
                raise _incomplete(url, f"has not the {size:,} bytes of its record")
            yield from chunks

    def read_small(self, name: str) -> bytes | None:
        """Reads a small object."""
        url = f"{self.url}/{name}"
        try:
            head = self._head(name)
            if head is None or not head["ContentLength"]:
                return None if head is None else b""
            _check_record_size(url, head["ContentLength"])
            return s3_with_retries(url, lambda: s3.client().cat_ranges([url], [0], [head["ContentLength"]], on_error="raise")[0], "read")
        except _Missing:  # deleted since `_head`
            return None

    def delete(self, name: str) -> None:
        """Deletes an object."""
        url = f"{self.url}/{name}"
        s3_with_retries(url, lambda: s3.client().rm_file(url), "removed")

    def _head(self, name: str) -> dict[str, Any] | None:
        bucket, _, key = f"{self.url}/{name}"[len("s3://") :].partition("/")
        try:
            return s3_with_retries(f"{self.url}/{name}", lambda: s3.client().call_s3("head_object", Bucket=bucket, Key=key), "read")
        except _Missing:
            return None


class _Missing(ConfigError):
    """No such object or bucket."""


class _ByteCounter(fsspec.callbacks.Callback):
    def __init__(self, on_progress: ProgressCallback) -> None:
        super().__init__()
        self._on_progress = on_progress

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._on_progress(self.value)


def s3_with_retries(url: str, request: Callable[[], T], action: str) -> T:
    """Calls s3 and retries transient failures. Error texts may contain keys, so only the error's type is reported."""

    def attempt() -> T:
        try:
            return request()
        except Exception as error:  # botocore's, aiohttp's, the system's
            kind = type(error).__name__
            if isinstance(error, FileNotFoundError):
                raise _Missing(
                    f"{redact_url(url)} could not be {action}: there is no such bucket, or nothing of that name in it. Correct it."
                ) from None
            if s3.is_transient(error):
                raise TransientError(f"s3 was not reached, {kind}") from None
            raise ConfigError(f"{redact_url(url)} could not be {action} ({kind}). Check the address, the right to it, and {s3.CURE}") from None

    try:
        return retry.with_retries(attempt, RETRIES)
    except TransientError as error:
        last = error
    raise TryAgainError(
        f"{redact_url(url)} could not be {action} in {RETRIES + 1} tries (the last: {last}). Look at the network and at AWS_ENDPOINT_URL; what was "
        "done is kept, and the same command goes on from there."
    )


# ---- this machine -------------------------------------------------------------------------------------------------------------------


class LocalBackend:
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.url = path.rstrip("/")

    def contains(self, entry: dict[str, Any]) -> bool:
        """Whether the file exists and has these contents; reads it."""
        with translate_os_errors(self.url):
            return not verify.file_problem(Path(self.url), entry)

    def put(self, file: Path, entry: dict[str, Any], on_progress: ProgressCallback) -> None:
        """Writes a temporary file and renames it."""
        target = Path(self.url) / entry["path"]
        with translate_os_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial, done = target.with_name(f"{target.name}.partial"), 0
            with file.open("rb") as source, partial.open("wb") as copy:
                while chunk := source.read(CHUNK):
                    copy.write(chunk)
                    on_progress(done := done + len(chunk))
                fsync(copy)
            partial.rename(target)

    def read_chunks(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """Reads one chunk after the other."""
        file = Path(self.url) / entry["path"]
        if not file.is_file():
            raise _incomplete(str(file), "is missing")
        with translate_os_errors(str(file)), file.open("rb") as source:
            source.seek(start)
            for first in range(start, entry["bytes"], CHUNK):
                chunk = source.read(min(CHUNK, entry["bytes"] - first))
                yield chunk
                if len(chunk) < min(CHUNK, entry["bytes"] - first):
                    raise _incomplete(str(file), f"has not the {entry['bytes']:,} bytes of its record")

    def read_small(self, name: str) -> bytes | None:
        """Reads a small file."""
        file = Path(self.url) / name
        with translate_os_errors(str(file)):
            if not file.is_file():
                return None
            _check_record_size(str(file), file.stat().st_size)
            return file.read_bytes()

    def delete(self, name: str) -> None:
        """Removes a file."""
        with translate_os_errors(f"{self.url}/{name}"):
            (Path(self.url) / name).unlink(missing_ok=True)


@contextmanager
def translate_os_errors(path: str) -> Iterator[None]:
    """Turns OSError into SpaceError for a full disk, TryAgainError for an unreachable one, else ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{redact_url(path)} could not be written: no room is left there. Make room, then run the same command.") from error
        kind = TryAgainError if error.errno in UNREACHABLE else ConfigError
        raise kind(f"{redact_url(path)} cannot be used ({error.strerror}). Correct the path, its permissions or its disk.") from error


def fsync(file: Any) -> None:
    """Flushes and fsyncs a file."""
    file.flush()
    os.fsync(file.fileno())


def _check_record_size(url: str, size: int) -> None:
    if size > record.LARGEST:
        raise DataError(f"{redact_url(url)} has {size:,} bytes, more than the {record.LARGEST:,} of a record. It is none; remove it.")


def _incomplete(url: str, why: str) -> DataError:
    return DataError(f"{redact_url(url)} {why}: the artifact is not whole in the store. Push it again, or take it from elsewhere.")
