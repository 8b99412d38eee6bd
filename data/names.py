"""What a sample is called in messages: its folder and name where a packed folder was given, else its shard and name."""

import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

from data.loading.read import Reader
from data.shards import table, tar
from data.shards.snapshot import Snapshot
from data.storage.transport import ReadConfig
from dev2pro.escape import printable
from dev2pro.redact import redact_url

HEADERS = 8 * tar.BLOCK  # bytes before a picture in which its headers are looked for


def packed_folder(folder: str, listing: str, cache: str) -> str:
    """Where the shards of a folder of pictures with this listing are kept; `<that>.files.json` lists what was in it."""
    return f"{cache}/packed/{table.digest([os.path.abspath(folder), listing])[:16]}"


class Names:
    """The names of a snapshot's samples; reads a sample's header for each."""

    def __init__(self, snapshot: Snapshot, read: ReadConfig) -> None:
        self.snapshot = snapshot
        self._reader = Reader(snapshot, read, ())
        self._folders = {packed_folder(folder, listing, read.cache): folder for folder, listing in snapshot.head["folders"].items()}

    def place(self, url: str) -> str:
        """The folder that was packed into a shard, or the shard."""
        return redact_url(self._folders.get(str(Path(url).parent), url))

    def __call__(self, row: int) -> str:
        """The name of a sample."""
        shard, offset = self.snapshot.shard(row), self.snapshot.span(row, "picture").offset
        headers = self._reader.transport.read(shard.url, start := max(0, offset - HEADERS), offset - start, shard.info)
        return f"{printable(self.place(shard.url))}/{printable(_long_name(headers)) or self._reader.key(row)}"


def _long_name(headers: bytes) -> str:
    """The name in a pax or GNU header, which long and non-Latin ones need, from the bytes before a member's content; "" if there is none."""
    for first in range(len(headers) - 3 * tar.BLOCK, -1, -tar.BLOCK):
        block = headers[first : first + tar.BLOCK]
        with suppress(tarfile.TarError, ValueError):
            if block[257:262] == b"ustar" and block[156:157] in (b"x", b"L"):
                length = -(-int(block[124:136].strip(b"\0 "), 8) // tar.BLOCK) * tar.BLOCK
                if first + 2 * tar.BLOCK + length == len(headers):  # else it is another member's
                    return tarfile.open(fileobj=io.BytesIO(headers[first:]), encoding="utf-8").next().name  # type: ignore[union-attr]
    return ""
