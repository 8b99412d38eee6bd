"""What a stage trains on: turns data.train and data.heldout into snapshots, pinned in the stage's folder before any model is loaded."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from data import commands, pack
from data.loading import order
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Batch, Stream
from data.shards import encoded, snapshot, table
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import ConfigError, DataError

TOGETHER = 16  # pictures a batch, where they are read once


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which pictures, and what happens to them; see conf/data/."""

    name: str  # of the data set or style, for tables and file names
    train: list[str]  # a snapshot, indexed tars (paths, http(s):// or s3://, with braces and *), or folders of captioned pictures
    heldout: list[str]  # never trained on
    resolution: int  # pixels: side of the square whose area every picture is scaled to
    aspect: float = 1.0  # 1 crops every picture to a square; 2 keeps forms up to 2:1 and 1:2, in buckets
    bucket_step: int = 64  # pixels: sides of buckets are multiples of it
    crop: str = "center"  # or random, where the picture is longer or higher than its bucket
    flip: bool = False  # mirrors every other picture
    stored: list[str] = field(default_factory=list)  # encodings to take from the shards: latents, text, both; made by stages.encode
    read: ReadConfig = field(default_factory=ReadConfig, metadata={"identity": False})


def check(config: DataConfig) -> None:
    """Raises ConfigError for a value that cannot work."""
    if config.crop not in ("center", "random"):
        raise ConfigError(f"data.crop={config.crop} is unknown. Choose center or random.")
    if unknown := set(config.stored) - set(encoded.PARTS):
        raise ConfigError(f"data.stored={config.stored} names {min(unknown)}. Choose among {', '.join(encoded.PARTS)}.")
    if "latents" in config.stored and (config.crop != "center" or config.flip):
        raise ConfigError("data.stored=[latents] freezes crop and mirroring as they were encoded. Set data.crop=center and data.flip=false.")
    if not 1 <= config.aspect <= 8:
        raise ConfigError(f"data.aspect={config.aspect} cannot work. Choose 1 for squares, or the longest form to keep, such as 2 for 2:1.")
    if config.aspect > 1 and config.resolution % config.bucket_step:
        raise ConfigError(f"data.resolution={config.resolution} is no multiple of data.bucket_step={config.bucket_step}. Change one of them.")


class RunSnapshots:
    """The snapshots of a run. Once the run has made something they are those in its folder, whatever has appeared since.

    `begun` says whether it has. The first process checks and writes; the others (`first` false) take what it has written.
    Raises DataError for what is not indexed, not there, or not as it was.
    """

    def __init__(self, config: DataConfig, out: str, *, resuming: bool, is_main_process: bool = True) -> None:
        check(config)
        self.config, self.out, self.is_main_process, self.transport = config, out, is_main_process, Transport(config.read)
        self._sources = {"train": config.train, "heldout": config.heldout}
        self._fresh = set[str]()  # roles whose snapshot was made just now, and so was checked
        self.train, self.heldout = (self._pin(role, resuming or not is_main_process) for role in self._sources)
        judges = {shard.sha256 for shard in self.heldout.shards}
        if both := next((shard.url for shard in self.train.shards if shard.sha256 in judges), None):
            raise DataError(f"{urls.redact_url(both)} is in data.train and in data.heldout. What is trained on cannot judge: take it out of one.")
        if lacking := [part for part in config.stored if part not in self.train.encodings]:
            raise DataError(f"data.stored={config.stored}, but the shards of data.train hold no {lacking[0]}. Encode them with stages.encode first.")

    def _pin(self, role: str, begun: bool) -> Snapshot:
        file, sources = self.file(role), self._sources[role]
        if file != _snapshot_path(sources) and not (begun and os.path.exists(file)):
            self._fresh.add(role)
            return build_snapshot(sources, f"data.{role}", self.transport)
        there = snapshot.read(file)
        changed = [folder for folder, was in there.head["folders"].items() if self.is_main_process and _listing(folder) != was]
        if changed:
            raise ChangedError(changed[0], "its files are others")
        return snapshot.check(there, self.transport, remote=False) if self.is_main_process else there

    def file(self, role: str) -> str:
        """Where the snapshot of a role lies: the given one, or in the run's folder."""
        return _snapshot_path(self._sources[role]) or f"{self.out}/{role}{snapshot.ENDING}"

    def parents(self) -> dict[str, tuple[str, str]]:
        """role -> (where the snapshot lies, its id)."""
        return {"data.train": (self.file("train"), self.train.id), "data.heldout": (self.file("heldout"), self.heldout.id)}

    def local_inputs(self) -> list[str]:
        """What lies on this machine and may be changed under a finished run: shards, or the folders that were packed."""
        both, packed = (self.train, self.heldout), os.path.abspath(self.config.read.cache)
        folders = [folder for one in both for folder in one.head["folders"]]
        shards = [shard.url for one in both for shard in one.shards if not urls.is_remote(shard.url) and not shard.url.startswith(packed)]
        return [os.path.relpath(place) for place in dict.fromkeys(folders + shards)]

    def write_and_verify(self) -> None:
        """Writes what is not written yet, and asks remote places whether their shards are still the same; before any model is loaded."""
        for role, pinned in (("train", self.train), ("heldout", self.heldout)):
            if role in self._fresh:
                pinned.write(self.file(role))
            elif self.is_main_process:
                snapshot.check(pinned, self.transport)

    def stream(self, seed: int, batch: int, rank: int = 0) -> Stream:
        """The training samples, for `batch` slots a step."""
        config, quarantine = self.config, Quarantine(self.train, f"{self.out}/quarantine{f'-{rank}' if rank else ''}.jsonl")
        buckets = order.sizes(config.resolution, config.bucket_step, config.aspect)
        ordered = Order(self.train, buckets, seed, batch, cropped="latents" in config.stored)
        parts = [*([] if "latents" in config.stored else ["picture"]), "caption", *config.stored]
        return Stream(ordered, config.read, Augment(config.crop, config.flip), quarantine, parts)

    def reference(self, samples: int) -> Iterator[Batch]:
        """The squares in the middle of the first held-out pictures."""
        return _squares(self.heldout, self.config.resolution, samples, self.config.read)


