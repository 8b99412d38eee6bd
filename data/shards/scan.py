"""Scans a tar once and lists every sample: its offsets and metadata, or why it is rejected."""

import hashlib
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.shards import encoded, notes, pictures, tar
from data.shards.pictures import BadContent
from data.shards.sidecar import COLUMNS, LIMITS, PARTS, Sidecar, key_number
from data.shards.tar import DamagedTar, Member
from data.storage.http import FileInfo
from data.storage.transport import Transport
from dev2pro.errors import DataError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

CHUNK = 8 << 20  # bytes of a tar read at a time
MAX_MEMBERS = 4_000_000  # of one shard
NAME = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)  # as webdataset has it: a key ends at the first dot of a file's name
KINDS = 100  # suffixes of ignored members that are counted separately
MAX_TEXT = 500  # characters of a name or reason; a pax header has room for a million


def scan(url: str, transport: Transport, *, empty_captions: bool = False, allow_partial: bool = False) -> Sidecar:
    """The sidecar of a shard. Raises DataError, naming the byte, for a tar that is damaged.

    `empty_captions` keeps samples without a usable caption; `allow_partial` keeps the complete samples before a damage.
    """
    info = transport.info(url)
    reader, builder, partial = _HashingReader(url, transport, info), _SidecarBuilder(empty_captions), None
    try:
        for member in tar.walk(reader.read_at, info.size):
            builder.add(member, reader)
    except DamagedTar as error:
        reason = printable(error.reason[:MAX_TEXT])
        if not allow_partial:
            raise DataError(
                f"{redact_url(url)} is rejected at byte {error.offset}: {reason}. Copy or write the shard again, "
                "or index it with --allow-partial to use the whole samples before that byte."
            ) from error
        builder.cut, partial = True, {"offset": error.offset, "reason": reason}
    reader.read_at(info.size, 0)  # hashes the rest of the file
    policy = {"empty_captions": empty_captions, "allow_partial": allow_partial}
    return Sidecar({**info.json(), "sha256": reader.hash.hexdigest(), "partial": partial, "policy": policy, **builder.head()}, builder.columns())


