"""Strict tar reader: yields every member, or raises an error with the byte offset of the damage.

Python's tarfile and webdataset take a damaged header, or a file that was cut between two members, for the end of the archive.
Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU long names (https://www.gnu.org/software/tar/manual/html_node/Standard.html).
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_EXTENSION = 1 << 20  # bytes of one pax record or long name
RECORD = 20  # blocks that tar, Python and webdataset pad a tar to
MOST_ZEROS = (RECORD + 1) * BLOCK  # an end mark, and the padding to a record
LARGE_RECORDS = sorted(  # blocks that people ask for (tar -b), 32 KiB to 16 MiB
    {n << k for n in (1, 5) for k in range(16) if 64 <= n << k <= 1 << 15}
    | {n * 10**k for n in (1, 2, 5) for k in range(1, 5) if 64 <= n * 10**k < 1 << 15}
)
CHUNK = 1 << 20  # bytes of padding read at a time
ADLER = 65521
OCTAL = re.compile(rb"[ \0]*([0-7]+)[ \0]*")  # int() would take signs and underscores as well

OTHER_KINDS = {
    b"1": "a hard link (tar --hard-dereference writes files)", b"2": "a symbolic link (tar --dereference writes files)", b"K": "a link",
    b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file (tar without --sparse writes whole ones)",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}

ReadAt = Callable[[int, int], bytes]  # (offset, length) -> that many bytes, fewer at the end of the file


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


class DamagedTar(ValueError):
    """A tar that is damaged at byte `offset`."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset, self.reason = offset, reason


def walk(read_at: ReadAt, size: int) -> Iterator[Member]:
    """Every regular file of a tar of `size` bytes, in order. Raises DamagedTar at the first violation of the format.

    Calls `read_at` with increasing offsets only. Refuses links, devices and sparse files, and skips directories.
    """
    position, extended, last = 0, dict[str, str](), 0
    while True:
        block = read_at(position, BLOCK)
        if block == ZEROS:
            if extended:
                raise DamagedTar(position, "an end mark where the member of a long name or pax header was to come")
            return _check_end(read_at, position, size, last)
        if len(block) < BLOCK or not _checksum_matches(block):
            raise DamagedTar(min(position, size), _header_problem(block, position))
        kind, length = block[156:157], _number(block[124:136], position)
        if kind in b"0\0":
            name = name_of(block)
            if extended:
                name = extended.get("path") or name
                length = _pax_size(extended["size"], position) if "size" in extended else length
                extended = {}
            if position + BLOCK + length > size:
                raise DamagedTar(position, f"{name!r} has {length} bytes, of which the file holds {max(0, size - position - BLOCK)}")
            yield Member(name, position + BLOCK, length)
            last = read_at(position + BLOCK + length - 1, 1)[0] if length else 1
        elif kind in b"xgL":  # of the next member: pax records, global ones, a GNU long name
            extended |= _extension(kind, read_at(position + BLOCK, min(length, MAX_EXTENSION + 1)), length, position)
        elif kind == b"5":
            extended, length = {}, 0
        else:
            what = OTHER_KINDS.get(kind, f"a member of type {kind!r}")
            raise DamagedTar(position, f"{extended.get('path') or name_of(block)!r} is {what}; only files and folders are read")
        position += BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK


def _checksum_matches(block: bytes) -> bool:
    """Whether the checksum matches: the sum of all bytes, with its own field as spaces. Adler-32 holds this sum modulo 65521, 20 times faster."""
    stated = OCTAL.fullmatch(block, 148, 156)
    return stated is not None and (int(stated[1], 8) + sum(block[148:156]) - 8 * 32 + 1) % ADLER == zlib.adler32(block) & 0xFFFF


def _header_problem(block: bytes, position: int) -> str:
    """Why a block is no header. For the first block, names the actual file type."""
    packed = next((name for magic, name in COMPRESSED.items() if block.startswith(magic)), "")
    if packed and position == 0:
        return f"this is a {packed} file, and shards are plain tars; unpack it"
    begins = f"; the file begins with {block[:16]!r}" if block and position == 0 else ""
    why = "no tar header (its checksum is wrong)" if len(block) == BLOCK else "the file ends here, without the end mark of a tar"
    return why + begins


def _number(field: bytes, position: int) -> int:
    """Octal, or GNU's base 256 for sizes of 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if match := OCTAL.fullmatch(field):
        return int(match[1], 8)
    if field.strip(b" \0"):
        raise DamagedTar(position, f"a size of {field!r}")
    return 0


def _pax_size(text: str, position: int) -> int:
    if not re.fullmatch("[0-9]{1,20}", text):
        raise DamagedTar(position, f"a pax header that gives a size of {text[:20]!r}")
    return int(text)


def name_of(block: bytes) -> str:
    """The name in a header block."""
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU's own format has other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extension(kind: bytes, content: bytes, length: int, position: int) -> dict[str, str]:
    """Parses an extension header: its records by name; a long name as `path`."""
    if length > MAX_EXTENSION or len(content) < length:
        raise DamagedTar(position, f"a header extension of {length} bytes, of which {len(content)} are there and {MAX_EXTENSION} allowed")
    if kind == b"L":
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    records, start = dict[str, str](), 0
    while start < length:
        digits = content[start : start + 8].partition(b" ")[0]  # 8 digits are more than MAX_EXTENSION
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = content[start + len(digits) + 1 : end].partition(b"=")
        if not start < end <= length or not equals or not value.endswith(b"\n"):
            raise DamagedTar(position, "pax records that cannot be read")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        start = end
    if any(key.startswith("GNU.sparse") for key in records):
        raise DamagedTar(position, "a sparse file (tar without --sparse writes whole ones); only files and folders are read")
    if kind == b"g":
        if "path" in records or "size" in records:
            raise DamagedTar(position, "a global pax header that names or sizes members")
        return {}
    return records


def _check_end(read_at: ReadAt, position: int, size: int, last: int) -> None:
    """Checks that two zero blocks and at most the zero padding of a record follow: a zeroed header in the middle is no end.

    `last`: the last byte of the last member, which is 0 where that was not written to its end; 0 without members, 1 for an empty one.
    """
    if size < position + 2 * BLOCK:
        raise DamagedTar(position, "the file ends here, with half of a tar's end mark")
    joined = DamagedTar(position, "an end mark with more data behind it: a header was overwritten with zeros, or tars were joined")
    if any(read_at(position, MOST_ZEROS + 1)):
        raise joined
    if size - position > MOST_ZEROS and (last == 0 or not _fills_record(size, size - position)):
        raise DamagedTar(position, f"{size - position} bytes that begin with zeros, more than a tar's end has: the rest was never written here")
    if any(any(read_at(offset, CHUNK)) for offset in range(position, size, CHUNK)):
        raise joined


def _fills_record(size: int, zeros: int) -> bool:
    """Whether a tar of `size` bytes may end with so many zeros because its records are large (tar -b).

    A file whose rest was never written has the size of a tar, too: a multiple of 20 blocks, as a rule. So where it is one, only the record
    sizes that people choose count: powers of two, five times those, and round numbers.
    """
    blocks, least = size // BLOCK, -(-zeros // BLOCK) - 1
    candidates = LARGE_RECORDS if blocks % RECORD == 0 else range(RECORD, LARGE_RECORDS[-1] + 1)
    return size % BLOCK == 0 and any(record >= least and blocks % record == 0 for record in candidates)
