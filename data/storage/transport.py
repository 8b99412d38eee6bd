"""Reads and writes local, http(s) and s3 files with retries. All data I/O goes through it."""

import errno
import functools
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from data.storage import http, urls
from data.storage.http import ChangedError, FileInfo, RangeClient
from dev2pro import retry, s3
from dev2pro.errors import DataError, SpaceError, TryAgainError
from dev2pro.escape import printable
from dev2pro.redact import redact_url
from dev2pro.retry import LONGEST_PAUSE as LONGEST_PAUSE
from dev2pro.retry import TransientError

T = TypeVar("T")
STEADY_RATE = 1e6  # bytes per second: a read at this rate is never hedged, however long it takes


@dataclass(slots=True, kw_only=True)
class ReadConfig:
    """How bytes are fetched and cached. No value changes the samples."""

    workers: int = 2  # processes that read and decode; 0 does it in the training process
    threads: int = 16  # reads under way at a time, per worker
    prefetch_mb: int = 512  # of pictures read ahead, encoded and decoded, per rank
    connect_timeout: float = 10.0  # seconds
    idle_timeout: float = 30.0  # seconds without a byte
    hedge: float = 5.0  # seconds after which a slow remote read is asked for a second time beside the first
    retries: int = 6  # with growing, jittered pauses: about a minute in all where every one fails at once
    cache: str = "runs/cache"  # folder for packed picture folders and, where cache_gb says so, remote bytes
    cache_gb: float = 0.0  # of remote bytes kept there; 0 keeps none


class Transport:
    """Thread-safe reads. Use it only in the process that created it: connections do not survive a fork."""

    def __init__(self, config: ReadConfig) -> None:
        self.config = config
        self._client = RangeClient(2 * config.threads, config.connect_timeout, config.idle_timeout)
        self._executor = ThreadPoolExecutor(2 * config.threads, "read")

    def info(self, url: str) -> FileInfo:
        """Size and version of a file. Raises DataError if it does not exist."""
        if urls.is_remote(url):
            return self._with_retries(url, lambda: self._client.get_range(url, 0, 1))[1]
        status = self._with_retries(url, lambda: _stat(url))
        return FileInfo(status.st_size, modified=str(status.st_mtime_ns))

    def read(self, url: str, start: int, length: int, info: FileInfo | None = None) -> bytes:
        """Exactly `length` bytes from `start`, of the file that `info` describes.

        Raises DataError if the file does not exist, may not be read or is another file; TryAgainError if all retries fail.
        """
        if length == 0:
            return b""
        fetch = self._hedged if urls.is_remote(url) else _read_local
        content = self._with_retries(url, lambda: fetch(url, start, length, info))
        if len(content) < length:
            raise ChangedError(url, f"it ends before byte {start + length}")
        return content

    def read_all(self, url: str, limit: int) -> bytes:
        """A small file of up to `limit` bytes."""
        info = self.info(url)
        if info.size > limit:
            raise DataError(f"{redact_url(url)} has {info.size:,} bytes, more than the {limit:,} such a file may have.")
        return self.read(url, 0, info.size, info)

    def write(self, url: str, content: bytes) -> None:
        """Writes a small file atomically: a reader sees the old content or the new one."""
        operation = _write_s3 if _writable(url) else _write_local
        self._with_retries(url, lambda: operation(url, content), "written")

    def move(self, file: str, url: str) -> None:
        """Moves a finished local file to `url`, atomically."""
        operation = _move_s3 if _writable(url) else _move_local
        self._with_retries(url, lambda: operation(file, url), "written")

    def _with_retries(self, url: str, operation: Callable[[], T], verb: str = "read") -> T:
        """Calls `operation` and retries transient failures with backoff. `verb`, for the error: read or written."""
        try:
            return retry.with_retries(operation, self.config.retries)
        except TransientError as error:
            last = error
        raise TryAgainError(
            f"{redact_url(url)} could not be {verb} in {self.config.retries + 1} tries (the last: {printable(str(last))}). "
            "Nothing was skipped: the same command goes on from the last checkpoint once the place answers again."
        )

    def _hedged(self, url: str, start: int, length: int, info: FileInfo | None) -> bytes:
        """One read, and a second one in parallel if the first is slow. The first successful response wins."""
        pending = {self._executor.submit(self._client.get_range, url, start, length, info)}
        done, _ = wait(pending, timeout=self.config.hedge + length / STEADY_RATE)
        if not done:
            pending.add(self._executor.submit(self._client.get_range, url, start, length, info))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            future = min(done, key=lambda future: future.exception() is not None)
            if future.exception() is None:
                break
        return future.result()[0]


