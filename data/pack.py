"""Packs a folder of captioned pictures into shards: `python -m data.pack FOLDER OUT`. The same folder gives the same bytes."""

import argparse
import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import commands, index
from data.shards import pictures
from data.shards.pictures import BadContent
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from dev2pro.escape import printable
from dev2pro.redact import redact_url

SHARD_SAMPLES, SHARD_BYTES = 1000, 512 << 20  # a shard is full at either
MAX_ROWS = 30  # lines of a list of refusals


@dataclass(frozen=True)
class Captioned:
    """A picture file, its path in the folder, and its captions."""

    path: Path
    name: str
    captions: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in a shard: webdataset ends a key at the first dot, so there is none."""
        return self.name.rpartition(".")[0].replace(".", "_")

    @property
    def suffix(self) -> str:
        """jpg, png or webp."""
        return self.path.suffix.lower().lstrip(".").replace("jpeg", "jpg")


def list_files(folder: Path) -> list[tuple[str, int, int]]:
    """(path in the folder, bytes, ns of the last change) of every file, in order: identifies the folder's contents without opening an image.

    Skips hidden files and folders.
    """
    paths = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    files = sorted((name, file) for name, file in paths.items() if not any(part.startswith(".") for part in name.parts))
    return [(str(name), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files]


def find_samples(folder: Path, table: Path | None = None) -> list[Captioned]:
    """Every picture of the folder with its captions: from a table, from metadata.jsonl or metadata.csv in the folder, or from .txt files.

    Raises DataError with the list of those that have none, or that share a name.
    """
    if not folder.is_dir():
        raise DataError(f"{redact_url(str(folder))} is no folder. Give one with pictures, each beside a .txt with what it shows.")
    images = {name: folder / name for name, _, _ in list_files(folder) if _is_picture(name)}
    table = table or next((folder / name for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet") if (folder / name).is_file()), None)
    captions = _read_table(table) if table else None
    samples, problems = [], []
    for name, file in images.items():
        try:
            samples.append(Captioned(file, name, _captions(file, name, captions)))
        except BadContent as error:
            problems.append(f"{file}: {error}")
    problems += [f"{table}: {name} is no picture in {folder}" for name in sorted(set(captions or {}) - set(images))]
    problems += [f"{link}: a link to a folder, which is not followed" for link in sorted(folder.rglob("*")) if link.is_symlink() and link.is_dir()]
    problems += _duplicates(samples, "the name in a shard, where dots become _ and the ending does not count", lambda sample: sample.key)
    if problems:
        raise refusal(folder, problems)
    if not samples:
        raise DataError(
            f"{redact_url(str(folder))} holds no pictures ({', '.join(pictures.SUFFIXES)}). Put some there, each beside a .txt with what it shows."
        )
    return samples


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower().lstrip(".") in pictures.SUFFIXES


def _captions(file: Path, name: str, table: dict[str, list[str]] | None) -> tuple[str, ...]:
    if table is not None:
        if name not in table:
            raise BadContent("it is not in the table of captions")
        return tuple(pictures.captions(json.dumps(table[name]).encode(), "json"))
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise BadContent(f"it has no caption; write what it shows into {beside.name} beside it")
    return tuple(pictures.captions(beside.read_bytes(), "txt"))


def _read_table(table: Path) -> dict[str, list[str]]:
    """File name -> captions, from a .jsonl, .csv or .parquet table with the columns file_name and text, as Hugging Face's imagefolder has them.

    A file may have several rows, and a row a list of texts.
    """
    captions: dict[str, list[str]] = {}
    done = 0
    try:
        for row in _read_rows(table):
            if None in row:  # csv puts values without a column there
                raise ValueError("more values than columns: a caption with commas needs quotes around it")
            texts = [row["text"] or ""] if isinstance(row["text"], str | None) else row["text"]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"a text that is neither words nor a list of them, {texts!r}")
            captions.setdefault(str(Path(row["file_name"])), []).extend(texts or [""])
            done += 1
    except OSError as error:
        raise DataError(f"{redact_url(str(table))} cannot be read: {error.strerror or error}. Correct the path.") from error
    except (ValueError, KeyError, TypeError, NotImplementedError, RecursionError, csv.Error) as error:
        raise DataError(
            f"{redact_url(str(table))} is no table of captions (row {done + 1}: {type(error).__name__}, {error}). "
            "It needs the columns file_name and text, and can be .csv, .jsonl or .parquet."
        ) from error
    return captions


def _read_rows(table: Path) -> Iterator[dict[Any, Any]]:
    if table.suffix == ".jsonl":
        with table.open(encoding="utf-8-sig") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    elif table.suffix == ".csv":
        with table.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    else:
        import pyarrow.parquet  # imported lazily: only parquet tables need it

        yield from pyarrow.parquet.read_table(table).to_pylist()


def _duplicates(samples: list[Captioned], what: str, name_of: Callable[[Captioned], str]) -> list[str]:
    """One line per sample that shares its name with an earlier one."""
    first: dict[str, Captioned] = {}
    pairs = [(first.setdefault(name_of(sample), sample), sample) for sample in samples]
    return [f"{sample.path}: {other.path} has the same ({what})" for other, sample in pairs if other is not sample]


def refusal(folder: Path, problems: list[str]) -> DataError:
    """A DataError that lists the rejected files, truncated to MAX_ROWS."""
    more = f"\n  ... and {len(problems) - MAX_ROWS} more" if len(problems) > MAX_ROWS else ""
    listing = "\n  ".join(map(printable, problems[:MAX_ROWS]))
    return DataError(f"{redact_url(str(folder))} cannot be packed; mend these {len(problems)}, or move them away:\n  {listing}{more}")


def _check_image(path: Path) -> tuple[str, str]:
    """Decodes a picture completely. Returns (SHA-256, why it cannot be used)."""
    try:
        content = path.read_bytes()
        pictures.upright(content)
    except OSError as error:
        return "", f"it cannot be read: {error.strerror}"
    except BadContent as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest(), ""


def pack(folder: str, out: str, table: str | None = None, workers: int = 1) -> list[str]:
    """Writes `out`/000000.tar and so on, each with its index, and returns their paths. `out` is created atomically.

    Raises DataError with a list for pictures that cannot be read, have no caption, or are there twice.
    """
    target, partial = Path(out), Path(f"{out}.{os.getpid()}.partial")
    _check_free(target)
    samples = find_samples(Path(folder), Path(table) if table else None)
    _check(Path(folder), samples, workers)
    try:
        partial.mkdir(parents=True)
        names = _write(samples, partial)
        _check_free(target)  # checked again: another process may have packed the same folder
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [str(target / name) for name in names]


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{redact_url(str(out))} exists and is no empty folder. Choose another one, or remove it.")


def _check(folder: Path, samples: list[Captioned], workers: int) -> None:
    """Decodes every picture. Raises DataError with the list of undecodable and duplicate ones."""
    results = []
    with commands.progress(f"checking {redact_url(str(folder))}", len(samples)) as advance, commands.processes(workers) as pool:
        for result in pool.map(_check_image, [sample.path for sample in samples], chunksize=8):
            results.append(result)
            advance()
    sums = {sample.path: content for sample, (content, _) in zip(samples, results, strict=True)}
    problems = [f"{sample.path}: {why}" for sample, (_, why) in zip(samples, results, strict=True) if why]
    problems += _duplicates([sample for sample in samples if sums[sample.path]], "every byte of the picture", lambda sample: sums[sample.path])
    if problems:
        raise refusal(folder, problems)


def _write(samples: list[Captioned], folder: Path) -> list[str]:
    transport, names, remaining = Transport(ReadConfig()), list[str](), list(reversed(samples))
    with commands.progress("writing shards", len(samples)) as advance:
        while remaining:
            count, file = len(remaining), folder / f"{len(names):06d}.tar"
            _write_shard(file, remaining, advance)
            outcome = index.index(str(file), transport)
            if outcome.error or outcome.samples != count - len(remaining):
                first = "; ".join(f"{bad['key']}: {bad['reason']}" for bad in outcome.rejected[:1])
                raise DataError(outcome.error or f"A shard lost samples: {first or outcome.ignored}. Mend or rename the picture, and pack again.")
            names.append(file.name)
    return names


def _write_shard(path: Path, remaining: list[Captioned], advance: Callable[[], None]) -> None:
    """Pops samples from the end of `remaining` until the shard is full."""
    import webdataset  # imported lazily: it loads torch, which checking images does not need

    with path.open("wb") as file:
        with webdataset.TarWriter(file, user="dev2pro", group="dev2pro", mtime=0) as shard:
            for _ in range(min(SHARD_SAMPLES, len(remaining))):
                sample = remaining.pop()
                several = {"json": json.dumps({"captions": sample.captions}).encode()}
                caption = {"txt": sample.captions[0].encode()} if len(sample.captions) == 1 else several
                shard.write({"__key__": sample.key, sample.suffix: sample.path.read_bytes(), **caption})
                advance()
                if file.tell() > SHARD_BYTES:
                    break
        file.flush()
        os.fsync(file.fileno())


def work(options: argparse.Namespace) -> int:
    """Packs the folder and prints the next command."""
    files = [Path(name) for name, _, _ in list_files(Path(options.folder)) if not _is_picture(name)]
    others = Counter(kind for file in files if (kind := file.suffix.lower() or file.name) not in (".txt", ".jsonl", ".csv", ".parquet"))
    tars = pack(options.folder, options.out, options.captions, options.workers)
    if others:
        kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in others.most_common(MAX_ROWS))
        print(f"pack: left out are files of other kinds: {kinds}")
    print(f"pack: {len(tars)} indexed shards in {redact_url(options.out)}. Train on them with \"data.train=['{redact_url(options.out)}/*.tar']\"")
    return 0


def main() -> None:
    """Reads the command line."""
    parser = commands.make_parser("data.pack", __doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", help="pictures, each beside a .txt, or with a metadata.jsonl as Hugging Face's imagefolder has it"
    )
    parser.add_argument("out", metavar="OUT", help="the folder for the shards")
    parser.add_argument("--captions", metavar="TABLE", help="a .csv, .jsonl or .parquet with the columns file_name and text")
    parser.add_argument("--workers", type=commands.positive, default=commands.cores(), help="processes (default: %(default)s)")
    commands.run("pack", parser, work)


if __name__ == "__main__":
    main()
