"""One artifact's place in a store, in s3 or on this machine: files are looked at, put, fetched in pieces and taken away by name."""

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
from dev2pro.retry import TransientError
from dev2pro.s3 import redact_url

T = TypeVar("T")
PIECE = 16 << 20  # bytes
TOGETHER = 8  # pieces under way at a time
RETRIES = 6  # with growing, jittered pauses: half a minute besides the tries that the client makes itself
SUM = "sha256"  # the key of an object's metadata under which its contents' hash is kept
LOST = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)  # a network file system that is away
ProgressCallback = Callable[[int], None]  # how many bytes of a file are done


class Backend(Protocol):
    """`entry` is a file's (path, bytes, sha256), as records have them."""

    url: str

    def holds(self, entry: dict[str, Any]) -> bool:
        """Whether the file lies there already, whole and with these contents."""

    def put(self, file: Path, entry: dict[str, Any], told: ProgressCallback) -> None:
        """The file appears at once and whole, or not at all."""

    def pieces(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """The file's bytes from `start` to its stated end. Raises DataError where it is missing or shorter."""

    def text(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""

    def drop(self, name: str) -> None:
        """Takes a file away, if it is there."""


def parse_url(address: str) -> str:
    """An address as it is used: s3://..., or a path on this machine. Raises ConfigError for others."""
    found = s3.ADDRESS.match(address)
    scheme = found[1].lower() if found else ""
    rest = address[found.end() :] if found else address
    if scheme in ("", "file"):
        return rest
    if scheme != "s3":
        raise ConfigError(
            f"{redact_url(address)} is no place for artifacts: they lie in folders of this machine and in s3. Give a path, or s3://bucket/store."
        )
    if "@" in rest or "?" in rest or "#" in rest:
        raise ConfigError(f"{redact_url(address)} holds a password or a query. Give s3://bucket/store, with the credentials in the environment.")
    if not rest.partition("/")[0]:
        raise ConfigError(f"{redact_url(address)} names no bucket. Give s3://bucket/store.")
    return f"s3://{rest}"


def open_backend(address: str) -> Backend:
    """The shelf of an artifact at <store>/<id>."""
    where = parse_url(address)
    return S3Backend(where) if where.startswith("s3://") else LocalBackend(where)


# ---- s3 ----------------------------------------------------------------------------------------------------------------------------


class S3Backend:
    """Objects below an s3 address. An object is there whole or not at all; whose it is stands in its metadata, written with it."""

    def __init__(self, place: str) -> None:
        self.url = place.rstrip("/")

    def holds(self, entry: dict[str, Any]) -> bool:
        """Whether an object has this size, and was sent with this hash."""
        head = self._head(entry["path"])
        return head is not None and head["ContentLength"] == entry["bytes"] and head.get("Metadata", {}).get(SUM) == entry["sha256"]

    def put(self, file: Path, entry: dict[str, Any], told: ProgressCallback) -> None:
        """One object; in parts where it is large, which the store puts together at the end."""
        where, metadata = f"{self.url}/{entry['path']}", {SUM: entry["sha256"]}
        chunk = max(PIECE, -(-entry["bytes"] // 9000))  # a store takes 10,000 parts

        def once() -> None:
            s3.client().put_file(str(file), where, callback=_Counted(told), chunksize=chunk, max_concurrency=TOGETHER, Metadata=metadata)

        call_s3(where, once, "written")

    def pieces(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """Several ranges at a time, in order."""
        where, size = f"{self.url}/{entry['path']}", entry["bytes"]
        for first in range(start, size, PIECE * TOGETHER):
            starts = list(range(first, min(first + PIECE * TOGETHER, size), PIECE))
            ends = [min(one + PIECE, size) for one in starts]

            def once(starts: list[int] = starts, ends: list[int] = ends) -> list[bytes]:
                return s3.client().cat_ranges([where] * len(starts), starts, ends, on_error="raise")

            try:
                found = call_s3(where, once, "read")
            except _Missing:
                raise _incomplete(where, "is missing") from None
            if sum(map(len, found)) != ends[-1] - first:
                raise _incomplete(where, f"has not the {size:,} bytes of its record")
            yield from found

    def text(self, name: str) -> bytes | None:
        """A small object."""
        where = f"{self.url}/{name}"
        try:
            head = self._head(name)
            if head is None or not head["ContentLength"]:
                return None if head is None else b""
            _small(where, head["ContentLength"])
            return call_s3(where, lambda: s3.client().cat_ranges([where], [0], [head["ContentLength"]], on_error="raise")[0], "read")
        except _Missing:  # gone since
            return None

    def drop(self, name: str) -> None:
        """Deletes an object."""
        where = f"{self.url}/{name}"
        call_s3(where, lambda: s3.client().rm_file(where), "removed")

    def _head(self, name: str) -> dict[str, Any] | None:
        bucket, _, key = f"{self.url}/{name}"[len("s3://") :].partition("/")
        try:
            return call_s3(f"{self.url}/{name}", lambda: s3.client().call_s3("head_object", Bucket=bucket, Key=key), "read")
        except _Missing:
            return None


class _Missing(ConfigError):
    """No such object or bucket."""


class _Counted(fsspec.callbacks.Callback):
    def __init__(self, told: ProgressCallback) -> None:
        super().__init__()
        self._told = told

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._told(self.value)


def call_s3(where: str, once: Callable[[], T], done: str) -> T:
    """What s3 answers. Failures that may pass are tried again; their own texts may name keys, so only their kinds are told."""

    def meant() -> T:
        try:
            return once()
        except Exception as error:  # botocore's, aiohttp's, the system's
            kind = type(error).__name__
            if isinstance(error, FileNotFoundError):
                raise _Missing(
                    f"{redact_url(where)} could not be {done}: there is no such bucket, or nothing of that name in it. Correct it."
                ) from None
            if s3.is_transient(error):
                raise TransientError(f"s3 was not reached, {kind}") from None
            raise ConfigError(f"{redact_url(where)} could not be {done} ({kind}). Check the address, the right to it, and {s3.CURE}") from None

    try:
        return retry.with_retries(meant, RETRIES)
    except TransientError as error:
        last = error
    raise TryAgainError(
        f"{redact_url(where)} could not be {done} in {RETRIES + 1} tries (the last: {last}). Look at the network and at AWS_ENDPOINT_URL; what was done "
        "is kept, and the same command goes on from there."
    )


# ---- this machine -------------------------------------------------------------------------------------------------------------------


class LocalBackend:
    """A folder of this machine."""

    def __init__(self, place: str) -> None:
        self.url = place.rstrip("/")

    def holds(self, entry: dict[str, Any]) -> bool:
        """Whether the file is there and has these contents, which are read."""
        with on_disk(self.url):
            return not verify.file_problem(Path(self.url), entry)

    def put(self, file: Path, entry: dict[str, Any], told: ProgressCallback) -> None:
        """Written beside and renamed."""
        target = Path(self.url) / entry["path"]
        with on_disk(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial, done = target.with_name(f"{target.name}.partial"), 0
            with file.open("rb") as source, partial.open("wb") as copy:
                while piece := source.read(PIECE):
                    copy.write(piece)
                    told(done := done + len(piece))
                settle(copy)
            partial.rename(target)

    def pieces(self, entry: dict[str, Any], start: int) -> Iterator[bytes]:
        """One after the other."""
        file = Path(self.url) / entry["path"]
        if not file.is_file():
            raise _incomplete(str(file), "is missing")
        with on_disk(str(file)), file.open("rb") as source:
            source.seek(start)
            for first in range(start, entry["bytes"], PIECE):
                piece = source.read(min(PIECE, entry["bytes"] - first))
                yield piece
                if len(piece) < min(PIECE, entry["bytes"] - first):
                    raise _incomplete(str(file), f"has not the {entry['bytes']:,} bytes of its record")

    def text(self, name: str) -> bytes | None:
        """A small file."""
        file = Path(self.url) / name
        with on_disk(str(file)):
            if not file.is_file():
                return None
            _small(str(file), file.stat().st_size)
            return file.read_bytes()

    def drop(self, name: str) -> None:
        """Removes a file."""
        with on_disk(f"{self.url}/{name}"):
            (Path(self.url) / name).unlink(missing_ok=True)


@contextmanager
def on_disk(where: str) -> Iterator[None]:
    """Turns the system's errors into SpaceError for a full disk, TryAgainError for one that is away, and ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{redact_url(where)} could not be written: no room is left there. Make room, then run the same command.") from error
        kind = TryAgainError if error.errno in LOST else ConfigError
        raise kind(f"{redact_url(where)} cannot be used ({error.strerror}). Correct the path, its permissions or its disk.") from error


def settle(file: Any) -> None:
    """What was written is on the disk, whatever happens to the machine."""
    file.flush()
    os.fsync(file.fileno())


def _small(where: str, size: int) -> None:
    if size > record.LARGEST:
        raise DataError(f"{redact_url(where)} has {size:,} bytes, more than the {record.LARGEST:,} of a record. It is none; remove it.")


def _incomplete(where: str, why: str) -> DataError:
    return DataError(f"{redact_url(where)} {why}: the artifact is not whole in the store. Push it again, or take it from elsewhere.")
