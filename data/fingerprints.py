"""Fingerprints of pictures: how they look and which pixels they have. Computed once a shard, cached under its SHA-256."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import commands
from data.loading.read import Reader
from data.shards import pictures, table
from data.shards.pictures import BadContent
from data.shards.snapshot import Shard, Snapshot
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, write_atomic
from dev2pro.errors import DataError
from dev2pro.escape import printable

FORM, VERSION = "dev2pro fingerprints", 1
SIDE = 16  # of the thumbnail that tells how a picture looks, grey
HASH_ACROSS, HASH_DOWN = 9, 8  # pixels whose horizontal differences are the 64 bits of dHash (N. Krawetz, "Kind of Like That", 2013)
CHUNK = 32  # pictures a process takes at a time
SMALL_WORK = 64e6  # pixels: less is decoded in this process, for starting others takes longer
_reader: Reader


class Kind(NamedTuple):
    """A kind of fingerprint: its name in the cache, its bytes, and how it is computed from an encoded picture."""

    name: str
    size: int
    compute: Callable[[bytes], bytes]


def _look(encoded: bytes) -> bytes:
    """dHash and thumbnail. A JPEG is decoded at a fraction of its size, which is several times faster and changes next to nothing."""
    grey = pictures.upright(encoded, 2 * SIDE).convert("L")
    across = np.asarray(grey.resize((HASH_ACROSS, HASH_DOWN), Image.Resampling.BOX), np.int16)
    return np.packbits(across[:, 1:] > across[:, :-1]).tobytes() + grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def _pixels(encoded: bytes) -> bytes:
    """64 bits of BLAKE2b over the size and the RGB pixels of the upright picture."""
    image = pictures.upright(encoded)
    return hashlib.blake2b(f"{image.width}x{image.height} ".encode() + image.tobytes(), digest_size=8).digest()


LOOKS, PIXELS = Kind("looks", 8 + SIDE * SIDE, _look), Kind("pixels", 8, _pixels)
KINDS = {kind.name: kind for kind in (LOOKS, PIXELS)}


@dataclass(frozen=True)
class Looks:
    """How K pictures look: `hashes` (K,) uint64, `thumbnails` (K, 256) uint8, and which of them could be decoded, `readable` (K,) bool."""

    hashes: np.ndarray
    thumbnails: np.ndarray
    readable: np.ndarray


def looks(snapshot: Snapshot, rows: np.ndarray, read: ReadConfig) -> Looks:
    """How the pictures of these rows look."""
    values = _fingerprints(snapshot, rows, read, LOOKS)
    return Looks(values[:, 1:9].copy().view("<u8")[:, 0], values[:, 9:], values[:, 0] > 0)


def pixels(snapshot: Snapshot, rows: np.ndarray, read: ReadConfig) -> np.ndarray:
    """A hash (K,) uint64 of the size and the decoded pixels of each row; 0 for a picture that cannot be decoded."""
    values = _fingerprints(snapshot, rows, read, PIXELS)
    return np.where(values[:, 0], values[:, 1:].copy().view("<u8")[:, 0], 0)


def _fingerprints(snapshot: Snapshot, rows: np.ndarray, read: ReadConfig, kind: Kind) -> np.ndarray:
    """(K, 1 + bytes) uint8 of the rows: whether the picture could be decoded, and its fingerprint."""
    values = np.zeros((len(rows), 1 + kind.size), np.uint8)
    shards = np.searchsorted([shard.first for shard in snapshot.shards if shard.samples], rows, "right") - 1
    used = [shard for shard in snapshot.shards if shard.samples]
    known = {number: _read_cache(used[number], read, kind) for number in np.unique(shards)}
    offsets = snapshot.columns["picture_offset"][rows]
    missing = []
    for i, (number, offset) in enumerate(zip(shards, offsets, strict=True)):
        if (value := known[number].get(int(offset))) is None:
            missing.append(i)
        else:
            values[i] = value
    for i, fresh in zip(missing, _compute(snapshot, [int(rows[i]) for i in missing], read, kind), strict=True):
        values[i] = np.frombuffer(fresh, np.uint8)
        known[shards[i]][int(offsets[i])] = values[i]
    for number in np.unique(shards[missing]):
        _write_cache(used[number], known[number], read, kind)
    return values


def _compute(snapshot: Snapshot, rows: list[int], read: ReadConfig, kind: Kind) -> list[bytes]:
    """The values of rows that no cache holds, in several processes where it is much work."""
    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    columns = snapshot.columns
    if np.sum(columns["width"][rows].astype(np.float64) * columns["height"][rows]) < SMALL_WORK:
        _start(snapshot, read)
        return [value for chunk in chunks for value in _of_chunk(chunk, kind.name)]
    values = list[bytes]()
    with (
        commands.progress("comparing pictures", len(chunks)) as advance,
        commands.processes(min(commands.cores(), len(chunks)), _start, (snapshot, read)) as pool,
    ):
        for some in pool.map(_of_chunk, chunks, [kind.name] * len(chunks)):
            values += some
            advance()
    return values


def _start(snapshot: Snapshot, read: ReadConfig) -> None:
    global _reader
    _reader = Reader(snapshot, read, ("picture",))


def _of_chunk(rows: list[int], kind: str) -> list[bytes]:
    return [_of_row(row, KINDS[kind]) for row in rows]


def _of_row(row: int, kind: Kind) -> bytes:
    try:
        return b"\1" + kind.compute(_reader.sample(row)["picture"])
    except BadContent:  # the run puts it in quarantine
        return bytes(1 + kind.size)
    except ChangedError as error:  # it cannot be sent to another process
        raise DataError(str(error)) from None


def _path(shard: Shard, read: ReadConfig, kind: Kind) -> Path:
    return Path(read.cache, "fingerprints", f"{shard.sha256}.{kind.name}")


def _read_cache(shard: Shard, read: ReadConfig, kind: Kind) -> dict[int, np.ndarray]:
    """Offset of the picture -> its value. Empty if there is no cache, or a damaged one."""
    try:
        content = _path(shard, read, kind).read_bytes()
        _, columns = table.decode(content, FORM, VERSION, "")
        values = columns["values"].reshape(-1, 1 + kind.size)
        return dict(zip(columns["offset"].tolist(), values, strict=True))
    except (OSError, DataError, KeyError, ValueError):
        return {}


def _write_cache(shard: Shard, known: dict[int, np.ndarray], read: ReadConfig, kind: Kind) -> None:
    columns = {"offset": np.array(list(known), np.uint64), "values": np.stack(list(known.values()))}
    try:
        write_atomic(str(_path(shard, read, kind)), table.encode(FORM, VERSION, {"kind": kind.name}, columns))
    except OSError as error:
        print(
            f"cache: {printable(read.cache)} keeps no fingerprints ({error.strerror}); they are computed anew each time.", file=sys.stderr, flush=True
        )
