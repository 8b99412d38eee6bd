"""Whether an artifact is what its record says: the id, and every file's size and contents."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import DataError

CURE = "Bring the old file back, pull the artifact again, or make it again."


def record_mismatch(made: Artifact) -> str:
    """How a record contradicts itself, or nothing: its id is computed from its own contents."""
    if record.digest(made.config) != made.config_digest:
        return "its configuration is not the one it was written with"
    if (found := record.compute_id(made.kind, made.stage, made.config_digest, made.parents, made.files)) != made.id:
        return f"its contents give the id {found[:12]}, not {made.id[:12]}"
    return ""


def find_problems(made: Artifact, on_progress: Callable[[int], None] = lambda _bytes: None, without: Collection[str] = ()) -> Iterator[str]:
    """What is not as the record says, a sentence for each with its cure. `told` hears how many bytes are looked through.

    Files `without` which it may be are only wrong if they are there.
    """
    if why := record_mismatch(made):
        yield f"{Path(made.uri) / record.RECORD}: {why}. The record was changed or damaged; bring the old one back, or make the artifact again."
    done = 0
    for one in made.files:
        there = (Path(made.uri) / one["path"]).exists()
        if (there or one["path"] not in without) and (why := file_problem(Path(made.uri), one)):
            yield f"{Path(made.uri) / one['path']}: {why}. {CURE}"
        on_progress(done := done + one["bytes"])


def file_problem(folder: Path, one: dict[str, Any]) -> str:
    """What is wrong with a file of a record, or nothing."""
    file = folder / one["path"]
    if not file.is_file():
        return "was removed to make room" if one["path"] in record.pruned(str(folder)) else "is missing"
    if not leads_inside(folder, file):
        return "is a link that leads out of the folder"
    if (size := file.stat().st_size) != one["bytes"]:
        return f"has {size:,} bytes, not {one['bytes']:,}"
    if record.entry(folder, file)["sha256"] != one["sha256"]:
        return "has other contents (its SHA-256 is not that of the record)"
    return ""


def leads_inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder, whatever links there are on the way."""
    return file.resolve().is_relative_to(folder.resolve())


def check(made: Artifact, told: Callable[[int], None] = lambda _bytes: None) -> None:
    """Raises DataError for an artifact that is not whole."""
    if wrong := list(find_problems(made, told)):
        raise DataError(wrong[0] + (f" {len(wrong) - 1} more of its files are not as they were." if len(wrong) > 1 else ""))


def untracked_files(made: Artifact) -> list[str]:
    """Files in an artifact's folder that its record does not name, without what comes and goes there, and without artifacts that lie in it."""
    folder, known = Path(made.uri), {one["path"] for one in made.files}
    nested = {path.parent for path in folder.rglob(record.RECORD)} - {folder}
    there = [f for f in sorted(folder.rglob("*")) if f.is_file() and not nested & set(f.parents)]
    return [name for f in there if (name := str(f.relative_to(folder))) not in known and not record.TRANSIENT.match(name)]
