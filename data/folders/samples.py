"""The captioned pictures of a folder, or the list of what is wrong with it."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from data.folders.files import Files, Reading
from data.folders.tables import read_table
from data.shards import notes, pictures
from data.shards.pictures import BadContent
from dev2pro.errors import DataError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

MAX_ROWS = 30  # lines of a list of refusals


@dataclass(frozen=True)
class Captioned:
    """A picture file, its path in the folder, its captions, and how often an epoch takes it."""

    path: Path
    name: str
    captions: tuple[str, ...]
    repeats: int = 1

    @property
    def key(self) -> str:
        """Its name in a shard: webdataset ends a key at the first dot, so there is none."""
        return self.name.rpartition(".")[0].replace(".", "_")

    def suffix(self, content: bytes) -> str:
        """Its suffix in a shard, of its bytes' kind. A JPEG, PNG or WebP that is called one of the others keeps the suffix of its name."""
        named, kind = pictures.SUFFIXES[self.path.suffix[1:].lower()], pictures.suffix(content)
        return named if {named, kind} <= {"jpg", "png", "webp"} else kind


def find_samples(files: Files, reading: Reading, table: Path | None = None) -> list[Captioned]:
    """Every picture of the folder with its captions: from the given table, from the folder's own ones, or from the files beside it.

    Raises DataError with the list of those that have none or several, or that share a name.
    """
    folder, samples, problems, of_tables = files.folder, list[Captioned](), list[str](), list[str]()
    tables = _read_tables(files, [(table, folder)] if table else [(folder / name, (folder / name).parent) for name in files.tables], of_tables)
    for name in files.pictures:
        try:
            governed = table is not None or files.table_of(name) is not None
            captions = _of_table(tables, name) if governed else _beside(files, name, reading)
            samples.append(Captioned(folder / name, name, captions, _repeats(files, name, reading)))
        except BadContent as error:
            problems.append(f"{folder / name}: {error}")
    problems += of_tables + files.problems
    problems += repeated(samples, "the name in a shard, where dots become _ and the ending does not count", lambda sample: sample.key)
    problems += _unclear_repeats(files) if reading.repeats == "refuse" else []
    if problems:
        raise refusal(folder, problems)
    if not samples:
        others = f" Left out: {notes.left_out(files.left_out)}." if files.left_out else ""
        raise DataError(
            f"{redact_url(str(folder))} holds no pictures ({', '.join(pictures.SUFFIXES)}). "
            f"Put some there, each beside a .txt with what it shows.{others}"
        )
    return samples


def refusal(folder: Path, problems: list[str]) -> DataError:
    """A DataError that lists the rejected files, truncated to MAX_ROWS."""
    more = f"\n  ... and {len(problems) - MAX_ROWS} more" if len(problems) > MAX_ROWS else ""
    listing = "\n  ".join(map(printable, problems[:MAX_ROWS]))
    return DataError(f"{redact_url(str(folder))} cannot be packed; mend these {len(problems)}, or move them away:\n  {listing}{more}")


def repeated(samples: list[Captioned], what: str, name_of: Callable[[Captioned], str]) -> list[str]:
    """One line per sample that shares its name with an earlier one."""
    first: dict[str, Captioned] = {}
    pairs = [(first.setdefault(name_of(sample), sample), sample) for sample in samples]
    return [f"{sample.path}: {other.path} has the same ({what})" for other, sample in pairs if other is not sample]


def _read_tables(files: Files, tables: list[tuple[Path, Path]], problems: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Picture -> (table, captions), of tables that name files from their own folders. Notes rows without a picture, and conflicts."""
    known = {**{unicodedata.normalize("NFC", name): name for name in files.pictures}, **{name: name for name in files.pictures}}
    found: dict[str, tuple[str, list[str]]] = {}
    for table, place in tables:
        rows = read_table(table)
        for row in sorted(rows):
            path = PurePath(place.relative_to(files.folder)) / (Path(row).relative_to(place) if Path(row).is_relative_to(place) else row)
            name = known.get(str(path)) or known.get(unicodedata.normalize("NFC", str(path)))
            if name is None:
                problems.append(f"{table}: {row} is no picture in {place}{' that is read' * (files.folder / path).is_file()}")
            elif name in found and found[name][1] != rows[row]:
                problems.append(f"{files.folder / name}: {found[name][0]} and {table} have different captions; take one away")
            else:
                found[name] = (str(table), rows[row])
    return found


def _of_table(tables: dict[str, tuple[str, list[str]]], name: str) -> tuple[str, ...]:
    if name not in tables:
        raise BadContent("it is not in the table of captions")
    return tuple(pictures.captions(json.dumps(tables[name][1]).encode(), "json"))


def _beside(files: Files, name: str, reading: Reading) -> tuple[str, ...]:
    """The captions in the files beside a picture. A .json without a caption counts only where there is no other file."""
    found: dict[str, tuple[str, ...]] = {}
    for beside in files.beside.get(name, []):
        ending = PurePath(beside).suffix.lower()
        try:
            texts = pictures.captions((files.folder / beside).read_bytes(), "json" if ending == ".json" else "txt")
        except OSError as error:
            raise BadContent(f"its caption {beside} cannot be read: {error.strerror}") from error
        except BadContent:
            if ending == ".json" and len(files.beside[name]) > 1:  # another tool's notes on the picture
                continue
            raise
        if reading.caption_lines == "several" and ending != ".json":
            texts = [line.strip() for line in texts[0].splitlines() if line.strip()]
        found[beside] = tuple(texts)
    if len({*found.values()}) > 1:
        raise BadContent(f"{' and '.join(found)} have different captions; take one away")
    if found:
        return next(iter(found.values()))
    return _of_folder(files, name, reading)


def _of_folder(files: Files, name: str, reading: Reading) -> tuple[str, ...]:
    """The folder's name, or its class where it is named as kohya's trainers name theirs, if that is asked for."""
    kohya, place = files.kohya(name), (files.folder / name).parent
    word = (kohya[2] if kohya else place.name or place.resolve().name).strip()
    if reading.folder_captions:
        return (word,)
    near, wanted = files.near.get(name), PurePath(name).with_suffix(".txt").name
    hint = f". There is {near}, whose name or folder differs: rename or move it" if near else ""
    offer = f", or take its folder's word {word!r}: data.folder_captions=true (--folder-captions of data.pack)" if kohya else ""
    raise BadContent(f"it has no caption; write what it shows into {wanted} beside it{offer}{hint}")


def _repeats(files: Files, name: str, reading: Reading) -> int:
    kohya = files.kohya(name) if reading.repeats == "honour" else None
    return kohya[1] if kohya else 1


def _unclear_repeats(files: Files) -> list[str]:
    """A line for each folder whose name says that its pictures are taken several times. Of the given folder itself it seldom means that."""
    found = {
        kohya[0]: kohya[1] for name in files.pictures if (kohya := files.kohya(name)) and kohya[1] > 1 and kohya[0] != str(files.folder)
    }  # fmt: skip
    return [
        f"{place}: its name asks, in kohya's manner, to take its pictures {repeats} times an epoch. Say data.repeats=honour to take them so often, "
        "or data.repeats=ignore to take them once (--repeats of data.pack)"
        for place, repeats in found.items()
    ]  # fmt: skip
