"""Folders of pictures as stages use them: packed once into the cache, compared when a run resumes, apart from what a run writes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from data import commands, pack
from data.folders.files import Files, Reading, changes, survey
from data.names import packed_folder
from data.shards import table
from data.storage import urls
from data.storage.http import ChangedError
from data.storage.transport import write_atomic
from dev2pro.errors import ConfigError, DataError
from dev2pro.redact import redact_url


def check_out(out: str, sources: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError if `out` lies in a folder of pictures, or the folder in it; links are followed. `sources`: setting -> its places."""
    real = Path(os.path.realpath(out))
    for what, places in sources.items():
        for folder in filter(os.path.isdir, (path for place in places for path in _local(place, what))):
            pictures_folder = Path(os.path.realpath(folder))
            if real.is_relative_to(pictures_folder):
                raise ConfigError(
                    f"out={out} lies in {redact_url(folder)}, a folder of {what}: what the run writes would be among its pictures. "
                    "Choose an out= elsewhere; a run that has begun there goes on when its folder is moved."
                )
            if pictures_folder.is_relative_to(real):
                raise ConfigError(f"{redact_url(folder)}, a folder of {what}, lies in out={out}, where the run writes. Choose another out=.")


def _local(place: str, what: str) -> list[str]:
    """The paths that a pattern names now; none of an address, and none where nothing matches, which others tell."""
    try:
        return [] if urls.is_remote(place) and not place.startswith("file:") else urls.expand(place, what)
    except DataError:
        return []


def shards(files: Files, listing: str, cache: str, what: str, reading: Reading) -> list[str]:
    """The shards of a folder of pictures, packed once and cached."""
    target = packed_folder(str(files.folder), listing, cache)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with FileLock(f"{target}.lock"):  # two stages may pack the same folder at the same time
        if not os.path.isdir(target):
            try:
                write_atomic(f"{target}.files.json", json.dumps(files.used).encode())
                pack.pack(str(files.folder), target, workers=commands.cores(), reading=reading)
            except DataError as error:
                raise DataError(f"{what}: {error}") from error
    return sorted(str(file) for file in Path(target).glob("*.tar"))


def check(folder: str, listing: str, cache: str, reading: Reading) -> None:
    """Raises ChangedError, naming files, for a folder that is not as it was packed. Snapshots of earlier versions identify all of its files."""
    files = survey(Path(folder))
    if listing in (files.digest(reading), table.digest(files.everything)):
        return
    kept = Path(f"{packed_folder(folder, listing, cache)}.files.json")
    try:
        before = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        raise ChangedError(folder, "its files are others") from None
    same = "it is read in another way (data.caption_lines, data.repeats, data.folder_captions)"
    raise ChangedError(folder, f"its files are others: {found}" if (found := changes(before, files.used)) else same)
