"""Builds intact and damaged shards, and runs the data commands as a user does."""

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
    """About 2 KB: three pairs exceed a tar's padding."""
    return encoded(noise(seed, width, height), "JPEG", quality=95, subsampling=0)


def pairs(count: int = 6) -> list[tuple[str, bytes]]:
    return [one for i in range(count) for one in ((f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", b"picture %d" % i))]


def tar(members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: bytes, size: int = 0, kind: bytes = b"0", fields: Mapping[int, bytes] = MappingProxyType({})) -> bytes:
    """A handmade header with a valid checksum. `fields`: offset -> bytes."""
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


def header_offset(content: bytes, name: str) -> int:
    """The offset of a member's header."""
    return next(at for at in range(0, len(content), 512) if content[at:].startswith(name.encode() + b"\0"))


# ---- damages: an intact shard of `pairs()` -> (damaged bytes, offset at which that is detected, words of the reason) ----------------------------

Damage = Callable[[bytes], tuple[bytes, int, str]]


def _at(name: str, damage: Callable[[bytes, int], bytes], expected: str, past: str = "") -> Damage:
    """A damage at a member's header, detected there or at the header of `past`."""
    return lambda good: (damage(good, header_offset(good, name)), header_offset(good, past or name), expected)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :]


def _replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


GARBAGE = np.random.default_rng(1).bytes(512)
ENDS = "the file ends here, without the end mark"
SILENT: dict[str, Damage] = {  # webdataset reports none of these
    "cut between samples": _at("0003.jpg", lambda good, at: good[:at], ENDS),
    "cut inside a header": _at("0003.jpg", lambda good, at: good[: at + 100], ENDS),
    "cut after the jpg of a pair": _at("0003.txt", lambda good, at: good[:at], ENDS),
    "flipped byte in a header": _at("0003.jpg", lambda good, at: _flipped(good, at + 130), "no tar header"),
    "garbage header": _at("0003.jpg", lambda good, at: _replaced(good, at, GARBAGE), "no tar header"),
    "zeroed header": _at("0003.jpg", lambda good, at: _replaced(good, at, bytes(512)), "end mark with more data behind it"),
    "rest never written": _at("0003.jpg", lambda good, at: good[:at] + bytes(len(good) - at), "more than a tar's end has"),
    "two tars joined": lambda good: (good + good, header_offset(good, "0005.txt") + 1024, "tars were joined"),
}
DAMAGES = SILENT | {
    "cut inside member data": _at("0003.jpg", lambda good, at: good[: at + 512 + 100], "of which the file holds 100"),
    "cut behind a header": _at("0003.jpg", lambda good, at: good[: at + 512], "of which the file holds 0"),
    "cut inside padding": lambda good: (good[: (cut := header_offset(good, "0003.txt") + 512 + 30)], cut, ENDS),
    "rest of a picture never written": _at("0003.jpg", lambda good, at: good[: at + 600] + bytes(len(good) - at - 600), "more than a", "0003.txt"),
    "half an end mark": lambda good: (good[: (end := header_offset(good, "0005.txt") + 1024) + 512], end, "half of a tar's end mark"),
    "0-byte file": lambda _: (b"", 0, ENDS),
    "HTML body": lambda _: (HTML, 0, "begins with b'<!DOCTYPE html>"),
    "long HTML body": lambda _: (HTML * 100, 0, "begins with b'<!DOCTYPE html>"),
    "gzip": lambda good: (gzip.compress(good), 0, "a gzip file, and shards are plain tars; unpack it"),
}  # fmt: skip


# ---- reading them -----------------------------------------------------------------------------------------------------------------


def scanned(path: Path, content: bytes | None = None, **policy: bool) -> Sidecar:
    if content is not None:
        path.write_bytes(content)
    return scan.scan(str(path), Transport(ReadConfig()), **policy)


def indexed(path: Path, content: bytes | None = None, folder: str | None = None, **policy: bool) -> index.Outcome:
    if content is not None:
        path.write_bytes(content)
    return index.index(str(path), Transport(ReadConfig()), folder, **policy)


def rows(entry: Sidecar) -> list[dict[str, int]]:
    return [{name: int(column[i]) for name, column in entry.columns.items()} for i in range(len(entry))]


def parts(path: Path, entry: Sidecar, part: str = "picture") -> list[bytes]:
    """The bytes that the index points to."""
    content = path.read_bytes()
    return [content[row[f"{part}_offset"] :][: row[f"{part}_bytes"]] for row in rows(entry)]


def rejected(entry: Sidecar) -> dict[str, tuple[int, str]]:
    return {rejection["key"]: (rejection["offset"], rejection["reason"]) for rejection in entry.head["rejected"]}


def refusal(work: Callable[[], object], kind: type[StageError] = DataError) -> str:
    """The message of an error: one paragraph without control characters."""
    with pytest.raises(kind) as caught:
        work()
    assert re.fullmatch(r"[ -~\u00a1-\U0010ffff]+", str(caught.value))
    return str(caught.value)


def called(main: Callable[[], None], *args: str | Path) -> tuple[object, str, str]:
    """Runs a command within this process, which is faster. Returns exit code, stdout, stderr."""
    stdout, stderr, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
    signal.signal(signal.SIGTERM, before)
    return caught.value.code, stdout.getvalue(), stderr.getvalue()


def command(module: str, *args: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], cwd=cwd or ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, errors="surrogateescape", timeout=300, check=False,
    )  # fmt: skip
