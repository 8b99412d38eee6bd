"""Reads captioned pictures: WebDataset tars, or a folder of pictures each beside its .txt caption. Knows no model."""

import glob
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from webdataset.tariterators import group_by_keys, tar_file_expander

from dev2pro.errors import DataError

SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000  # larger than any camera's picture; a picture bomb is refused from its header


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which pictures; see conf/data/."""

    name: str  # of the data set or style, for tables and file names
    train: list[str]  # tars (globs and {000..012} braces allowed) or folders
    heldout: list[str]  # never trained on
    resolution: int  # pixels; every picture is resized and cropped to a square of this side

    def read(self) -> tuple[list["Picture"], list["Picture"]]:
        """(train, held-out) pictures."""
        return read(self.train, "data.train"), read(self.heldout, "data.heldout")

    def sources(self) -> dict[str, str]:
        """Every tar and folder that is read, by role: an artifact's parents beside the models."""
        return {
            f"{what} {place}": str(place)
            for what, patterns in (("data.train", self.train), ("data.heldout", self.heldout))
            for pattern in patterns
            for place in _expand(pattern, what)
        }


@dataclass(frozen=True)
class Picture:
    """One captioned picture, not yet decoded. `place` says where it was found, for error messages."""

    key: str
    place: str
    encoded: bytes
    caption: str

    def pixels(self, resolution: int) -> np.ndarray:
        """(3, H, W) float32 in [-1, 1], upright, resized to cover the square and cropped in the middle."""
        try:
            image: Image.Image = Image.open(io.BytesIO(self.encoded), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{self.place}: {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}. Scale the picture down.")
            if image.mode.startswith("I;16"):  # which Pillow would clip to white
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.place} is no readable JPEG, PNG or WebP picture ({error}). Replace or remove it.") from error
        square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.LANCZOS)
        return np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def read(sources: Sequence[str], what: str) -> list[Picture]:
    """Every picture of the sources, in order. Raises DataError for none at all, a missing caption, or the same key twice.

    `what` names the setting in error messages, such as "data.train".
    """
    found: dict[str, Picture] = {}
    for source in sources:
        for place in _expand(source, what):
            for picture in _folder(place) if place.is_dir() else _shard(place):
                if picture.key in found:
                    raise DataError(
                        f"{picture.place} and {found[picture.key].place} have the same key, {picture.key}. Keys must differ within {what}."
                    )
                found[picture.key] = picture
    if not found:
        raise DataError(f"{what}={list(sources)} holds no pictures. Give WebDataset tars, or a folder with pictures and a .txt caption beside each.")
    return list(found.values())


def _expand(source: str, what: str) -> list[Path]:
    try:
        places = [Path(p) for pattern in braceexpand.braceexpand(source) for p in sorted(glob.glob(pattern))]
    except ValueError:  # braces that do not balance: a plain path may hold one
        places = [Path(p) for p in sorted(glob.glob(source))]
    if not places:
        raise DataError(f"{what}: nothing matches {source}. Correct the path; tars and folders on this machine can be read.")
    return places


def _folder(folder: Path) -> Iterator[Picture]:
    for file in sorted(f for f in folder.rglob("*") if f.suffix.lower().lstrip(".") in SUFFIXES):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise DataError(f"{file} has no caption. Write what it shows into {caption}, or move the picture away.")
        yield _captioned(str(file.relative_to(folder).with_suffix("")), str(file), file.read_bytes(), caption.read_bytes())


def _shard(tar: Path) -> Iterator[Picture]:
    try:
        _check_whole(tar)
        # webdataset's own steps without its opener and its splitters: no path is a URL, and every process reads everything.
        with tar.open("rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(tar), "stream": stream}])):
                key = sample["__key__"]
                suffix = next((s for s in SUFFIXES if s in sample), None)
                if suffix is None:
                    raise DataError(f"{tar}:{key} has no picture (one of {', '.join(SUFFIXES)}; a key ends at its first dot). Write the shard again.")
                if "txt" not in sample:
                    raise DataError(f"{tar}:{key}.{suffix} has no caption: the shard holds no {key}.txt beside it. Write the shard again.")
                yield _captioned(key, f"{tar}:{key}.{suffix}", sample[suffix], sample["txt"])
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{tar} cannot be read as a WebDataset tar ({reason}). Write or copy the shard again.") from error


def _check_whole(tar: Path) -> None:
    """Raises ReadError where a reader would end early without a word: at a damaged header, or where the end is missing."""
    with tarfile.open(tar) as opened:
        opened.getmembers()
        assert opened.fileobj is not None
        opened.fileobj.seek(opened.offset)
        if opened.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"it ends at byte {opened.offset} without an end mark")


def _captioned(key: str, place: str, encoded: bytes, caption: bytes) -> Picture:
    try:
        text = caption.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"The caption of {place} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if not text:
        raise DataError(f"The caption of {place} is empty. Write what the picture shows, or move the picture away.")
    return Picture(key, place, encoded, text)
