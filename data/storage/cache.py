"""A folder that keeps what was fetched from afar, by its content's name, within a limit of bytes."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.storage.transport import write_atomic
from dev2pro.escape import printable

LOW_WATERMARK = 0.9  # of the limit that is left in use once it was exceeded
COUNTED = 0.01  # of the limit that is written before looking what other processes wrote
LOCKS = 256


class DiskCache:
    """Shared by any number of processes; whatever goes wrong with the folder, reading goes on without it."""

    def __init__(self, folder: str, limit: float) -> None:
        self.folder, self.limit = Path(folder), limit
        self._used, self._written = 0.0, limit  # bytes, as far as this process knows; and its own since it last looked
        self._full = False
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def get(self, key: str, length: int, fetch: Callable[[], bytes], start: int = 0, end: int | None = None) -> bytes:
        """From `start` to `end` of the `length` bytes known as `key`, from the folder or, once, from `fetch`."""
        file = self._file(key)
        with self._locks[hash(key) % LOCKS]:  # of several threads that want it, one fetches it
            try:
                with file.open("rb", buffering=0) as held:
                    if os.fstat(held.fileno()).st_size == length:
                        self._touch(file)
                        return os.pread(held.fileno(), (length if end is None else end) - start, start)
            except OSError:
                pass
            content = fetch()
            self._keep(file, content)
        return content[start:end]

    def drop(self, key: str) -> None:
        """Forgets what turned out to be wrong."""
        with suppress(OSError):
            self._file(key).unlink()

    def _touch(self, file: Path) -> None:
        """Used just now: the last to go."""
        with suppress(OSError):
            os.utime(file)

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _keep(self, file: Path, content: bytes) -> None:
        size = len(content)
        if size > LOW_WATERMARK * self.limit:
            return
        try:
            if self._used + size > self.limit or self._written > COUNTED * self.limit:
                self._make_room(size)
            write_atomic(str(file), content)
            self._used += size
            self._written += size
        except OSError as error:
            if not self._full:
                where = printable(str(self.folder))
                print(f"cache: {where} keeps nothing more ({error.strerror}); reading goes on without it.", file=sys.stderr, flush=True)
            self._full = True

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of everything there, other processes' work included."""
        found = []
        for file in self.folder.glob("??/*"):
            try:
                state = file.stat()
            except OSError:  # another process was faster
                continue
            found.append((state.st_mtime, state.st_size, file))
        return sorted(found)

    def _make_room(self, wanted: int) -> None:
        files = self._files()
        self._used, self._written = sum(size for _, size, _ in files), 0
        if self._used + wanted <= self.limit:
            return
        for _, size, file in files:
            if self._used + wanted <= LOW_WATERMARK * self.limit:
                break
            file.unlink(missing_ok=True)
            self._used -= size
