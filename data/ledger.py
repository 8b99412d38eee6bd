"""Ledger of consumed shards: a JSON Lines file with one line per finished run, listing shard hashes."""

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from filelock import FileLock

from data.storage.transport import write_atomic
from dev2pro.errors import DataError
from dev2pro.escape import printable
from dev2pro.redact import redact_url


def record(path: str, run: str, snapshot: str, shards: list[str], epochs: float) -> None:
    """Records a finished run once: its id, its snapshot's id, and the SHA-256 of the shards.

    Shards count as consumed after at least one epoch; a shorter run lists none.
    """
    with FileLock(path + ".lock"):
        lines = _lines(path)
        if any(line["run"] == run for line in lines):
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines.append({"run": run, "snapshot": snapshot, "epochs": round(epochs, 4), "finished": now, "shards": shards if epochs >= 1 else []})
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def consumed(path: str) -> set[str]:
    """SHA-256 of every shard that a finished run consumed. A missing ledger counts as empty."""
    return {sha256 for line in _lines(path) for sha256 in line["shards"]}


def quarantined(paths: Iterable[str]) -> frozenset[tuple[str, int]]:
    """(SHA-256 of the shard, key number) of every line of quarantine files that runs have written."""
    lines = (line for path in paths for line in _read(path, _is_fault))
    return frozenset((line["shard_sha256"], line["key_number"]) for line in lines)


def _is_fault(line: Any) -> bool:
    return isinstance(line["shard_sha256"], str) and isinstance(line["key_number"], int) and 0 <= line["key_number"] < 2**64


def _is_run(line: Any) -> bool:
    return isinstance(line["shards"], list) and all(isinstance(text, str) for text in [line["run"], *line["shards"]])


def _lines(path: str) -> list[dict[str, Any]]:
    return _read(path, _is_run) if os.path.exists(path) else []


def _read(path: str, fits: Callable[[Any], bool]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not fits(value := json.loads(line)):
                    raise ValueError("not what a run writes")
                rows.append(value)
    except OSError as error:
        raise DataError(f"{redact_url(path)} cannot be read: {error.strerror}. Correct the path.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = printable(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{redact_url(path)} is damaged in line {len(rows) + 1} ({why}). Correct the path, or take the line out, which forgets what it says."
        ) from error
    return rows
