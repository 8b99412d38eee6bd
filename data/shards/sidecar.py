"""The sidecar index of a shard: one row per complete sample, and the rejected samples."""

import hashlib
import re
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.shards import encoded, notes, pictures, table
from data.storage.http import FileInfo
from data.storage.transport import Transport
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

FORM, VERSION = "dev2pro index", 1
ENDING = ".index"
MAX_BYTES = 1 << 28  # of a sidecar
MAX_REPEAT = 999  # how often an epoch takes a shard
LIMITS = {"picture": pictures.MAX_BYTES, "caption": pictures.MAX_CAPTION, "latents": 1 << 28, "text": 1 << 28}  # bytes of one member
PARTS = ("picture", "caption", *encoded.PARTS)
COLUMNS = {f"{part}_{what}": kind for part in PARTS for what, kind in (("offset", "<u8"), ("bytes", "<u4"), ("crc", "<u4"))} | {
    "caption_json": "u1", "caption_chars": "<u4", "width": "<u4", "height": "<u4", "key": "<u8",
}  # fmt: skip


@dataclass(frozen=True)
class Sidecar:
    """`head`: the shard's size, ETag or modification time, SHA-256, and the rejected samples. `columns`: one row per sample, see COLUMNS."""

    head: dict[str, Any]
    columns: dict[str, np.ndarray]

    def encode(self) -> bytes:
        """The file's bytes."""
        return table.encode(FORM, VERSION, self.head, self.columns)

    @property
    def info(self) -> FileInfo:
        """Size and ETag or modification time of the tar when it was indexed."""
        return FileInfo(self.head["size"], self.head["etag"], self.head["modified"])

    @property
    def repeat(self) -> int:
        """How often an epoch takes the shard, as the name of the packed folder said."""
        return self.head.get("repeat", 1)

    def __len__(self) -> int:
        return len(self.columns["key"])


def key_number(key: str) -> int:
    """64 bits of BLAKE2b: enough to tell the samples of a shard apart."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def path_of(url: str, folder: str | None = None) -> str:
    """The path of a shard's sidecar: beside the shard, or in `folder` under a name that is unique to the URL."""
    if folder is None:
        return url + ENDING
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rsplit("/", 1)[-1])[-100:]
    return f"{folder}/{name}-{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}{ENDING}"


def read(url: str, transport: Transport, folder: str | None = None) -> Sidecar:
    """Reads the sidecar of a shard. Raises DataError if it is missing or damaged."""
    sidecar_path = path_of(url, folder)
    try:
        head, columns = table.decode(transport.read_all(sidecar_path, MAX_BYTES), FORM, VERSION, redact_url(sidecar_path))
        if {name: column.dtype for name, column in columns.items()} != {name: np.dtype(kind) for name, kind in COLUMNS.items()}:
            raise DataError(f"{redact_url(sidecar_path)} is damaged: it has other columns than an index.")
        if not _is_sound(head):
            raise DataError(f"{redact_url(sidecar_path)} is damaged: its notes or repeats are none.")
    except DataError as error:
        command = shlex.join(["python", "-m", "data.index", redact_url(url), *(["--to", redact_url(folder)] if folder else [])])
        raise DataError(
            f"{redact_url(url)} is not indexed ({str(error).partition('. ')[0]}). Index it with `{command}`, "
            "which also says what is wrong with a shard that it rejects."
        ) from error
    return Sidecar(head, columns)


def _is_sound(head: dict[str, Any]) -> bool:
    """Whether the values that only some sidecars have are those that an index has."""
    try:
        notes.checked(head.get("altered", {}))
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    return type(head.get("repeat", 1)) is int and 1 <= head.get("repeat", 1) <= MAX_REPEAT
