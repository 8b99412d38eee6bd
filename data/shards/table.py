"""A JSON head and named columns of numbers in one file: the form of sidecars and snapshots. It is a safetensors file, so it carries no code."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from dev2pro.errors import DataError
from dev2pro.redact import redact_url

Columns = Mapping[str, np.ndarray]
DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading a damaged file may raise
KINDS = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def encode(form: str, version: int, head: dict[str, Any], columns: Columns) -> bytes:
    """The file's bytes; deterministic. Adds form, version and hashes of the columns and of the head itself to the head."""
    whole = {**head, "form": form, "version": version, "columns": columns_sum(columns)}
    return save(dict(columns), metadata={"head": json.dumps({**whole, "head": digest(whole)}, sort_keys=True)})


def columns_sum(columns: Columns) -> str:
    """SHA-256 of the columns as stored in a file."""
    layout, start, _ = _layout(content := save(dict(columns)))
    return _hash(layout, [memoryview(content)[start:]])


def decode(content: bytes, form: str, version: int, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(head, columns) of a file in memory. Raises DataError, which calls the file `name`, for one that is damaged or of another kind."""
    try:
        columns = load(content)
        layout, start, head = _layout(content)
    except DAMAGE as error:
        raise DataError(f"{name} is damaged or no {form} ({error}). Make it again.") from error
    _check(head, form, version, name, _hash(layout, [memoryview(content)[start:]]))
    return head, columns


def open_mapped(path: str, form: str, version: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Like `decode`, from a large file: the columns are memory-mapped, and read once for their hash."""
    try:
        with Path(path).open("rb") as file, safe_open(path, "numpy"):  # the library checks that the layout fits the file
            size = file.read(8)
            layout, start, head = _layout(size + file.read(int.from_bytes(size, "little")))
            columns = {name: _map_column(path, spec, start) for name, spec in layout.items()}
            checksum = _hash(layout, iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise DataError(f"{redact_url(path)} cannot be read: {error.strerror or error}. Correct the path, or make it again.") from error
    except DAMAGE as error:
        raise DataError(f"{redact_url(path)} is damaged or no {form} ({error}). Make it again.") from error
    _check(head, form, version, redact_url(path), checksum)
    return head, columns


def _layout(content: bytes) -> tuple[dict[str, Any], int, Any]:
    """(tensor layout, offset of the columns, head or {}) from a file's first bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    layout = json.loads(content[8:start])
    head = layout.pop("__metadata__", None)
    return layout, start, json.loads(head["head"]) if head else {}


def _map_column(path: str, spec: dict[str, Any], start: int) -> np.ndarray:
    kind, shape = KINDS[spec["dtype"]], tuple(spec["shape"])
    return np.memmap(path, kind, "r", start + spec["data_offsets"][0], shape) if all(shape) else np.empty(shape, kind)


def _hash(layout: dict[str, Any], parts: Iterable[Any]) -> str:
    """SHA-256 over the layout and all that follows it."""
    hasher = hashlib.sha256(json.dumps(layout, sort_keys=True).encode())
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _check(head: Any, form: str, version: int, name: str, checksum: str) -> None:
    """Checks form, version and hashes. Removes the head's own hash from it."""
    if not isinstance(head, dict) or head.get("form") != form:
        raise DataError(f"{name} is no {form}. Correct the path.")
    if head.get("version") != version:
        raise DataError(f"{name} is a {form} of version {head.get('version')}; this dev2pro reads version {version}. Make it again.")
    if head.pop("head", None) != digest(head) or head.get("columns") != checksum:
        raise DataError(f"{name} is damaged: its contents are not those it was written with. Make it again.")