def _writable(url: str) -> bool:
    """Whether `url` is in s3. Raises DataError for http."""
    if urls.is_remote(url) and not url.startswith("s3://"):
        raise DataError(f"{redact_url(url)} cannot be written: http is for reading. Choose a folder on this machine, or s3.")
    return urls.is_remote(url)


def _write_s3(url: str, content: bytes) -> None:
    try:
        s3.client().pipe_file(url, content)
    except Exception as error:  # botocore's, aiohttp's, the system's
        raise http.translate_s3_error(url, error) from None


def _move_s3(file: str, url: str) -> None:
    try:
        s3.client().put_file(file, url)
    except Exception as error:
        raise http.translate_s3_error(url, error) from None
    os.unlink(file)


def _move_local(file: str, path: str) -> None:
    with _translate_os_errors(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            os.replace(file, path)
        except OSError as error:
            if error.errno != errno.EXDEV:  # the target is on another disk
                raise
            with open(file, "rb") as source, _atomic_file(path) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.unlink(file)


def _write_local(path: str, content: bytes) -> None:
    with _translate_os_errors(path):
        write_atomic(path, content)


def write_atomic(path: str, content: bytes) -> None:
    """Writes to a temporary file and renames it, so that `path` is never incomplete."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with _atomic_file(path) as file:
        file.write(content)


@contextmanager
def _atomic_file(path: str) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path` at the end of the block. It is deleted if the block raises."""
    partial = f"{path}.{os.getpid()}-{threading.get_ident()}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


class _File:
    """An open file, closed when the last reference goes. Evicting it from the cache does not close it for a reading thread.

    `_inode` is part of the cache key: a file that replaced another is opened anew.
    """

    def __init__(self, path: str, _inode: int) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_open_cached = functools.lru_cache(256)(_File)


def _read_local(path: str, start: int, length: int, _info: FileInfo | None) -> bytes:
    status, parts = _stat(path), list[bytes]()
    with _translate_os_errors(path):
        file = _open_cached(path, status.st_ino)
        while length and (part := os.pread(file.fd, length, start)):  # may return fewer bytes than requested
            parts.append(part)
            start, length = start + len(part), length - len(part)
    return b"".join(parts)


def _stat(path: str) -> os.stat_result:
    with _translate_os_errors(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{redact_url(path)} is a {'folder' if stat.S_ISDIR(status.st_mode) else 'device or pipe'}, where a file was expected.")
    return status


@contextmanager
def _translate_os_errors(path: str) -> Iterator[None]:
    """Turns OSErrors into DataError (missing, not allowed), SpaceError (full disk) or TransientError (the rest)."""
    name = redact_url(path)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{name} does not exist. Correct the path, or bring the file back.") from error
    except PermissionError as error:
        raise DataError(f"{name} may not be read or written. Change its permissions, or the credentials in the environment.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{name} could not be written: no room is left there. Make room, then run the same command.") from error
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS):
            raise DataError(f"{name} cannot be used ({error.strerror}). Choose another path.") from error
        _open_cached.cache_clear()
        raise TransientError(f"{error.strerror}") from error  # a network file system that is not reachable
