"""What earlier runs consumed: a file of JSON lines, one for each finished run, by the contents of the shards."""

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from filelock import FileLock

from data.storage import urls
from data.storage.transport import write_atomic
from dev2pro.errors import DataError


def record(path: str, run: str, snapshot: str, shards: list[str], epochs: float) -> None:
    """Notes that a run has finished, once: its id, that of its snapshot, and the SHA-256 of the shards.

    They count as consumed if the run saw every sample, that is from one epoch on; of a shorter run no shard is listed.
    """
    with FileLock(path + ".lock"):
        lines = _lines(path)
        if any(line["run"] == run for line in lines):
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines.append({"run": run, "snapshot": snapshot, "epochs": round(epochs, 4), "finished": now, "shards": shards if epochs >= 1 else []})
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def consumed(path: str) -> set[str]:
    """SHA-256 of every shard that a finished run consumed. A ledger that is not there yet is an empty one."""
    return {sha256 for line in _lines(path) for sha256 in line["shards"]}


def quarantined(paths: Iterable[str]) -> frozenset[tuple[str, int]]:
    """(SHA-256 of the shard, key number) of every line of quarantine files that runs have written."""
    lines = (line for path in paths for line in _read(path, _names_a_sample))
    return frozenset((line["shard_sha256"], line["key_number"]) for line in lines)


def _names_a_sample(line: Any) -> bool:
    return isinstance(line["shard_sha256"], str) and isinstance(line["key_number"], int) and 0 <= line["key_number"] < 2**64


def _names_a_run(line: Any) -> bool:
    return isinstance(line["shards"], list) and all(isinstance(text, str) for text in [line["run"], *line["shards"]])


def _lines(path: str) -> list[dict[str, Any]]:
    return _read(path, _names_a_run) if os.path.exists(path) else []


def _read(path: str, fits: Callable[[Any], bool]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for text in file:
                if not fits(line := json.loads(text)):
                    raise ValueError("not what a run writes")
                found.append(line)
    except OSError as error:
        raise DataError(f"{urls.redact_url(path)} cannot be read: {error.strerror}. Correct the path.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = urls.printable(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{urls.redact_url(path)} is damaged in line {len(found) + 1} ({why}). Correct the path, or take the line out, which forgets what it says."
        ) from error
    return found
