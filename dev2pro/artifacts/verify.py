"""Verifies an artifact against its record: the id, and every file's size and contents."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import DataError

CURE = "Bring the old file back, pull the artifact again, or make it again."


def record_mismatch(artifact: Artifact) -> str:
    """Recomputes the id from the record's contents. Returns what does not match, or an empty string."""
    if record.digest(artifact.config) != artifact.config_digest:
        return "its configuration is not the one it was written with"
    if (computed := record.compute_id(artifact.kind, artifact.stage, artifact.config_digest, artifact.parents, artifact.files)) != artifact.id:
        return f"its contents give the id {computed[:12]}, not {artifact.id[:12]}"
    return ""


def find_problems(artifact: Artifact, on_progress: Callable[[int], None] = lambda _bytes: None, without: Collection[str] = ()) -> Iterator[str]:
    """Yields a sentence with its cure for each file that differs from the record. Calls `on_progress` with the number of bytes checked.

    Files in `without` may be missing; they are checked only if they exist.
    """
    if why := record_mismatch(artifact):
        yield f"{Path(artifact.uri) / record.RECORD}: {why}. The record was changed or damaged; bring the old one back, or make the artifact again."
    done = 0
    for entry in artifact.files:
        exists = (Path(artifact.uri) / entry["path"]).exists()
        if (exists or entry["path"] not in without) and (why := file_problem(Path(artifact.uri), entry)):
            yield f"{Path(artifact.uri) / entry['path']}: {why}. {CURE}"
        on_progress(done := done + entry["bytes"])


def file_problem(folder: Path, entry: dict[str, Any]) -> str:
    """Describes how a file differs from its entry in the record; empty if it does not."""
    file = folder / entry["path"]
    if not file.is_file():
        return "was removed to make room" if entry["path"] in record.pruned(str(folder)) else "is missing"
    if not leads_inside(folder, file):
        return "is a link that leads out of the folder"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"has {size:,} bytes, not {entry['bytes']:,}"
    if record.entry(folder, file)["sha256"] != entry["sha256"]:
        return "has other contents (its SHA-256 is not that of the record)"
    return ""


def leads_inside(folder: Path, file: Path) -> bool:
    """Whether a file is in the folder after all links are resolved."""
    return file.resolve().is_relative_to(folder.resolve())


def check(artifact: Artifact, on_progress: Callable[[int], None] = lambda _bytes: None) -> None:
    """Raises DataError for an artifact that differs from its record."""
    if problems := list(find_problems(artifact, on_progress)):
        raise DataError(problems[0] + (f" {len(problems) - 1} more of its files are not as they were." if len(problems) > 1 else ""))


def untracked_files(artifact: Artifact) -> list[str]:
    """Files in an artifact's folder that its record does not list, except transient files and files of nested artifacts."""
    folder, tracked = Path(artifact.uri), {entry["path"] for entry in artifact.files}
    nested = {path.parent for path in folder.rglob(record.RECORD)} - {folder}
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not nested & set(f.parents)]
    return [name for f in files if (name := str(f.relative_to(folder))) not in tracked and not record.TRANSIENT.match(name)]