def _snapshot_path(sources: Sequence[str]) -> str:
    """The snapshot that is given, if one is."""
    return sources[0] if len(sources) == 1 and sources[0].endswith(snapshot.ENDING) else ""


def open_snapshot(sources: Sequence[str], what: str, transport: Transport) -> Snapshot:
    """The given snapshot, checked, or one of folders and indexed tars; `what` names the setting in messages."""
    given = _snapshot_path(sources)
    return snapshot.check(snapshot.read(given), transport) if given else build_snapshot(sources, what, transport)


def build_snapshot(sources: Sequence[str], what: str, transport: Transport) -> Snapshot:
    """A snapshot of folders and indexed tars."""
    shards, folders = list[str](), dict[str, str]()
    for place in (place for source in sources for place in urls.expand(source, what)):
        if os.path.isdir(place):
            folders[place] = _listing(place)
            shards += _packed(place, folders[place], transport.config.cache, what)
        elif place.endswith(snapshot.ENDING):
            raise ConfigError(f"{what}={list(sources)} has a snapshot among other places. Give it alone; it says all there is to train on.")
        else:
            shards.append(place)
    found = snapshot.build(shards, transport, sources=sources, folders=folders)
    if not len(found):
        raise DataError(f"{what}={list(sources)} holds no samples. Give indexed tars, or a folder with pictures and a .txt caption beside each.")
    return found


def squares(sources: Sequence[str], what: str, resolution: int) -> Iterator[Batch]:
    """The squares in the middle of every picture of folders and indexed tars."""
    read = ReadConfig()
    found = open_snapshot(sources, what, Transport(read))
    return _squares(found, resolution, len(found), read)


def _squares(found: Snapshot, resolution: int, samples: int, read: ReadConfig) -> Iterator[Batch]:
    square, rows = (resolution, resolution), range(min(samples, len(found)))
    return Stream(Order(found, [square], 0, 1), replace(read, workers=0), Augment(), Quarantine(found)).rows(rows, square, TOGETHER)


def _listing(folder: str) -> str:
    """What a folder is without opening its pictures: names, sizes and times."""
    return table.digest(pack.listed(Path(folder)))


def _packed(folder: str, listing: str, cache: str, what: str) -> list[str]:
    """The shards of a folder of pictures, packed once and kept."""
    target = f"{cache}/packed/{table.digest([os.path.abspath(folder), listing])[:16]}"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with FileLock(f"{target}.lock"):  # two stages may want the same folder at the same time
        if not os.path.isdir(target):
            try:
                pack.pack(folder, target, workers=commands.cores())
            except DataError as error:
                raise DataError(f"{what}: {error}") from error
    return sorted(str(file) for file in Path(target).glob("*.tar"))


def describe(stream: Stream) -> dict[str, Any]:
    """What a run's data amounts to, for its record."""
    found = stream.order
    buckets = [{"size": f"{w}x{h}", "samples": samples, "steps": steps} for (w, h), samples, steps, _ in found.histogram()]
    return {
        "samples": len(found.snapshot), "steps_per_epoch": found.steps_per_epoch, "left_out_per_epoch": found.dropped,
        "cropped_away": round(found.cropped_away(), 4), "buckets": buckets, "quarantined": len(stream.quarantine),
        "waited_seconds": round(stream.wait_seconds, 1),
    }  # fmt: skip


def summary_line(stream: Stream) -> str:
    """The same in a line, for people, before the training."""
    said = describe(stream)
    buckets = ", ".join(f"{bucket['size']}: {bucket['samples']:,}" for bucket in said["buckets"])
    return (
        f"data: {said['samples']:,} samples ({buckets}), {said['cropped_away']:.1%} of their area cropped away; {said['steps_per_epoch']:,} steps "
        f"an epoch, {said['left_out_per_epoch']:,} samples left out of each in turn"
    )
