"""Resolves data.train and data.heldout to snapshots and writes them to the run folder before a model is loaded."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from data import commands, pack
from data.loading.buckets import bucket_sizes
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Batch, Stream
from data.shards import encoded, snapshot, table
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import ConfigError, DataError
from dev2pro.redact import redact_url

SQUARES_BATCH = 16  # pictures a batch, where they are read once


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """The data set and its preprocessing; see conf/data/."""

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
    """The snapshots of a run. A resumed run uses the snapshots in its folder, even if new data has appeared.

    `resuming`: whether the run has output. The main process verifies and writes; the others read what it wrote.
    Raises DataError for data that is not indexed, missing or changed.
    """

    def __init__(self, config: DataConfig, out: str, *, resuming: bool, is_main_process: bool = True) -> None:
        check(config)
        self.config, self.out, self.is_main_process, self.transport = config, out, is_main_process, Transport(config.read)
        self._sources = {"train": config.train, "heldout": config.heldout}
        self._fresh = set[str]()  # roles whose snapshot was built in this run, so is already verified
        self.train, self.heldout = (self._resolve(role, resuming or not is_main_process) for role in self._sources)
        judges = {shard.sha256 for shard in self.heldout.shards}
        if shared := next((shard.url for shard in self.train.shards if shard.sha256 in judges), None):
            raise DataError(f"{redact_url(shared)} is in data.train and in data.heldout. What is trained on cannot judge: take it out of one.")
        if missing := [part for part in config.stored if part not in self.train.encodings]:
            raise DataError(f"data.stored={config.stored}, but the shards of data.train hold no {missing[0]}. Encode them with stages.encode first.")

    def _resolve(self, role: str, reuse_existing: bool) -> Snapshot:
        file, sources = self.file(role), self._sources[role]
        if file != _snapshot_path(sources) and not (reuse_existing and os.path.exists(file)):
            self._fresh.add(role)
            return build_snapshot(sources, f"data.{role}", self.transport)
        existing = snapshot.read(file)
        changed = [folder for folder, listing in existing.head["folders"].items() if self.is_main_process and _listing(folder) != listing]
        if changed:
            raise ChangedError(changed[0], "its files are others")
        return snapshot.check(existing, self.transport, remote=False) if self.is_main_process else existing

    def file(self, role: str) -> str:
        """The path of a role's snapshot: the given one, or in the run folder."""
        return _snapshot_path(self._sources[role]) or f"{self.out}/{role}{snapshot.ENDING}"

    def parents(self) -> dict[str, tuple[str, str]]:
        """role -> (path of the snapshot, its id)."""
        return {"data.train": (self.file("train"), self.train.id), "data.heldout": (self.file("heldout"), self.heldout.id)}

    def local_inputs(self) -> list[str]:
        """Local inputs that could change after the run: shards, or packed folders."""
        both, packed = (self.train, self.heldout), os.path.abspath(self.config.read.cache)
        folders = [folder for snap in both for folder in snap.head["folders"]]
        shards = [shard.url for snap in both for shard in snap.shards if not urls.is_remote(shard.url) and not shard.url.startswith(packed)]
        return [os.path.relpath(path) for path in dict.fromkeys(folders + shards)]

    def write_and_verify(self) -> None:
        """Writes what is not written yet, and checks that remote shards are unchanged. Call it before a model is loaded."""
        for role, snap in (("train", self.train), ("heldout", self.heldout)):
            if role in self._fresh:
                snap.write(self.file(role))
            elif self.is_main_process:
                snapshot.check(snap, self.transport)

    def stream(self, seed: int, batch: int, rank: int = 0) -> Stream:
        """The training samples, for `batch` slots a step."""
        config, quarantine = self.config, Quarantine(self.train, f"{self.out}/quarantine{f'-{rank}' if rank else ''}.jsonl")
        buckets = bucket_sizes(config.resolution, config.bucket_step, config.aspect)
        ordered = Order(self.train, buckets, seed, batch, cropped="latents" in config.stored)
        parts = [*([] if "latents" in config.stored else ["picture"]), "caption", *config.stored]
        return Stream(ordered, config.read, Augment(config.crop, config.flip), quarantine, parts)

    def reference(self, samples: int) -> Iterator[Batch]:
        """Center-cropped squares of the first held-out pictures."""
        return _squares(self.heldout, self.config.resolution, samples, self.config.read)


