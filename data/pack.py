"""Packs a folder of captioned pictures into shards: `python -m data.pack FOLDER OUT`. The same folder gives the same bytes."""

import argparse
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data import commands, index
from data.folders.files import AS_IT_IS, Reading, survey
from data.folders.samples import Captioned, find_samples, refusal, repeated
from data.shards import notes, pictures, sidecar
from data.shards.notes import Notes
from data.shards.pictures import BadContent
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

SHARD_SAMPLES, SHARD_BYTES = 1000, 512 << 20  # a shard is full at either


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


def pack(folder: str, out: str, table: str | None = None, workers: int = 1, reading: Reading = AS_IT_IS) -> list[str]:
    """Writes `out`/000000.tar and so on, each with its index, and returns their paths. `out` is created atomically.

    Raises DataError with a list for pictures that cannot be read, have no caption, or are there twice.
    """
    target, partial = Path(out), Path(f"{out}.{os.getpid()}.partial")
    _check_free(target)
    samples = find_samples(survey(Path(folder), table is not None), reading, Path(table) if table else None)
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
    problems += repeated([sample for sample in samples if sums[sample.path]], "every byte of the picture", lambda sample: sums[sample.path])
    if problems:
        raise refusal(folder, problems)


def _write(samples: list[Captioned], folder: Path) -> list[str]:
    """The names of the shards. The samples of a shard are repeated equally often."""
    transport, names = Transport(ReadConfig()), list[str]()
    groups = itertools.groupby(sorted(samples, key=lambda sample: sample.repeats), lambda sample: sample.repeats)
    with commands.progress("writing shards", len(samples)) as advance:
        for repeat, group in groups:
            remaining = [*group][::-1]
            while remaining:
                count, file = len(remaining), folder / f"{len(names):06d}.tar"
                _write_shard(file, remaining, advance)
                outcome = index.index(str(file), transport, repeat=repeat)
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
                content = sample.path.read_bytes()
                shard.write({"__key__": sample.key, sample.suffix(content): content, **caption})
                advance()
                if file.tell() > SHARD_BYTES:
                    break
        file.flush()
        os.fsync(file.fileno())


def work(options: argparse.Namespace) -> int:
    """Packs the folder, says what is left out and altered, and prints the next command."""
    files = survey(Path(options.folder), options.captions is not None)
    reading = Reading(options.caption_lines, options.repeats, options.folder_captions)
    tars, altered = pack(options.folder, options.out, options.captions, options.workers, reading), Notes()
    for tar in tars:
        notes.merge(altered, sidecar.read(tar, Transport(ReadConfig())).head.get("altered", {}))
    if files.left_out:
        print(f"pack: left out: {notes.left_out(files.left_out)}")
    for line in notes.altered(altered, "data.background in training"):
        print(f"pack: {line}")
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
    parser.add_argument("--caption-lines", choices=("one", "several"), default="one", help="whether each line of a .txt is a caption of its own")
    parser.add_argument(
        "--repeats", choices=("refuse", "honour", "ignore"), default="refuse", help="of folders named 10_cat: whether an epoch takes them 10 times"
    )
    parser.add_argument("--folder-captions", action="store_true", help="caption pictures that have no caption with the name of their folder")
    parser.add_argument("--workers", type=commands.positive, default=commands.cores(), help="processes (default: %(default)s)")
    commands.run("pack", parser, work)


if __name__ == "__main__":
    main()