class _HashingReader:
    """Reads a tar forwards in chunks and hashes all of it."""

    def __init__(self, url: str, transport: Transport, info: FileInfo) -> None:
        self.url, self.transport, self.info = url, transport, info
        self.hash = hashlib.sha256()
        self._buffer, self._start = b"", 0

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`, which must not decrease; fewer at the end of the file."""
        end = min(offset + length, self.info.size)
        while (reached := self._start + len(self._buffer)) < end:
            chunk = self.transport.read(self.url, reached, min(CHUNK, self.info.size - reached), self.info)
            self.hash.update(chunk)
            rest = self._buffer[offset - self._start :] if offset < reached else b""
            self._start, self._buffer = reached - len(rest), rest + chunk
        return self._buffer[offset - self._start : end - self._start]


Rejection = tuple[int, str]  # a byte of the tar, and what is wrong there


@dataclass
class _Sample:
    """The members of one key so far: part -> (offset, bytes, crc). `no_caption`, `no_picture`: why an existing one was not accepted."""

    offset: int
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    altered: tuple[str, ...] = ()
    chars: int = 0
    json: bool = False
    bad: Rejection | None = None
    no_caption: Rejection | None = None
    no_picture: Rejection | None = None


class _SidecarBuilder:
    """Collects members into sidecar rows."""

    def __init__(self, empty_captions: bool) -> None:
        self.empty_captions, self.cut = empty_captions, False
        self.samples: dict[str, _Sample] = {}
        self.names: set[str] = set()
        self.ignored: Counter[str] = Counter()
        self.fingerprints: dict[str, Any] = {}

    def add(self, member: Member, reader: _HashingReader) -> None:
        """Adds one member. Raises DamagedTar for a duplicate name."""
        match = NAME.fullmatch(member.name)
        suffix = match[2].lower() if match else ""
        part = _part(suffix)
        if match is None or part is None:
            kind = printable(f".{suffix[:40]}" if match else "without a key")
            self.ignored[kind if kind in self.ignored or len(self.ignored) < KINDS else "others"] += 1
        if match is None or (part is None and suffix.rpartition(".")[2] not in {**pictures.SUFFIXES, **pictures.PLUGINS}):
            return
        if member.name in self.names:
            raise DamagedTar(member.offset - tar.BLOCK, f"{member.name!r} is there twice; webdataset would drop or mix samples")
        if len(self.names) >= MAX_MEMBERS:
            raise DamagedTar(member.offset - tar.BLOCK, f"more than {MAX_MEMBERS:,} members; write smaller shards")
        self.names.add(member.name)
        sample = self.samples.setdefault(match[1], _Sample(member.offset))
        if part is None:
            sample.no_picture = sample.no_picture or (
                member.offset,
                f"{member.name!r} is no picture of a sample: a key ends at the first dot. Rename it"
                if suffix not in pictures.PLUGINS
                else f"a .{suffix} is read only where {pictures.PLUGINS[suffix]} is installed (pip install {pictures.PLUGINS[suffix]})",
            )
        elif part == "caption":
            self._add_caption(sample, suffix == "json", member, reader)
        else:
            try:
                self._add_part(sample, part, member, reader)
            except BadContent as error:
                sample.bad = sample.bad or (member.offset, str(error))

    def _add_part(self, sample: _Sample, part: str, member: Member, reader: _HashingReader) -> None:
        if part in sample.parts:
            raise BadContent(f"it has two {'pictures' if part == 'picture' else f'members with {part}'}")
        content = _content(part, member, reader)
        if part == "picture":
            sample.size, sample.altered = pictures.size(content), pictures.alterations(content)
        elif self.fingerprints.setdefault(part, fingerprint := encoded.fingerprint(content)) != fingerprint:
            raise BadContent(f"its {part} were made in another way than those before it in the shard")
        sample.parts[part] = (member.offset, member.size, zlib.crc32(content))

    def _add_caption(self, sample: _Sample, json: bool, member: Member, reader: _HashingReader) -> None:
        """A .txt overrides a .json regardless of order. An unusable caption counts as missing."""
        if "caption" in sample.parts and sample.json == json:
            sample.bad = sample.bad or (member.offset, "it has two captions")
        if "caption" in sample.parts and json:
            return
        try:
            content = _content("caption", member, reader)
            sample.chars = max(map(len, pictures.captions(content, "json" if json else "txt")))
        except BadContent as error:
            sample.no_caption = sample.no_caption or (member.offset, str(error))
            return
        sample.json, sample.parts["caption"] = json, (member.offset, member.size, zlib.crc32(content))

    def head(self) -> dict[str, Any]:
        """Counts and rejections."""
        rejected = [
            {"key": printable(key[:MAX_TEXT]), "offset": rejection[0], "reason": printable(rejection[1][:MAX_TEXT])}
            for key, sample in self.samples.items() if (rejection := self._rejection(sample))
        ]  # fmt: skip
        altered: notes.Notes = {}
        for key, sample in self.samples.items():
            for kind in sample.altered if not self._rejection(sample) else ():
                notes.add(altered, kind, [printable(key[:MAX_TEXT])])
        more = {"altered": altered} if altered else {}
        return {"rejected": rejected, "ignored": dict(self.ignored), "encodings": self.fingerprints, **more}

    def _rejection(self, sample: _Sample) -> Rejection | None:
        if sample.bad:
            return sample.bad
        if "picture" not in sample.parts:
            return sample.no_picture or (sample.offset, "it has no picture")
        if "caption" not in sample.parts and not self.empty_captions:
            return sample.no_caption or (sample.offset, "it has no caption")
        if "caption" not in sample.parts and self.cut and not sample.no_caption:
            return sample.offset, "it has no caption before the damage"
        missing = [part for part in self.fingerprints if part not in sample.parts]
        return (sample.offset, f"it has no {missing[0]}") if missing else None

    def columns(self) -> dict[str, np.ndarray]:
        """One row per accepted sample, in tar order."""
        accepted = [(key, s) for key, s in self.samples.items() if not self._rejection(s)]
        rows = [
            [*(number for part in PARTS for number in s.parts.get(part, (0, 0, 0))), s.json, s.chars, *s.size, key_number(key)] for key, s in accepted
        ]
        by_column = zip(*rows, strict=True) if rows else [[] for _ in COLUMNS]
        return {name: np.array(values, kind) for (name, kind), values in zip(COLUMNS.items(), by_column, strict=True)}


def _content(part: str, member: Member, reader: _HashingReader) -> bytes:
    if member.size > LIMITS[part]:
        raise BadContent(f"its {part} has {member.size:,} bytes, more than {LIMITS[part]:,}")
    return reader.read_at(member.offset, member.size)


def _part(suffix: str) -> str | None:
    if suffix in pictures.SUFFIXES:
        return "picture"
    if suffix in ("txt", "json"):
        return "caption"
    return next((part for part in encoded.PARTS if suffix == f"{part}.safetensors"), None)