def _snapshot_path(sources: Sequence[str]) -> str:
    """The given snapshot's path, or ""."""
    return sources[0] if len(sources) == 1 and sources[0].endswith(snapshot.ENDING) else ""


def open_snapshot(sources: Sequence[str], what: str, transport: Transport) -> Snapshot:
    """The given snapshot, checked, or one of folders and indexed tars; `what` names the setting in messages."""
    given = _snapshot_path(sources)
    return snapshot.check(snapshot.read(given), transport) if given else build_snapshot(sources, what, transport)


def build_snapshot(sources: Sequence[str], what: str, transport: Transport) -> Snapshot:
    """A snapshot of folders and indexed tars."""
    shards, folders = list[str](), dict[str, str]()
    for url in (url for source in sources for url in urls.expand(source, what)):
        if os.path.isdir(url):
            folders[url] = _listing(url)
            shards += _pack_once(url, folders[url], transport.config.cache, what)
        elif url.endswith(snapshot.ENDING):
            raise ConfigError(f"{what}={list(sources)} has a snapshot among other places. Give it alone; it says all there is to train on.")
        else:
            shards.append(url)
    built = snapshot.build(shards, transport, sources=sources, folders=folders)
    if not len(built):
        raise DataError(f"{what}={list(sources)} holds no samples. Give indexed tars, or a folder with pictures and a .txt caption beside each.")
    return built


def squares(sources: Sequence[str], what: str, resolution: int) -> Iterator[Batch]:
    """Center-cropped squares of every picture of folders and indexed tars."""
    read = ReadConfig()
    source = open_snapshot(sources, what, Transport(read))
    return _squares(source, resolution, len(source), read)


def _squares(source: Snapshot, resolution: int, samples: int, read: ReadConfig) -> Iterator[Batch]:
    square, rows = (resolution, resolution), range(min(samples, len(source)))
    return Stream(Order(source, [square], 0, 1), replace(read, workers=0), Augment(), Quarantine(source)).rows(rows, square, SQUARES_BATCH)


def _listing(folder: str) -> str:
    """A digest of a folder's file names, sizes and modification times."""
    return table.digest(pack.list_files(Path(folder)))


def _pack_once(folder: str, listing: str, cache: str, what: str) -> list[str]:
    """The shards of a folder of pictures, packed once and cached."""
    target = f"{cache}/packed/{table.digest([os.path.abspath(folder), listing])[:16]}"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with FileLock(f"{target}.lock"):  # two stages may pack the same folder at the same time
        if not os.path.isdir(target):
            try:
                pack.pack(folder, target, workers=commands.cores())
            except DataError as error:
                raise DataError(f"{what}: {error}") from error
    return sorted(str(file) for file in Path(target).glob("*.tar"))


def describe(stream: Stream) -> dict[str, Any]:
    """Data statistics of a run, for its artifact."""
    run_order = stream.order
    buckets = [{"size": f"{w}x{h}", "samples": samples, "steps": steps} for (w, h), samples, steps, _ in run_order.histogram()]
    return {
        "samples": len(run_order.snapshot), "steps_per_epoch": run_order.steps_per_epoch, "left_out_per_epoch": run_order.dropped,
        "cropped_away": round(run_order.cropped_away(), 4), "buckets": buckets, "quarantined": len(stream.quarantine),
        "waited_seconds": round(stream.wait_seconds, 1),
    }  # fmt: skip


def summary_line(stream: Stream) -> str:
    """The statistics as one line, printed before training."""
    stats = describe(stream)
    buckets = ", ".join(f"{bucket['size']}: {bucket['samples']:,}" for bucket in stats["buckets"])
    return (
        f"data: {stats['samples']:,} samples ({buckets}), {stats['cropped_away']:.1%} of their area cropped away; {stats['steps_per_epoch']:,} steps "
        f"an epoch, {stats['left_out_per_epoch']:,} samples left out of each in turn"
    )
