"""Finds held-out pictures among the training pictures: the same pixels, which is refused, and pictures that look alike, which is said."""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data import fingerprints
from data.names import Names
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.transport import ReadConfig
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

MOST = 50_000  # pictures that are decoded when a run starts; data.report has no limit
NAMED = 3  # pairs in a message
PAIRS = 4 << 20  # compared at a time
# Pictures look alike if their dHashes differ in up to 8 of 64 bits and their grey 16x16 thumbnails correlate by 0.99. Of photographs saved again
# as JPEG, scaled or brightened 92 to 100 % are found, of those cropped by 2 % 70 %; of 20,909 pairs of different pictures none, and none of
# the 445,500 pairs of handwritten digits, of which dHash alone takes 3 % for the same (LOG.md).
MAX_BITS, MIN_CORRELATION = 8, 0.99
MIN_CONTRAST = 2.0  # standard deviation in grey levels of a thumbnail; flatter ones look like each other
MAX_DIFFERENCE = 4.0  # root mean square in grey levels of the thumbnails of equal pictures, one of them decoded at a fraction of its size
Pairs = dict[int, int]  # row -> the first row of the other set that it equals


@dataclass(frozen=True)
class Overlap:
    """Held-out row -> training row of the same pixels (`same`) or that looks like it (`near`). `left`: what was not compared, "" for nothing."""

    same: Pairs
    near: Pairs
    left: str = ""


def find(train: Snapshot, heldout: Snapshot, read: ReadConfig, most: float = MOST) -> Overlap:
    """Compares held-out and training pictures. Decodes up to `most` of them, remote ones only where bytes are the same or there is no limit.

    Pictures that cannot be decoded are skipped.
    """
    rows, left = _rows_to_decode(train, heldout, most)
    held_rows = np.arange(len(heldout) if len(rows) else 0)
    maybe_train, maybe_held = _same_bytes(train, heldout)
    near = Pairs()
    for mine, theirs, alike, equal in _compared(_decoded(train, rows, read), _decoded(heldout, held_rows, read)):
        maybe_train, maybe_held = np.union1d(maybe_train, rows[mine[equal.any(1)]]), np.union1d(maybe_held, theirs[equal.any(0)])
        for row in np.flatnonzero(alike.any(0)):
            near.setdefault(int(row), int(rows[mine[np.argmax(alike[:, row])]]))
    first = dict(reversed([*zip(fingerprints.pixels(train, maybe_train, read).tolist(), maybe_train.tolist(), strict=True)]))
    hashes = zip(maybe_held.tolist(), fingerprints.pixels(heldout, maybe_held, read).tolist(), strict=True)
    same = {row: first[pixels] for row, pixels in hashes if pixels and pixels in first}
    return Overlap(same, {row: near[row] for row in sorted(near) if row not in same}, left)


def duplicates(snapshot: Snapshot) -> Pairs:
    """Row -> an earlier row whose picture has the same bytes, by length and CRC-32."""
    _, first, group = np.unique(_bytes(snapshot), return_index=True, return_inverse=True)
    return {int(row): int(first[group[row]]) for row in np.flatnonzero(first[group] != np.arange(len(group)))}


def lookalikes(snapshot: Snapshot, read: ReadConfig) -> Pairs:
    """Row -> the first earlier row that looks like it and has other bytes, decoding every picture. Rows of `duplicates` are left out."""
    decoded, near = _decoded(snapshot, np.arange(len(snapshot)), read), Pairs()
    for mine, theirs, alike, _ in _compared(decoded, decoded):
        alike &= mine[:, None] < theirs
        for row in np.flatnonzero(alike.any(0)):
            near.setdefault(int(row), int(mine[np.argmax(alike[:, row])]))
    twice = duplicates(snapshot)
    return {row: near[row] for row in sorted(near) if row not in twice}


def check(overlap: Overlap, train: Snapshot, heldout: Snapshot, read: ReadConfig) -> None:
    """Raises DataError if a held-out picture is trained on."""
    if not overlap.same:
        return
    inside = _folder_inside(train, heldout)
    cure = (
        f"{inside[0]} lies in {inside[1]}, and a folder is read with the folders in it: move it out of there, or name the other folders one by one."
        if inside
        else "take them out of data.train or of data.heldout."
    )
    pairs = in_words(overlap.same, heldout, train, read, "is")
    raise DataError(
        f"{len(overlap.same):,} of the {len(heldout):,} pictures of data.heldout are in data.train, too: {pairs}. "
        f"What is trained on cannot judge: {cure}"
    )


