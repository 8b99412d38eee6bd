"""A disk cache of remote bytes, keyed by content hash and bounded in size."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.storage.transport import write_atomic
from dev2pro.escape import printable

LOW_WATERMARK = 0.9  # share of the limit that remains in use after an eviction
RECOUNT_SHARE = 0.01  # share of the limit this process writes before it counts the files of other processes again
LOCKS = 256


class DiskCache:
    """Safe for several processes. If the folder fails, reads continue without the cache."""

    def __init__(self, folder: str, limit: float) -> None:
        self.folder, self.limit = Path(folder), limit
        self._used, self._written = 0.0, limit  # bytes in the folder by the last count; bytes this process wrote since then
        self._full = False
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def get(self, key: str, length: int, fetch: Callable[[], bytes], start: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `start` to `end` of entry `key` (`length` bytes). Calls `fetch` on a miss and stores the result."""
        path = self._path(key)
        with self._locks[hash(key) % LOCKS]:  # one thread fetches, the others wait
            try:
                with path.open("rb", buffering=0) as file:
                    if os.fstat(file.fileno()).st_size == length:
                        self._touch(path)
                        return os.pread(file.fileno(), (length if end is None else end) - start, start)
            except OSError:
                pass
            content = fetch()
            self._store(path, content)
        return content[start:end]

    def drop(self, key: str) -> None:
        """Deletes a corrupt entry."""
        with suppress(OSError):
            self._path(key).unlink()

    def _touch(self, path: Path) -> None:
        """Marks the entry as most recently used."""
        with suppress(OSError):
            os.utime(path)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _store(self, path: Path, content: bytes) -> None:
        size = len(content)
        if size > LOW_WATERMARK * self.limit:
            return
        try:
            if self._used + size > self.limit or self._written > RECOUNT_SHARE * self.limit:
                self._evict(size)
            write_atomic(str(path), content)
            self._used += size
            self._written += size
        except OSError as error:
            if not self._full:
                folder = printable(str(self.folder))
                print(f"cache: {folder} keeps nothing more ({error.strerror}); reading goes on without it.", file=sys.stderr, flush=True)
            self._full = True

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of every entry, oldest first, including those of other processes."""
        entries = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except OSError:  # another process deleted it
                continue
            entries.append((status.st_mtime, status.st_size, path))
        return sorted(entries)

    def _evict(self, wanted: int) -> None:
        entries = self._entries()
        self._used, self._written = sum(size for _, size, _ in entries), 0
        if self._used + wanted <= self.limit:
            return
        for _, size, path in entries:
            if self._used + wanted <= LOW_WATERMARK * self.limit:
                break
            path.unlink(missing_ok=True)
            self._used -= size
