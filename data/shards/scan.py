"""Reads a shard once, from its first byte to its last, and notes every sample: where it lies, what it is, or why it is rejected."""

import hashlib
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.shards import encoded, pictures, tar
from data.shards.pictures import BadContent
from data.shards.sidecar import COLUMNS, LIMITS, PARTS, Sidecar, key_number
from data.shards.tar import DamagedTar, Member
from data.storage import urls
from data.storage.http import FileInfo
from data.storage.transport import Transport
from dev2pro.errors import DataError

CHUNK = 8 << 20  # bytes of a tar read at a time
MAX_MEMBERS = 4_000_000  # of one shard
NAME = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)  # as webdataset has it: a key ends at the first dot of a file's name
KINDS = 100  # of ignored members that are counted one by one
LONGEST = 500  # characters of a name or reason; a pax header has room for a million


def scan(place: str, transport: Transport, *, empty_captions: bool = False, allow_partial: bool = False) -> Sidecar:
    """The sidecar of a shard. Raises DataError, naming the byte, for a tar that is damaged.

    `empty_captions` keeps samples without a usable caption; `allow_partial` keeps the whole samples before a damage.
    """
    stamp = transport.info(place)
    window, draft, partial = _HashingReader(place, transport, stamp), _SidecarBuilder(empty_captions), None
    try:
        for member in tar.walk(window.read_at, stamp.size):
            draft.add(member, window)
    except DamagedTar as error:
        reason = urls.printable(error.reason[:LONGEST])
        if not allow_partial:
            raise DataError(
                f"{urls.redact_url(place)} is rejected at byte {error.offset}: {reason}. Copy or write the shard again, "
                "or index it with --allow-partial to use the whole samples before that byte."
            ) from error
        draft.cut, partial = True, {"offset": error.offset, "reason": reason}
    window.read_at(stamp.size, 0)  # the hash is of all of it
    policy = {"empty_captions": empty_captions, "allow_partial": allow_partial}
    return Sidecar({**stamp.json(), "sha256": window.hash.hexdigest(), "partial": partial, "policy": policy, **draft.head()}, draft.columns())


