"""A snapshot: the fixed, ordered list of shards and samples that a run reads."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data.shards import encoded, notes, sidecar, table
from data.shards.notes import Notes
from data.shards.sidecar import COLUMNS, Sidecar
from data.storage import urls
from data.storage.http import ChangedError, FileInfo
from data.storage.transport import Transport, write_atomic
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

FORM, VERSION = "dev2pro snapshot", 1
ENDING = ".snapshot"


class Span(NamedTuple):
    """The byte range of a sample's part in its shard, and its CRC-32."""

    offset: int
    bytes: int
    crc: int


@dataclass(frozen=True)
class Shard:
    """A tar and its first row in the snapshot; every epoch uses its samples `repeat` times."""

    url: str
    info: FileInfo
    sha256: str
    first: int
    samples: int
    repeat: int = 1


@dataclass(frozen=True)
class Filters:
    """Which samples of a shard are used: sides in pixels, width:height or height:width at most, captions in characters."""

    min_side: int = 0
    max_aspect: float = 0.0
    min_caption: int = 0
    max_caption: int = 0
    without: frozenset[tuple[str, int]] = frozenset()  # (SHA-256 of the shard, key number): quarantined samples

    def mask(self, sha256: str, columns: table.Columns) -> np.ndarray:
        """(N,) bool."""
        width, height, chars = (columns[name].astype(np.float64) for name in ("width", "height", "caption_chars"))
        mask = (np.minimum(width, height) >= self.min_side) & (chars >= self.min_caption)
        if self.max_aspect:
            mask &= np.maximum(width, height) <= self.max_aspect * np.minimum(width, height)
        if self.max_caption:
            mask &= chars <= self.max_caption
        unwanted = [number for shard, number in self.without if shard == sha256]
        return mask & ~np.isin(columns["key"], np.array(unwanted, np.uint64))

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        sizes = {name: getattr(self, name) for name in ("min_side", "max_aspect", "min_caption", "max_caption")}
        return {**sizes, "without": sorted([sha256, str(number)] for sha256, number in self.without)}


class Snapshot:
    """Samples are numbered 0 to N-1 in the order of the shards. `id` depends on their contents, not on their URLs.

    `altered`: what decoding changes, of the shards' samples. `left_out`: packed folder -> its files that are not used.
    """

    def __init__(self, head: dict[str, Any], columns: table.Columns) -> None:
        self.head, self.columns = head, columns
        counts = [shard["samples"] for shard in head["shards"]]
        self._firsts = np.cumsum([0, *counts])
        self.shards = [
            Shard(shard["place"], FileInfo(**shard["stamp"]), shard["sha256"], int(first), shard["samples"], shard["repeat"])
            for shard, first in zip(head["shards"], self._firsts, strict=False)
        ]
        self.encodings: dict[str, Any] = head["encodings"]
        self.id: str = head["id"]
        self.altered: Notes = notes.checked(head.get("altered", {}))
        self.left_out: dict[str, Notes] = {str(folder): notes.checked(files) for folder, files in head.get("left_out", {}).items()}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def shard(self, row: int) -> Shard:
        """The shard of a sample."""
        return self.shards[int(np.searchsorted(self._firsts, row, "right")) - 1]

    def span(self, row: int, part: str) -> Span:
        """The byte range of a sample's picture, caption, latents or text."""
        return Span(*(int(self.columns[f"{part}_{what}"][row]) for what in ("offset", "bytes", "crc")))

    def write(self, path: str) -> None:
        """Writes the snapshot atomically."""
        write_atomic(path, table.encode(FORM, VERSION, self.head, self.columns))


