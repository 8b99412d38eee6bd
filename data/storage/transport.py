"""Reads and writes files wherever they lie, and tries again: the one door between dev2pro's data and disks, web servers and s3."""

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
from dev2pro.retry import LONGEST_PAUSE as LONGEST_PAUSE
from dev2pro.retry import TransientError

T = TypeVar("T")
STEADY = 1e6  # bytes per second: a read that is this fast is not slow, however long it takes


@dataclass(slots=True, kw_only=True)
class ReadConfig:
    """How bytes are fetched and held; nothing here changes what comes out of them."""

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
    """Reads for many threads. It belongs to the process that made it: connections do not survive a fork."""

    def __init__(self, config: ReadConfig) -> None:
        self.config = config
        self._web = RangeClient(2 * config.threads, config.connect_timeout, config.idle_timeout)
        self._hands = ThreadPoolExecutor(2 * config.threads, "read")

    def info(self, place: str) -> FileInfo:
        """The state of a file now. Raises DataError where there is none."""
        if urls.is_remote(place):
            return self._with_retries(place, lambda: self._web.get_range(place, 0, 1))[1]
        found = self._with_retries(place, lambda: _state(place))
        return FileInfo(found.st_size, modified=str(found.st_mtime_ns))

    def read(self, place: str, start: int, length: int, stamp: FileInfo | None = None) -> bytes:
        """Exactly `length` bytes from `start`, of the file that `stamp` describes.

        Raises DataError where the file is not there, not allowed or not that file; TryAgainError where it could not be had for long.
        """
        if length == 0:
            return b""
        ask = self._hedged if urls.is_remote(place) else _local
        found = self._with_retries(place, lambda: ask(place, start, length, stamp))
        if len(found) < length:
            raise ChangedError(place, f"it ends before byte {start + length}")
        return found

    def read_all(self, place: str, limit: int) -> bytes:
        """A small file of up to `limit` bytes."""
        stamp = self.info(place)
        if stamp.size > limit:
            raise DataError(f"{urls.redact_url(place)} has {stamp.size:,} bytes, more than the {limit:,} such a file may have.")
        return self.read(place, 0, stamp.size, stamp)

    def write(self, place: str, content: bytes) -> None:
        """A small file, at once: a reader sees the old one or the new one."""
        once = _write_s3 if _writable(place) else _write_here
        self._with_retries(place, lambda: once(place, content), "written")

    def move(self, file: str, place: str) -> None:
        """A finished file of this machine to its place, at once."""
        once = _move_to_s3 if _writable(place) else _move_here
        self._with_retries(place, lambda: once(file, place), "written")

    def _with_retries(self, place: str, once: Callable[[], T], done: str = "read") -> T:
        """What `once` returns; failures that may pass are met with pauses and more tries."""
        try:
            return retry.with_retries(once, self.config.retries)
        except TransientError as error:
            last = error
        raise TryAgainError(
            f"{urls.redact_url(place)} could not be {done} in {self.config.retries + 1} tries (the last: {urls.printable(str(last))}). "
            "Nothing was skipped: the same command goes on from the last checkpoint once the place answers again."
        )

    def _hedged(self, place: str, start: int, length: int, stamp: FileInfo | None) -> bytes:
        """One read and, when it takes long, a second one beside it: the first good answer wins."""
        asked = {self._hands.submit(self._web.get_range, place, start, length, stamp)}
        done, _ = wait(asked, timeout=self.config.hedge + length / STEADY)
        if not done:
            asked.add(self._hands.submit(self._web.get_range, place, start, length, stamp))
        while asked:
            done, asked = wait(asked, return_when=FIRST_COMPLETED)
            last = min(done, key=lambda one: one.exception() is not None)
            if last.exception() is None:
                break
        return last.result()[0]


def _writable(place: str) -> bool:
    """Whether a place is in s3; raises DataError for http."""
    if urls.is_remote(place) and not place.startswith("s3://"):
        raise DataError(f"{urls.redact_url(place)} cannot be written: http is for reading. Choose a folder on this machine, or s3.")
    return urls.is_remote(place)


def _write_s3(place: str, content: bytes) -> None:
    try:
        s3.client().pipe_file(place, content)
    except Exception as error:  # botocore's, aiohttp's, the system's
        raise http.s3_trouble(place, error) from None


def _move_to_s3(file: str, place: str) -> None:
    try:
        s3.client().put_file(file, place)
    except Exception as error:
        raise http.s3_trouble(place, error) from None
    os.unlink(file)


def _move_here(file: str, place: str) -> None:
    with _explained(place):
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        try:
            os.replace(file, place)
        except OSError as error:
            if error.errno != errno.EXDEV:  # the place is on another disk
                raise
            with open(file, "rb") as source, _atomic_file(place) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.unlink(file)


def _write_here(place: str, content: bytes) -> None:
    with _explained(place):
        write_atomic(place, content)


def write_atomic(place: str, content: bytes) -> None:
    """Writes beside and renames, so that a file with this name is always whole."""
    os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
    with _atomic_file(place) as file:
        file.write(content)


@contextmanager
def _atomic_file(place: str) -> Iterator[BinaryIO]:
    """A file to be written, which takes its place at the end of the block, or is gone where that fails."""
    partial = f"{place}.{os.getpid()}-{threading.get_ident()}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


class _File:
    """An open file that closes when nobody holds it any more: forgetting it takes it from no thread that reads.

    `_node` is there for the cache: a file that took the place of another is another one.
    """

    def __init__(self, place: str, _node: int) -> None:
        self.fd = -1
        self.fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_opened = functools.lru_cache(256)(_File)


def _local(place: str, start: int, length: int, _stamp: FileInfo | None) -> bytes:
    state, parts = _state(place), list[bytes]()
    with _explained(place):
        file = _opened(place, state.st_ino)
        while length and (part := os.pread(file.fd, length, start)):  # which may give less than is there
            parts.append(part)
            start, length = start + len(part), length - len(part)
    return b"".join(parts)


def _state(place: str) -> os.stat_result:
    with _explained(place):
        found = os.stat(place)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{urls.redact_url(place)} is a {'folder' if stat.S_ISDIR(found.st_mode) else 'device or pipe'}, where a file was expected.")
    return found


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turns the errors of a place that is not there or not allowed into DataErrors, of a full disk into SpaceErrors, other ones into Passing."""
    name = urls.redact_url(place)
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
        _opened.cache_clear()
        raise TransientError(f"{error.strerror}") from error  # a network file system that is away