class _HashingReader:
    """A tar read forwards, chunk by chunk, with a running hash of all of it."""

    def __init__(self, place: str, transport: Transport, stamp: FileInfo) -> None:
        self.place, self.transport, self.stamp = place, transport, stamp
        self.hash = hashlib.sha256()
        self._held, self._start = b"", 0

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`, which never goes back; fewer at the end of the file."""
        end = min(offset + length, self.stamp.size)
        while (reached := self._start + len(self._held)) < end:
            chunk = self.transport.read(self.place, reached, min(CHUNK, self.stamp.size - reached), self.stamp)
            self.hash.update(chunk)
            keep = self._held[offset - self._start :] if offset < reached else b""
            self._start, self._held = reached - len(keep), keep + chunk
        return self._held[offset - self._start : end - self._start]


Why = tuple[int, str]  # a byte of the tar, and what is wrong there


@dataclass
class _Sample:
    """The members of one key so far: part -> (offset, bytes, crc). `no_caption`, `no_picture`: of those that are there and do not count."""

    offset: int
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    chars: int = 0
    json: bool = False
    bad: Why | None = None
    no_caption: Why | None = None
    no_picture: Why | None = None


class _SidecarBuilder:
    """Rows in the making."""

    def __init__(self, empty_captions: bool) -> None:
        self.empty_captions, self.cut = empty_captions, False
        self.samples: dict[str, _Sample] = {}
        self.names: set[str] = set()
        self.ignored: Counter[str] = Counter()
        self.fingerprints: dict[str, Any] = {}

    def add(self, member: Member, window: _HashingReader) -> None:
        """Takes one member in. Raises DamagedTar for a second one of the same name."""
        found = NAME.fullmatch(member.name)
        suffix = found[2].lower() if found else ""
        part = _part(suffix)
        if found is None or part is None:
            kind = urls.printable(f".{suffix[:40]}" if found else "without a key")
            self.ignored[kind if kind in self.ignored or len(self.ignored) < KINDS else "others"] += 1
        if found is None or (part is None and suffix.rpartition(".")[2] not in pictures.SUFFIXES):
            return
        if member.name in self.names:
            raise DamagedTar(member.offset - tar.BLOCK, f"{member.name!r} is there twice; webdataset would drop or mix samples")
        if len(self.names) >= MAX_MEMBERS:
            raise DamagedTar(member.offset - tar.BLOCK, f"more than {MAX_MEMBERS:,} members; write smaller shards")
        self.names.add(member.name)
        sample = self.samples.setdefault(found[1], _Sample(member.offset))
        if part is None:
            sample.no_picture = sample.no_picture or (
                member.offset,
                f"{member.name!r} is no picture of a sample: a key ends at the first dot. Rename it",
            )
        elif part == "caption":
            self._take_caption(sample, suffix == "json", member, window)
        else:
            try:
                self._take(sample, part, member, window)
            except BadContent as error:
                sample.bad = sample.bad or (member.offset, str(error))

    def _take(self, sample: _Sample, part: str, member: Member, window: _HashingReader) -> None:
        if part in sample.parts:
            raise BadContent(f"it has two {'pictures' if part == 'picture' else f'members with {part}'}")
        content = _content(part, member, window)
        if part == "picture":
            sample.size = pictures.size(content)
        elif self.fingerprints.setdefault(part, made := encoded.fingerprint(content)) != made:
            raise BadContent(f"its {part} were made in another way than those before it in the shard")
        sample.parts[part] = (member.offset, member.size, zlib.crc32(content))

    def _take_caption(self, sample: _Sample, json: bool, member: Member, window: _HashingReader) -> None:
        """A .txt goes before a .json, whichever comes first; one that cannot be used is as good as none."""
        if "caption" in sample.parts and sample.json == json:
            sample.bad = sample.bad or (member.offset, "it has two captions")
        if "caption" in sample.parts and json:
            return
        try:
            content = _content("caption", member, window)
            sample.chars = max(map(len, pictures.captions(content, "json" if json else "txt")))
        except BadContent as error:
            sample.no_caption = sample.no_caption or (member.offset, str(error))
            return
        sample.json, sample.parts["caption"] = json, (member.offset, member.size, zlib.crc32(content))

    def head(self) -> dict[str, Any]:
        """Counts and rejections."""
        rejected = [
            {"key": urls.printable(key[:LONGEST]), "offset": wrong[0], "reason": urls.printable(wrong[1][:LONGEST])}
            for key, sample in self.samples.items() if (wrong := self._wrong(sample))
        ]  # fmt: skip
        return {"rejected": rejected, "ignored": dict(self.ignored), "encodings": self.fingerprints}

    def _wrong(self, sample: _Sample) -> Why | None:
        if sample.bad:
            return sample.bad
        if "picture" not in sample.parts:
            return sample.no_picture or (sample.offset, "it has no picture")
        if "caption" not in sample.parts and not self.empty_captions:
            return sample.no_caption or (sample.offset, "it has no caption")
        if "caption" not in sample.parts and self.cut and not sample.no_caption:
            return sample.offset, "it has no caption before the damage"
        lacking = [part for part in self.fingerprints if part not in sample.parts]
        return (sample.offset, f"it has no {lacking[0]}") if lacking else None

    def columns(self) -> dict[str, np.ndarray]:
        """A row for each sample that is right, in the order of the tar."""
        right = [(key, s) for key, s in self.samples.items() if not self._wrong(s)]
        rows = [
            [*(number for part in PARTS for number in s.parts.get(part, (0, 0, 0))), s.json, s.chars, *s.size, key_number(key)] for key, s in right
        ]
        by_column = zip(*rows, strict=True) if rows else [[] for _ in COLUMNS]
        return {name: np.array(values, kind) for (name, kind), values in zip(COLUMNS.items(), by_column, strict=True)}


def _content(part: str, member: Member, window: _HashingReader) -> bytes:
    if member.size > LIMITS[part]:
        raise BadContent(f"its {part} has {member.size:,} bytes, more than {LIMITS[part]:,}")
    return window.read_at(member.offset, member.size)


def _part(suffix: str) -> str | None:
    if suffix in pictures.SUFFIXES:
        return "picture"
    if suffix in ("txt", "json"):
        return "caption"
    return next((part for part in encoded.PARTS if suffix == f"{part}.safetensors"), None)