def read(path: str) -> Snapshot:
    """Reads a snapshot with memory-mapped columns. Raises DataError for a file that is damaged or of another kind."""
    head, columns = table.open_mapped(path, FORM, VERSION)
    lengths = {len(column) for column in columns.values()}
    try:
        snapshot = Snapshot(head, columns)
        fits = lengths == {len(snapshot)} and snapshot.id == _id(head, head["columns"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{redact_url(path)} is damaged ({type(error).__name__}: {error}). Make the snapshot again.") from error
    if not fits:
        raise DataError(f"{redact_url(path)} is damaged: its id is not that of its contents. Make the snapshot again.")
    for shard in snapshot.shards:
        urls.normalize(shard.url)
        if not shard.info.etag.isprintable():  # it goes into a header
            raise DataError(f"{redact_url(path)} has an ETag that no server gives. Make the snapshot again.")
    return snapshot


def build(
    shards: Sequence[str],
    transport: Transport,
    *,
    sources: Sequence[str] = (),
    folders: Mapping[str, str] = MappingProxyType({}),
    left_out: Mapping[str, Notes] = MappingProxyType({}),
    folder: str | None = None,
    filters: Filters = Filters(),
    repeat: Callable[[str], int] = lambda sha256: 1,
    advance: Callable[[], None] = lambda: None,
    unusable: dict[str, str] | None = None,
) -> Snapshot:
    """A snapshot of indexed shards. `repeat`: SHA-256 -> how often an epoch uses the shard; 0 leaves it out.

    `sources`, `folders` (packed folder -> listing) and `left_out` record where the shards came from; `folder` holds the sidecars.

    Raises DataError for a shard that is not indexed, changed since, or there twice (or leaves it out, with the reason, where `unusable` is given),
    and for one with other encodings than the rest.
    """

    def read_verified(url: str) -> tuple[str, Sidecar, FileInfo] | None:
        try:
            shard_index = sidecar.read(url, transport, folder)
            return url, shard_index, verify_unchanged(url, shard_index.info, shard_index.head["sha256"], transport)
        except DataError as error:
            if unusable is None:
                raise
            unusable[url] = str(error)
            return None
        finally:
            advance()

    with ThreadPoolExecutor(transport.config.threads) as pool:
        results = [result for result in pool.map(read_verified, shards) if result]
    infos = {url: info for url, _, info in results}
    used = [(url, shard_index, repeat(shard_index.head["sha256"]) * shard_index.repeat) for url, shard_index, _ in results if len(shard_index)]
    used = [(url, shard_index, times) for url, shard_index, times in used if times]
    if duplicates := _duplicates([(url, shard_index) for url, shard_index, _ in used]):
        if unusable is None:
            raise DataError(next(iter(duplicates.values())))
        unusable |= duplicates
        used = [shard for shard in used if shard[0] not in duplicates]
    _check_encodings([(url, shard_index) for url, shard_index, _ in used])
    masks = [filters.mask(shard_index.head["sha256"], shard_index.columns) for _, shard_index, _ in used]
    encodings = used[0][1].head["encodings"] if used else {}
    names = [name for name in COLUMNS if (part := name.partition("_")[0]) not in encoded.PARTS or part in encodings]
    columns = {
        name: np.concatenate(
            [shard_index.columns[name][mask] for (_, shard_index, _), mask in zip(used, masks, strict=True)] or [np.empty(0, COLUMNS[name])]
        )
        for name in names
    }
    head = {
        "sources": list(sources), "folders": dict(folders), "filters": filters.json(), "encodings": encodings,
        "shards": [
            {"place": url, "stamp": infos[url].json(), "sha256": shard_index.head["sha256"], "samples": int(mask.sum()), "repeat": times}
            for (url, shard_index, times), mask in zip(used, masks, strict=True)
        ],
    }  # fmt: skip
    altered: Notes = {}
    for _, shard_index, _ in used:
        notes.merge(altered, shard_index.head.get("altered", {}))
    head |= {name: dict(value) for name, value in (("altered", altered), ("left_out", left_out)) if value}
    return Snapshot({**head, "id": _id(head, table.columns_sum(columns))}, columns)


def _id(head: dict[str, Any], columns: str) -> str:
    """A hash of the samples: shard contents in order, selected rows, repeats."""
    return table.digest([VERSION, [[shard["sha256"], shard["samples"], shard["repeat"]] for shard in head["shards"]], head["encodings"], columns])


def _duplicates(used: Sequence[tuple[str, Sidecar]]) -> dict[str, str]:
    """Shards with the bytes of an earlier one -> the error message."""
    seen: dict[str, str] = {}
    messages: dict[str, str] = {}
    for url, shard_index in used:
        if (first := seen.get(shard_index.head["sha256"])) is None:
            seen[shard_index.head["sha256"]] = url
            continue
        message = f"{redact_url(url)} is given twice" if first == url else f"{redact_url(url)} and {redact_url(first)} hold the same bytes"
        messages[url] = f"{message}. Leave one out; repeating is what weights are for."
    return messages


def _check_encodings(used: Sequence[tuple[str, Sidecar]]) -> None:
    for url, shard_index in used:
        if shard_index.head["encodings"] != used[0][1].head["encodings"]:
            raise DataError(f"{redact_url(url)} has other encodings than {redact_url(used[0][0])}. Encode both in the same way, or use one kind.")


def check(snapshot: Snapshot, transport: Transport, *, remote: bool = True) -> Snapshot:
    """Verifies every shard and returns the snapshot. `remote=False` skips shards that are not local."""
    shards = [shard for shard in snapshot.shards if remote or not urls.is_remote(shard.url)]
    with ThreadPoolExecutor(transport.config.threads) as pool:
        list(pool.map(lambda shard: verify_unchanged(shard.url, shard.info, shard.sha256, transport), shards))
    return snapshot


def verify_unchanged(url: str, info: FileInfo, sha256: str, transport: Transport) -> FileInfo:
    """The current FileInfo of a shard. Raises ChangedError if it is not the shard that was indexed, or what `Transport.info` raises.

    If only the modification time of a local shard differs, compares the SHA-256 of its bytes: a copy is valid.
    """
    actual = transport.info(url)
    if urls.is_remote(url) or actual.size != info.size:
        reason = info.difference(actual)
    else:
        reason = "" if actual.modified == info.modified or _sha256(url, actual.modified) == sha256 else "its contents are others"
    if reason:
        raise ChangedError(url, reason)
    return actual


@functools.lru_cache(1 << 16)
def _sha256(path: str, _modified: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
