"""Reads samples by row: CRC-verified bytes, prefetched by threads, in request order."""

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from data.loading.order import BLOCK
from data.shards import tar
from data.shards.sidecar import LIMITS
from data.shards.snapshot import Shard, Snapshot, Span
from data.storage import urls
from data.storage.cache import DiskCache
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError, TryAgainError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

J = TypeVar("J")
MAX_GAP = 1 << 16  # largest gap between two parts that one read spans
LOCAL_GROUP = 4  # local samples that one job of a thread reads
MAX_BLOCK = 1 << 26  # bytes fetched for the cache in one read, per thread


class Reader:
    """Reads `parts` of samples. Use it only in the process that created it."""

    def __init__(self, snapshot: Snapshot, config: ReadConfig, parts: Sequence[str]) -> None:
        self.snapshot, self.config, self.parts = snapshot, config, parts
        self.transport = Transport(config)
        self.cache = DiskCache(f"{config.cache}/bytes", config.cache_gb * 1e9) if config.cache_gb else None

    def sample(self, row: int) -> dict[str, bytes]:
        """part -> its bytes, as they were indexed.

        Raises what `Transport.read` raises. For a CRC mismatch raises ChangedError (local shard) or TryAgainError (remote).
        """
        shard = self.snapshot.shard(row)
        spans = {part: self.snapshot.span(row, part) for part in self.parts}
        if name := next((part for part in spans if spans[part].bytes > LIMITS[part]), ""):
            raise DataError(
                f"{redact_url(shard.url)}: the snapshot has a {name} of {spans[name].bytes:,} bytes, which no index lets in. Make it again."
            )
        parts = self._parts(shard, row, spans)
        if not _first_mismatch(spans, parts):
            return parts
        parts = self._parts(shard, row, spans, fresh=True)
        if name := _first_mismatch(spans, parts):
            mismatch = f"bytes {spans[name].offset} to {spans[name].offset + spans[name].bytes} ({name}) are not those of the index, twice"
            if not urls.is_remote(shard.url):
                raise ChangedError(shard.url, mismatch)
            raise TryAgainError(f"{redact_url(shard.url)}: {mismatch}. The network or the store damages data; look there, then run the same command.")
        return parts

    def key(self, row: int) -> str:
        """The name of a sample's picture in its shard, from the header before it; for messages."""
        shard, offset = self.snapshot.shard(row), self.snapshot.span(row, "picture").offset
        return printable(tar.name_of(self.transport.read(shard.url, max(0, offset - tar.BLOCK), tar.BLOCK, shard.info)))

    def prefetch(self, jobs: Iterable[tuple[int, J]]) -> Iterator[tuple[J, dict[str, bytes]]]:
        """(job, sample) for every (row, job), in order, while up to `threads` more are being read. Pending bytes use at most half of prefetch_mb."""
        limit = self.config.prefetch_mb * 2**20 / max(1, self.config.workers) / 2
        waiting: deque[tuple[list[tuple[int, J]], int, Future]] = deque()
        group_size = 1 if any(urls.is_remote(shard.url) for shard in self.snapshot.shards) else LOCAL_GROUP
        jobs, pending_bytes = iter(jobs), 0
        pool = ThreadPoolExecutor(self.config.threads, "sample")
        try:
            while True:
                while (
                    len(waiting) * group_size < 2 * self.config.threads
                    and (pending_bytes < limit or not waiting)
                    and (group := list(islice(jobs, group_size)))
                ):
                    size = sum(self.snapshot.span(row, part).bytes for row, _ in group for part in self.parts)
                    waiting.append((group, size, pool.submit(lambda rows: [self.sample(row) for row in rows], [row for row, _ in group])))
                    pending_bytes += size
                if not waiting:
                    return
                group, size, future = waiting.popleft()
                for (_, job), parts in zip(group, future.result(), strict=True):
                    yield job, parts
                pending_bytes -= size
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # does not wait for a hanging read

    def _parts(self, shard: Shard, row: int, spans: dict[str, Span], fresh: bool = False) -> dict[str, bytes]:
        parts = dict.fromkeys(spans, b"")
        for group in _coalesce(spans):
            start = min(spans[part].offset for part in group)
            end = max(spans[part].offset + spans[part].bytes for part in group)
            content = self._range(shard, row, group, start, end, fresh)
            parts |= {part: content[(first := spans[part].offset - start) : first + spans[part].bytes] for part in group}
        return parts

    def _range(self, shard: Shard, row: int, group: Sequence[str], start: int, end: int, fresh: bool) -> bytes:
        """Bytes of a shard. With a cache, reads the whole block of neighbouring samples, which the order needs soon."""

        def fetch(first: int, last: int) -> bytes:
            return self.transport.read(shard.url, first, last - first, shard.info)

        if self.cache is None or not urls.is_remote(shard.url):
            return fetch(start, end)
        first, last = self._block(shard, row, group)
        if not first <= start <= end <= last <= first + MAX_BLOCK:
            first, last = start, end
        key = f"{shard.sha256} {first} {last}"
        if fresh:
            self.cache.drop(key)
            return fetch(start, end)
        return self.cache.get(key, last - first, lambda: fetch(first, last), start - first, end - first)

    def _block(self, shard: Shard, row: int, group: Sequence[str]) -> tuple[int, int]:
        begin = shard.first + (row - shard.first) // BLOCK * BLOCK
        rows = range(begin, min(begin + BLOCK, shard.first + shard.samples))
        spans = [span for r in (rows[0], rows[-1]) for part in group if (span := self.snapshot.span(r, part)).bytes]
        return min((span.offset for span in spans), default=0), max((span.offset + span.bytes for span in spans), default=0)


def _coalesce(spans: dict[str, Span]) -> list[list[str]]:
    """Groups parts that are close enough for one read. Skips empty parts."""
    groups: list[list[str]] = []
    end = 0
    for part in sorted((part for part, span in spans.items() if span.bytes), key=lambda part: spans[part].offset):
        if groups and spans[part].offset - end <= MAX_GAP:
            groups[-1].append(part)
        else:
            groups.append([part])
        end = spans[part].offset + spans[part].bytes
    return groups


def _first_mismatch(spans: dict[str, Span], parts: dict[str, bytes]) -> str:
    """The first part whose CRC differs from the index, or ""."""
    return next((part for part, span in spans.items() if zlib.crc32(parts[part]) != span.crc), "")
