"""Builds shards, whole and damaged in every way, and runs the commands of the data room as a user does."""

import contextlib
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from data import index
from data.shards import scan
from data.shards.sidecar import Sidecar
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError, StageError

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(1024)
HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(seed: int = 0, width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def jpeg(seed: int = 0, width: int = 32, height: int = 24) -> bytes:
    """Some 2 KB of them: three pairs are more than a tar's padding."""
    return encoded(noise(seed, width, height), "JPEG", quality=95, subsampling=0)


def pairs(count: int = 6) -> list[tuple[str, bytes]]:
    return [one for i in range(count) for one in ((f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", b"picture %d" % i))]


def tar(members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: bytes, size: int = 0, kind: bytes = b"0", fields: Mapping[int, bytes] = MappingProxyType({})) -> bytes:
    """A header made by hand, `fields` by their place in it; its checksum is right."""
    block = bytearray(512)
    for start, value in {0: name, 100: b"0000644\0", 124: b"%011o\0" % size, 156: kind, 257: b"ustar\x0000", **fields}.items():
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, content: bytes, kind: bytes = b"0", fields: Mapping[int, bytes] = MappingProxyType({})) -> bytes:
    return header(name, len(content), kind, fields) + content + bytes(-len(content) % 512)


def pax(**records: str | bytes) -> bytes:
    """A pax header for the next member; _ in a key stands for a dot."""
    content = b""
    for key, value in records.items():
        record = b" " + key.replace("_", ".").encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = next(n for n in range(len(record), len(record) + 9) if len(str(n)) + len(record) == n)
        content += str(length).encode() + record
    return member(b"pax", content, b"x")


def place_of(content: bytes, name: str) -> int:
    """Where a member's header begins."""
    return next(at for at in range(0, len(content), 512) if content[at:].startswith(name.encode() + b"\0"))


# ---- damages: what becomes of a good shard of `pairs()`, the byte where that is seen, and words of the reason ----------------------------

Damage = Callable[[bytes], tuple[bytes, int, str]]


def _at(name: str, damage: Callable[[bytes, int], bytes], words: str, past: str = "") -> Damage:
    """A damage at a member's header, seen there or at the header of `past`."""
    return lambda good: (damage(good, place_of(good, name)), place_of(good, past or name), words)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :]


def _replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


GARBAGE = np.random.default_rng(1).bytes(512)
ENDS = "the file ends here, without the end mark"
SILENT: dict[str, Damage] = {  # of which webdataset says nothing
    "cut between samples": _at("0003.jpg", lambda good, at: good[:at], ENDS),
    "cut inside a header": _at("0003.jpg", lambda good, at: good[: at + 100], ENDS),
    "cut after the jpg of a pair": _at("0003.txt", lambda good, at: good[:at], ENDS),
    "flipped byte in a header": _at("0003.jpg", lambda good, at: _flipped(good, at + 130), "no tar header"),
    "garbage header": _at("0003.jpg", lambda good, at: _replaced(good, at, GARBAGE), "no tar header"),
    "zeroed header": _at("0003.jpg", lambda good, at: _replaced(good, at, bytes(512)), "end mark with more data behind it"),
    "rest never written": _at("0003.jpg", lambda good, at: good[:at] + bytes(len(good) - at), "more than a tar's end has"),
    "two tars joined": lambda good: (good + good, place_of(good, "0005.txt") + 1024, "tars were joined"),
}
DAMAGES = SILENT | {
    "cut inside member data": _at("0003.jpg", lambda good, at: good[: at + 512 + 100], "of which the file holds 100"),
    "cut behind a header": _at("0003.jpg", lambda good, at: good[: at + 512], "of which the file holds 0"),
    "cut inside padding": lambda good: (good[: (cut := place_of(good, "0003.txt") + 512 + 30)], cut, ENDS),
    "rest of a picture never written": _at("0003.jpg", lambda good, at: good[: at + 600] + bytes(len(good) - at - 600), "more than a", "0003.txt"),
    "half an end mark": lambda good: (good[: (end := place_of(good, "0005.txt") + 1024) + 512], end, "half of a tar's end mark"),
    "0-byte file": lambda _: (b"", 0, ENDS),
    "HTML body": lambda _: (HTML, 0, "begins with b'<!DOCTYPE html>"),
    "long HTML body": lambda _: (HTML * 100, 0, "begins with b'<!DOCTYPE html>"),
    "gzip": lambda good: (gzip.compress(good), 0, "a gzip file, and shards are plain tars; unpack it"),
}  # fmt: skip


# ---- looking at them -----------------------------------------------------------------------------------------------------------------


def scanned(place: Path, content: bytes | None = None, **policy: bool) -> Sidecar:
    if content is not None:
        place.write_bytes(content)
    return scan.scan(str(place), Transport(ReadConfig()), **policy)


def indexed(place: Path, content: bytes | None = None, folder: str | None = None, **policy: bool) -> index.Outcome:
    if content is not None:
        place.write_bytes(content)
    return index.index(str(place), Transport(ReadConfig()), folder, **policy)


def rows(found: Sidecar) -> list[dict[str, int]]:
    return [{name: int(column[i]) for name, column in found.columns.items()} for i in range(len(found))]


def parts(place: Path, found: Sidecar, part: str = "picture") -> list[bytes]:
    """What the index points at."""
    content = place.read_bytes()
    return [content[row[f"{part}_offset"] :][: row[f"{part}_bytes"]] for row in rows(found)]


def rejected(found: Sidecar) -> dict[str, tuple[int, str]]:
    return {one["key"]: (one["offset"], one["reason"]) for one in found.head["rejected"]}


def refusal(work: Callable[[], object], kind: type[StageError] = DataError) -> str:
    """What an error says: one paragraph, without what a terminal would obey."""
    with pytest.raises(kind) as caught:
        work()
    assert re.fullmatch(r"[ -~\u00a1-\U0010ffff]+", str(caught.value))
    return str(caught.value)


def called(main: Callable[[], None], *words: str | Path) -> tuple[object, str, str]:
    """A command within this process, which is faster: its exit code, what it says, and what it says on stderr."""
    said, told, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
    signal.signal(signal.SIGTERM, before)
    return caught.value.code, said.getvalue(), told.getvalue()


def command(module: str, *words: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], cwd=cwd or ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, errors="surrogateescape", timeout=60, check=False,
    )  # fmt: skip
