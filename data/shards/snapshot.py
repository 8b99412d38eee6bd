"""A pinned, ordered list of shards and of the samples in them: the only thing a run looks at."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data.shards import encoded, sidecar, table
from data.shards.sidecar import COLUMNS, Sidecar
from data.storage import urls
from data.storage.http import ChangedError, FileInfo
from data.storage.transport import Transport, write_atomic
from dev2pro.errors import DataError

FORM, VERSION = "dev2pro snapshot", 1
ENDING = ".snapshot"


class Span(NamedTuple):
    """Where a part of a sample lies in its shard, and the CRC-32 of its bytes."""

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
        kept = (np.minimum(width, height) >= self.min_side) & (chars >= self.min_caption)
        if self.max_aspect:
            kept &= np.maximum(width, height) <= self.max_aspect * np.minimum(width, height)
        if self.max_caption:
            kept &= chars <= self.max_caption
        unwanted = [number for shard, number in self.without if shard == sha256]
        return kept & ~np.isin(columns["key"], np.array(unwanted, np.uint64))

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        sizes = {name: getattr(self, name) for name in ("min_side", "max_aspect", "min_caption", "max_caption")}
        return {**sizes, "without": sorted([sha256, str(number)] for sha256, number in self.without)}


class Snapshot:
    """Samples are numbered 0 to N-1 in the order of the shards. `id` depends on what they are, not on where they lie."""

    def __init__(self, head: dict[str, Any], columns: table.Columns) -> None:
        self.head, self.columns = head, columns
        counts = [one["samples"] for one in head["shards"]]
        self._firsts = np.cumsum([0, *counts])
        self.shards = [
            Shard(one["place"], FileInfo(**one["stamp"]), one["sha256"], int(first), one["samples"], one["repeat"])
            for one, first in zip(head["shards"], self._firsts, strict=False)
        ]
        self.encodings: dict[str, Any] = head["encodings"]
        self.id: str = head["id"]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def shard(self, row: int) -> Shard:
        """The shard of a sample."""
        return self.shards[int(np.searchsorted(self._firsts, row, "right")) - 1]

    def span(self, row: int, part: str) -> Span:
        """Where the picture, caption, latents or text of a sample lie."""
        return Span(*(int(self.columns[f"{part}_{what}"][row]) for what in ("offset", "bytes", "crc")))

    def write(self, path: str) -> None:
        """Writes the snapshot at once."""
        write_atomic(path, table.encode(FORM, VERSION, self.head, self.columns))


def read(path: str) -> Snapshot:
    """The snapshot in a file, its columns mapped. Raises DataError for a file that is damaged or something else."""
    head, columns = table.open_mapped(path, FORM, VERSION)
    lengths = {len(column) for column in columns.values()}
    try:
        found = Snapshot(head, columns)
        fits = lengths == {len(found)} and found.id == _id(head, head["columns"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{urls.redact_url(path)} is damaged ({type(error).__name__}: {error}). Make the snapshot again.") from error
    if not fits:
        raise DataError(f"{urls.redact_url(path)} is damaged: its id is not that of its contents. Make the snapshot again.")
    for shard in found.shards:
        urls.normalize(shard.url)
        if not shard.info.etag.isprintable():  # it goes into a header
            raise DataError(f"{urls.redact_url(path)} has an ETag that no server gives. Make the snapshot again.")
    return found


def build(
    shards: Sequence[str],
    transport: Transport,
    *,
    sources: Sequence[str] = (),
    folders: Mapping[str, str] = MappingProxyType({}),
    folder: str | None = None,
    filters: Filters = Filters(),
    repeat: Callable[[str], int] = lambda sha256: 1,
    advance: Callable[[], None] = lambda: None,
    unusable: dict[str, str] | None = None,
) -> Snapshot:
    """A snapshot of indexed shards; `repeat` says by SHA-256 how often an epoch uses one, 0 leaves it out.

    `sources` and `folders` (packed folder -> listing) are notes of where the shards came from; `folder` holds the sidecars.

    Raises DataError for a shard that is not indexed, changed since, or there twice (or leaves it out, with the reason, where `unusable` is given),
    and for one with other encodings than the rest.
    """

    def one(place: str) -> tuple[str, Sidecar, FileInfo] | None:
        try:
            found = sidecar.read(place, transport, folder)
            return place, found, verified(place, found.stamp, found.head["sha256"], transport)
        except DataError as error:
            if unusable is None:
                raise
            unusable[place] = str(error)
            return None
        finally:
            advance()

    with ThreadPoolExecutor(transport.config.threads) as pool:
        found = [one for one in pool.map(one, shards) if one]
    stamps = {place: stamp for place, _, stamp in found}
    used = [(place, known, repeat(known.head["sha256"])) for place, known, _ in found if len(known)]
    used = [(place, known, times) for place, known, times in used if times]
    if twice := _twice([(place, known) for place, known, _ in used]):
        if unusable is None:
            raise DataError(next(iter(twice.values())))
        unusable |= twice
        used = [one for one in used if one[0] not in twice]
    _check_encodings([(place, known) for place, known, _ in used])
    kept = [filters.mask(known.head["sha256"], known.columns) for _, known, _ in used]
    encodings = used[0][1].head["encodings"] if used else {}
    names = [name for name in COLUMNS if (part := name.partition("_")[0]) not in encoded.PARTS or part in encodings]
    columns = {
        name: np.concatenate([known.columns[name][mask] for (_, known, _), mask in zip(used, kept, strict=True)] or [np.empty(0, COLUMNS[name])])
        for name in names
    }
    head = {
        "sources": list(sources), "folders": dict(folders), "filters": filters.json(), "encodings": encodings,
        "shards": [
            {"place": place, "stamp": stamps[place].json(), "sha256": known.head["sha256"], "samples": int(mask.sum()), "repeat": times}
            for (place, known, times), mask in zip(used, kept, strict=True)
        ],
    }  # fmt: skip
    return Snapshot({**head, "id": _id(head, table.columns_sum(columns))}, columns)


def _id(head: dict[str, Any], columns: str) -> str:
    """A hash of what the samples are: contents of shards in their order, which rows, how often."""
    return table.digest([VERSION, [[one["sha256"], one["samples"], one["repeat"]] for one in head["shards"]], head["encodings"], columns])


def _twice(used: Sequence[tuple[str, Sidecar]]) -> dict[str, str]:
    """Shards whose bytes came before, and what to say about each."""
    seen: dict[str, str] = {}
    found: dict[str, str] = {}
    for place, known in used:
        if (first := seen.get(known.head["sha256"])) is None:
            seen[known.head["sha256"]] = place
            continue
        twice = (
            f"{urls.redact_url(place)} is given twice"
            if first == place
            else f"{urls.redact_url(place)} and {urls.redact_url(first)} hold the same bytes"
        )
        found[place] = f"{twice}. Leave one out; repeating is what weights are for."
    return found


def _check_encodings(used: Sequence[tuple[str, Sidecar]]) -> None:
    for place, known in used:
        if known.head["encodings"] != used[0][1].head["encodings"]:
            raise DataError(
                f"{urls.redact_url(place)} has other encodings than {urls.redact_url(used[0][0])}. Encode both in the same way, or use one kind."
            )


def check(snapshot: Snapshot, transport: Transport, *, remote: bool = True) -> Snapshot:
    """The snapshot, once every shard is `verified`; `remote=False` leaves out what does not lie on this machine."""
    shards = [shard for shard in snapshot.shards if remote or not urls.is_remote(shard.url)]
    with ThreadPoolExecutor(transport.config.threads) as pool:
        list(pool.map(lambda shard: verified(shard.place, shard.stamp, shard.sha256, transport), shards))
    return snapshot


def verified(place: str, stamp: FileInfo, sha256: str, transport: Transport) -> FileInfo:
    """The state of a shard now, if it is the one that was indexed. Raises ChangedError, or what `Transport.stamp` raises.

    On this machine another time of change alone makes it read the shard and compare hashes: a copy is as good.
    """
    now = transport.info(place)
    if urls.is_remote(place) or now.size != stamp.size:
        why = stamp.difference(now)
    else:
        why = "" if now.modified == stamp.modified or _sha256(place, now.modified) == sha256 else "its contents are others"
    if why:
        raise ChangedError(place, why)
    return now


@functools.lru_cache(1 << 16)
def _sha256(place: str, _modified: str) -> str:
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
