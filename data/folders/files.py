"""Which files of a folder are used, as their names tell: pictures, the captions beside them, tables of captions. All others are left out."""

import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

from data.shards import notes, pictures, table
from data.shards.notes import Notes
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

CAPTIONS = (".txt", ".caption", ".json")  # beside a picture, under its name with or without its ending
TABLES = tuple(f"metadata{ending}" for ending in (".jsonl", ".csv", ".tsv", ".parquet"))  # for the pictures of their folder and of those in it
OTHER_PICTURES = (".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr", ".ico", ".ppm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
REPEATS = re.compile(r"([1-9][0-9]{0,2})_(.+)", re.DOTALL)  # how kohya's trainers name a folder: how often an epoch takes it, and its class
CHANGES = 3  # names that are told of each kind of change
File = tuple[str, int, int]  # path in the folder, bytes, ns of the last change


@dataclass(frozen=True)
class Reading:
    """How a folder is read; see data/sources.py for what each value means."""

    caption_lines: str = "one"
    repeats: str = "refuse"
    folder_captions: bool = False


AS_IT_IS = Reading()


@dataclass
class Files:
    """A folder's files by their use; names are paths in the folder, in order. `everything` identified a folder in snapshots of earlier versions."""

    folder: Path
    everything: list[File]
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    beside: dict[str, list[str]] = field(default_factory=dict)  # picture -> caption files
    near: dict[str, str] = field(default_factory=dict)  # picture without a caption -> a caption file whose name is nearly its own
    left_out: Notes = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def used(self) -> list[File]:
        """All files that what is trained on depends on."""
        names = {*self.pictures, *self.tables, *(name for files in self.beside.values() for name in files)}
        return [file for file in self.everything if file[0] in names]

    def digest(self, reading: Reading) -> str:
        """Identifies what is read, without opening a picture."""
        return table.digest({"version": 2, "files": self.used, **asdict(reading)})

    def table_of(self, picture: str) -> str | None:
        """The nearest table in the picture's folder or above."""
        above = {str(PurePath(name).parent): name for name in self.tables}
        return next((above[str(parent)] for parent in PurePath(picture).parents if str(parent) in above), None)

    def kohya(self, picture: str) -> tuple[str, int, str] | None:
        """(folder, repeats, class) of the innermost folder around a picture that is named as kohya's trainers name theirs."""
        for place in (self.folder / picture).parents[: len(PurePath(picture).parts)]:
            if match := REPEATS.fullmatch(place.name or place.resolve().name):
                return str(place), int(match[1]), match[2]
        return None


def survey(folder: Path, given_table: bool = False) -> Files:
    """Sorts a folder's files by their use. Skips hidden files and folders. `given_table`: the captions come from elsewhere.

    Raises DataError for a folder that cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{redact_url(str(folder))} is no folder. Give one with pictures, each beside a .txt with what it shows.")
    problems: list[str] = []
    names = sorted(_walk(folder, problems), key=lambda name: PurePath(name).parts)
    hidden = {name for name in names if any(part.startswith(".") for part in PurePath(name).parts)}
    states = ((name, (folder / name).stat()) for name in names if name not in hidden)
    found = Files(folder, [(name, state.st_size, state.st_mtime_ns) for name, state in states], problems=problems)
    runs = _runs(found.everything)
    visible = [name for name, _, _ in found.everything if not runs or runs.isdisjoint(map(str, PurePath(name).parents))]
    found.pictures = [name for name in visible if _ending(name)[1:] in pictures.SUFFIXES]
    found.tables = [] if given_table else [name for name in visible if PurePath(name).name.lower() in TABLES]
    _find_captions(found, visible, given_table)
    used = {name for name, _, _ in found.used}
    for name in visible:
        if name not in used:
            ending = _ending(name)
            notes.add(found.left_out, ending or PurePath(name).name, [name], why=_why(ending, given_table or bool(found.tables)))
    for run in sorted(runs):
        notes.add(found.left_out, "folders that a run wrote", [run])
    for name in sorted(hidden):
        if _ending(name)[1:] in pictures.SUFFIXES and not PurePath(name).name.startswith("._"):  # macOS's companions of files are no pictures
            notes.add(found.left_out, "hidden", [name])
    return found


def changes(before: list[File], now: list[File]) -> str:
    """What differs between two listings: files added, removed, changed, the first of each by name."""
    old, new = ({name: (size, modified) for name, size, modified in files} for files in (before, now))
    kinds = {
        "added": [name for name in new if name not in old], "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and old[name] != new[name]],
    }  # fmt: skip
    more = {what: f" and {len(names) - CHANGES} more" if len(names) > CHANGES else "" for what, names in kinds.items()}
    return "; ".join(f"{what} {', '.join(names[:CHANGES])}{more[what]}" for what, names in kinds.items() if names)


def _walk(folder: Path, problems: list[str]) -> list[str]:
    """Every file's path in the folder. Adds links that are not followed to the problems."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{redact_url(str(error.filename))} cannot be listed ({error.strerror}). Make it readable, or move it away.") from error

    names = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        within = Path(place)
        problems += [f"{within / name}: a link to a folder, which is not followed" for name in sorted(folders) if (within / name).is_symlink()]
        for name in files:
            file = within / name
            if file.is_file():
                names.append(str(file.relative_to(folder)))
            elif file.is_symlink():
                problems.append(f"{file}: a link to a file that does not exist")
    return names


def _runs(files: list[File]) -> set[str]:
    """The folders in the folder that stages have written: with an artifact's record, or what a run that trains writes first."""
    records = {name for name, _, _ in files if PurePath(name).name in ("artifact.json", "config.json", "train.snapshot")}
    places = {str(PurePath(name).parent) for name in records} - {"."}
    return {place for place in places if f"{place}/artifact.json" in records or {f"{place}/config.json", f"{place}/train.snapshot"} <= records}


def _ending(name: str) -> str:
    return PurePath(name).suffix.lower()


def _why(ending: str, table: bool) -> str:
    if package := pictures.PLUGINS.get(ending[1:]):
        return f"read only with {package}: pip install {package}"
    if ending in OTHER_PICTURES:
        return "pictures of a kind that is not read; convert them to PNG"
    if ending in CAPTIONS:
        return "a table has the captions" if table else "of no picture that is read"
    return ""


def _find_captions(found: Files, names: list[str], given_table: bool) -> None:
    """Fills `beside` and `near`. A caption has the picture's name; accents may be spelt in another way (NFC, NFD), as macOS does."""
    files = [name for name in names if _ending(name) in CAPTIONS]
    by_stem, by_form, by_likeness = (defaultdict[str, list[str]](list) for _ in range(3))
    for name in files:
        stem = str(PurePath(name).with_suffix(""))
        by_stem[stem].append(name)
        by_form[unicodedata.normalize("NFC", stem)].append(name)
    claimed = set[str]()
    for picture in found.pictures:
        stems = [str(PurePath(picture).with_suffix("")), picture]
        exact = [name for stem in stems for name in by_stem[stem]]
        alike = exact or [name for stem in stems for name in by_form[unicodedata.normalize("NFC", stem)]]
        if alike and not given_table and not found.table_of(picture):
            found.beside[picture] = alike
        claimed |= {*alike}
    for name in files:
        if name not in claimed:
            by_likeness[_loose(name)].append(name)
    for picture in found.pictures:
        candidates = by_likeness.get(_loose(picture)) or by_likeness.get(_loose(PurePath(picture).name + ".x")) or []
        if picture not in found.beside and candidates:
            found.near[picture] = min(candidates, key=lambda name: PurePath(name).parent != PurePath(picture).parent)


def _loose(name: str) -> str:
    """A file's name without folder, ending, case, spaces and marks."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKD", PurePath(name).stem).casefold()) or name