def in_words(pairs: Pairs, snapshot: Snapshot, others: Snapshot, read: ReadConfig, verb: str) -> str:
    """The first pairs, and how many more there are."""
    our_name, their_name = Names(snapshot, read), Names(others, read)
    names = [(our_name(row), their_name(other)) for row, other in itertools.islice(pairs.items(), NAMED)]
    named = [f"{ours} {verb} {theirs}" if ours != theirs else ours for ours, theirs in names]
    more = f"; and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else ""
    return "; ".join(named) + more


def _folder_inside(train: Snapshot, heldout: Snapshot) -> tuple[str, str] | None:
    """A given folder that lies in one of the other role, and that one."""
    for inner, outer in itertools.chain(
        itertools.product(heldout.head["folders"], train.head["folders"]), itertools.product(train.head["folders"], heldout.head["folders"])
    ):
        if os.path.realpath(inner).startswith(os.path.realpath(outer) + os.sep):
            return redact_url(inner), redact_url(outer)
    return None


def _rows_to_decode(train: Snapshot, heldout: Snapshot, most: float) -> tuple[np.ndarray, str]:
    """The training pictures that are decoded, and what is left out."""
    local = not any(urls.is_remote(shard.url) for snapshot in (train, heldout) for shard in snapshot.shards)
    if most == math.inf or (local and len(train) + len(heldout) <= most):
        return np.arange(len(train)), ""
    rows = np.flatnonzero(np.isin(_size(train), _size(heldout))) if local else np.arange(0)
    rows = rows if len(rows) + len(heldout) <= most else np.arange(0)
    decoded = f"; the {len(rows):,} with the size of a held-out one were decoded and compared" if len(rows) else ""
    return rows, (
        f"of {len(train):,} training pictures, only those with the bytes of a held-out one were looked for{decoded}. "
        "`python -m data.report` compares all."
    )


def _size(snapshot: Snapshot) -> np.ndarray:
    return snapshot.columns["width"].astype(np.uint64) << np.uint64(32) | snapshot.columns["height"]


def _bytes(snapshot: Snapshot) -> np.ndarray:
    return snapshot.columns["picture_bytes"].astype(np.uint64) << np.uint64(32) | snapshot.columns["picture_crc"]


def _same_bytes(train: Snapshot, heldout: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose picture has a length and CRC-32 of the other set."""
    mine, theirs = _bytes(train), _bytes(heldout)
    return np.flatnonzero(np.isin(mine, theirs)), np.flatnonzero(np.isin(theirs, mine))


@dataclass(frozen=True)
class _Decoded:
    """Of K pictures: `size` (K,), dHash (K,), thumbnail as `mean` (K,), `spread` (K,) and the unit vector `form` (K, 256), float32."""

    size: np.ndarray
    hashes: np.ndarray
    readable: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    form: np.ndarray


def _decoded(snapshot: Snapshot, rows: np.ndarray, read: ReadConfig) -> _Decoded:
    looks = fingerprints.looks(snapshot, rows, read)
    grey = looks.thumbnails.astype(np.float32)
    mean = grey.mean(1)
    grey -= mean[:, None]
    spread = grey.std(1)
    grey /= np.maximum(spread, 1e-6)[:, None] * fingerprints.SIDE
    return _Decoded(_size(snapshot)[rows], looks.hashes, looks.readable, mean, spread, grey)


def _compared(ours: _Decoded, theirs: _Decoded) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(our numbers (A,), their numbers (B,), which look alike (A, B), which may be equal (A, B)), a part of ours at a time."""
    their_numbers = np.arange(len(theirs.hashes))
    step = max(1, PAIRS // max(1, len(their_numbers)))
    for first in range(0, len(ours.hashes) if len(their_numbers) else 0, step):
        part = slice(first, first + step)
        correlation = ours.form[part] @ theirs.form.T
        readable = ours.readable[part, None] & theirs.readable
        alike = readable & (correlation >= MIN_CORRELATION) & (ours.spread[part, None] >= MIN_CONTRAST) & (theirs.spread >= MIN_CONTRAST)
        alike &= np.bitwise_count(ours.hashes[part, None] ^ theirs.hashes) <= MAX_BITS
        spreads = ours.spread[part, None] ** 2 + theirs.spread**2 - 2 * ours.spread[part, None] * theirs.spread * correlation
        difference = (ours.mean[part, None] - theirs.mean) ** 2 + spreads  # mean square, of the thumbnails as they were
        equal = readable & (ours.size[part, None] == theirs.size) & (difference <= MAX_DIFFERENCE**2)
        yield np.arange(first, first + len(correlation)), their_numbers, alike, equal
