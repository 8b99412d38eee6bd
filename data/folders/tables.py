"""Tables of captions, as Hugging Face's imagefolder has them: .csv, .tsv, .jsonl or .parquet, a row for each picture."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dev2pro.errors import DataError
from dev2pro.redact import redact_url

FILE_COLUMNS = ("file_name", "image", "filename", "path", "file")
TEXT_COLUMNS = ("text", "caption", "prompt", "captions")
DELIMITERS = ",;\t|"


def read_table(table: Path) -> dict[str, list[str]]:
    """File name -> captions. A file may have several rows, and a row a list of texts.

    The columns are those above, in any case; of a .csv they tell what separates its values. Raises DataError, naming the row.
    """
    captions: dict[str, list[str]] = {}
    done = 0
    try:
        for row in _read_rows(table):
            if not isinstance(row, dict):
                raise TypeError("no row with named values")
            if None in row:  # csv puts values without a column there
                raise ValueError("more values than columns: a caption with commas needs quotes around it")
            row = {str(name).strip().lower(): value for name, value in row.items()}
            text = _value(row, TEXT_COLUMNS)
            texts = [text or ""] if isinstance(text, str | None) else text
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"a text that is neither words nor a list of them, {texts!r}")
            captions.setdefault(str(Path(_value(row, FILE_COLUMNS))), []).extend(texts or [""])
            done += 1
    except OSError as error:
        raise DataError(f"{redact_url(str(table))} cannot be read: {error.strerror or error}. Correct the path.") from error
    except (ValueError, KeyError, TypeError, NotImplementedError, RecursionError, csv.Error) as error:
        raise DataError(
            f"{redact_url(str(table))} is no table of captions (row {done + 1}: {type(error).__name__}, {error}). "
            "It needs the columns file_name and text, and can be .csv, .jsonl or .parquet."
        ) from error
    return captions


def _value(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """The value of the first of the columns that a row has. Raises ValueError where others say something else."""
    if columns[0] in row:
        return row[columns[0]]
    given = {name: row[name] for name in columns if row.get(name) is not None}
    if not given:
        return row[next((name for name in columns if name in row), columns[0])]
    name, value = next(iter(given.items()))
    if other := next((other for other in given if given[other] != value), ""):
        raise ValueError(f"the columns {name} and {other} differ; call the one that counts {columns[0]}")
    return value


def _read_rows(table: Path) -> Iterator[dict[Any, Any]]:
    ending = table.suffix.lower()
    if ending == ".jsonl":
        with table.open(encoding="utf-8-sig") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    elif ending in (".csv", ".tsv"):
        with table.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            yield from csv.DictReader(file, delimiter=_delimiter(head))
    else:
        import pyarrow.parquet  # imported lazily: only parquet tables need it

        yield from pyarrow.parquet.read_table(table).to_pylist()


def _delimiter(head: str) -> str:
    """What separates the names of the columns, one for files and one for texts; a comma if nothing does."""
    names = {mark: {name.strip().lower() for name in next(csv.reader([head], delimiter=mark), [])} for mark in DELIMITERS}
    return next((mark for mark in DELIMITERS if names[mark] & {*FILE_COLUMNS} and names[mark] & {*TEXT_COLUMNS}), ",")
