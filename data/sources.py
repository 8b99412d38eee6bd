"""Resolves data.train and data.heldout to snapshots and writes them to the run folder before a model is loaded."""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data import overlap, packed
from data.folders.files import AS_IT_IS, REPEATS, Reading, survey
from data.loading import shapes
from data.loading.buckets import bucket_sizes
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Batch, Stream
from data.shards import encoded, notes, pictures, snapshot
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import ConfigError, DataError
from dev2pro.redact import redact_url

SQUARES_BATCH = 16  # pictures a batch, where they are read once
IF_SET = {"identity": "if set"}
CHOICES = {"crop": ("center", "random"), "caption_lines": ("one", "several"), "repeats": ("refuse", "honour", "ignore")}


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
    background: str = field(default=pictures.WHITE, metadata=IF_SET)  # a name or #rrggbb, behind transparent pixels
    caption_lines: str = field(default="one", metadata=IF_SET)  # of a .txt in a folder; with several each line is a caption, and one is drawn
    repeats: str = field(default="refuse", metadata=IF_SET)  # of folders named as 10_cat: honour takes their pictures 10 times an epoch, ignore once
    folder_captions: bool = field(default=False, metadata=IF_SET)  # where a picture in a folder has no caption, the folder's name is one
    max_enlarge: float | None = field(default=8.0, metadata={"identity": False})  # more times enlarged, a picture is refused; null for no limit
    max_crop: float | None = field(default=0.9, metadata={"identity": False})  # a larger share cropped away, a picture is refused; null for no limit
    stored: list[str] = field(default_factory=list)  # encodings to take from the shards: latents, text, both; made by stages.encode
    read: ReadConfig = field(default_factory=ReadConfig, metadata={"identity": False})

    @property
    def reading(self) -> Reading:
        """How folders are read."""
        return Reading(self.caption_lines, self.repeats, self.folder_captions)

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits of shapes."""
        return {"enlarge": self.max_enlarge, "crop": self.max_crop}


def check(config: DataConfig) -> None:
    """Raises ConfigError for a value that cannot work."""
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ConfigError(f"data.{key}={getattr(config, key)} is unknown. Choose {', '.join(choices[:-1])} or {choices[-1]}.")
    check_background(config.background, "data.background")
    if config.max_enlarge is not None and not config.max_enlarge >= 1:
        raise ConfigError(f"data.max_enlarge={config.max_enlarge} cannot work. Choose 1 or more, or null for no limit.")
    if config.max_crop is not None and not 0 <= config.max_crop <= 1:
        raise ConfigError(f"data.max_crop={config.max_crop} cannot work. Choose a share from 0 to 1, or null for no limit.")
    if unknown := set(config.stored) - set(encoded.PARTS):
        raise ConfigError(f"data.stored={config.stored} names {min(unknown)}. Choose among {', '.join(encoded.PARTS)}.")
    if "latents" in config.stored and (config.crop != "center" or config.flip):
        raise ConfigError("data.stored=[latents] freezes crop and mirroring as they were encoded. Set data.crop=center and data.flip=false.")
    if not 1 <= config.aspect <= 8:
        raise ConfigError(f"data.aspect={config.aspect} cannot work. Choose 1 for squares, or the longest form to keep, such as 2 for 2:1.")
    if config.aspect > 1 and config.resolution % config.bucket_step:
        raise ConfigError(f"data.resolution={config.resolution} is no multiple of data.bucket_step={config.bucket_step}. Change one of them.")


def check_background(background: str, what: str) -> None:
    """Raises ConfigError for what is no opaque colour."""
    try:
        pictures.other_than_white(background)
    except ValueError as error:
        raise ConfigError(f"{what}={background} is no colour. Give a name, such as white, or \"{what}='#rrggbb'\".") from error


class RunSnapshots:
    """The snapshots of a run. A resumed run uses the snapshots in its folder, even if new data has appeared.

    `resuming`: whether the run has output. The main process verifies and writes; the others read what it wrote.
    Raises DataError for data that is not indexed, missing or changed.
    """

    def __init__(self, config: DataConfig, out: str, *, resuming: bool, is_main_process: bool = True) -> None:
        check(config)
        self.config, self.out, self.is_main_process, self.transport = config, out, is_main_process, Transport(config.read)
        self._sources = {"train": config.train, "heldout": config.heldout}
        packed.check_out(out, {f"data.{role}": places for role, places in self._sources.items()})
        self._fresh = set[str]()  # roles whose snapshot was built in this run, so is already verified
        self.train, self.heldout = (self._resolve(role, resuming or not is_main_process) for role in self._sources)
        if config.reading != AS_IT_IS and not (self.train.head["folders"] or self.heldout.head["folders"]):
            raise ConfigError(
                "data.caption_lines, data.repeats and data.folder_captions are about folders of pictures, and none is in data.train or data.heldout. "
                "Leave them out, or give them to `python -m data.pack` (--caption-lines, --repeats, --folder-captions)."
            )
        judges = {shard.sha256 for shard in self.heldout.shards}
        if shared := next((shard.url for shard in self.train.shards if shard.sha256 in judges), None):
            raise DataError(f"{redact_url(shared)} is in data.train and in data.heldout. What is trained on cannot judge: take it out of one.")
        if missing := [part for part in config.stored if part not in self.train.encodings]:
            raise DataError(f"data.stored={config.stored}, but the shards of data.train hold no {missing[0]}. Encode them with stages.encode first.")
        if is_main_process and not resuming:
            overlap.check(self.shared, self.train, self.heldout, config.read)

    @functools.cached_property
    def shared(self) -> overlap.Overlap:
        """Held-out pictures among the training pictures."""
        return overlap.find(self.train, self.heldout, self.config.read)

    def _resolve(self, role: str, reuse_existing: bool) -> Snapshot:
        file, sources = self.file(role), self._sources[role]
        if file != _snapshot_path(sources) and not (reuse_existing and os.path.exists(file)):
            self._fresh.add(role)
            return build_snapshot(sources, f"data.{role}", self.transport, self.config.reading)
        existing = snapshot.read(file)
        for folder, listing in existing.head["folders"].items() if self.is_main_process else ():
            packed.check(folder, listing, self.config.read.cache, self.config.reading)
        return snapshot.check(existing, self.transport, remote=False) if self.is_main_process else existing

    def file(self, role: str) -> str:
        """The path of a role's snapshot: the given one, or in the run folder."""
        return _snapshot_path(self._sources[role]) or f"{self.out}/{role}{snapshot.ENDING}"

    def parents(self) -> dict[str, tuple[str, str]]:
        """role -> (path of the snapshot, its id)."""
        return {"data.train": (self.file("train"), self.train.id), "data.heldout": (self.file("heldout"), self.heldout.id)}

    def local_inputs(self) -> list[str]:
        """Local inputs that could change after the run: shards, or packed folders."""
        both, cache = (self.train, self.heldout), os.path.abspath(self.config.read.cache)
        folders = [folder for snap in both for folder in snap.head["folders"]]
        shards = [shard.url for snap in both for shard in snap.shards if not urls.is_remote(shard.url) and not shard.url.startswith(cache)]
        return [os.path.relpath(path) for path in dict.fromkeys(folders + shards)]

    def write_and_verify(self, *, write: bool = True) -> None:
        """Writes what is not written yet, if it may, and checks that remote shards are unchanged. Call it before a model is loaded."""
        for role, snap in (("train", self.train), ("heldout", self.heldout)):
            if self.is_main_process:
                print("".join(f"{line}\n" for line in describe_notes(snap, f"data.{role}", self.config.background)), end="", flush=True)
            if role in self._fresh:
                if write:
                    snap.write(self.file(role))
            elif self.is_main_process:
                snapshot.check(snap, self.transport)

    def stream(self, seed: int, batch: int, rank: int = 0) -> Stream:
        """The training samples, for `batch` slots a step. Raises DataError for pictures beyond data.max_enlarge and data.max_crop, names others."""
        config, quarantine = self.config, Quarantine(self.train, f"{self.out}/quarantine{f'-{rank}' if rank else ''}.jsonl")
        buckets = bucket_sizes(config.resolution, config.bucket_step, config.aspect)
        ordered = Order(self.train, buckets, seed, batch, cropped="latents" in config.stored)
        parts = [*([] if "latents" in config.stored else ["picture"]), "caption", *config.stored]
        squares = Order(self.heldout, [(config.resolution, config.resolution)], 0, 1)
        for role, order in (("train", ordered), ("heldout", squares)):
            lines = shapes.check(order, config.limits, f"data.{role}", config.read)
            print("".join(f"{line}\n" for line in lines if rank == 0), end="", flush=True)
        return Stream(ordered, config.read, Augment(config.crop, config.flip, config.background), quarantine, parts)

    def reference(self, samples: int) -> Iterator[Batch]:
        """Center-cropped squares of the first held-out pictures."""
        rows = range(min(samples, len(self.heldout)))
        return squares_of(self.heldout, rows, self.config.resolution, self.config.background, self.config.read)


def _snapshot_path(sources: Sequence[str]) -> str:
    """The given snapshot's path, or ""."""
    return sources[0] if len(sources) == 1 and sources[0].endswith(snapshot.ENDING) else ""


def open_snapshot(sources: Sequence[str], what: str, transport: Transport, reading: Reading = AS_IT_IS) -> Snapshot:
    """The given snapshot, checked, or one of folders and indexed tars; `what` names the setting in messages."""
    given = _snapshot_path(sources)
    return snapshot.check(snapshot.read(given), transport) if given else build_snapshot(sources, what, transport, reading)


def build_snapshot(sources: Sequence[str], what: str, transport: Transport, reading: Reading = AS_IT_IS) -> Snapshot:
    """A snapshot of folders and indexed tars."""
    shards, folders, left_out = list[str](), dict[str, str](), dict[str, notes.Notes]()
    for url in (url for source in sources for url in urls.expand(source, what)):
        if os.path.isdir(url):
            files = survey(Path(url))
            folders[url] = files.digest(reading)
            left_out |= {url: files.left_out} if files.left_out else {}
            shards += packed.shards(files, folders[url], transport.config.cache, what, reading)
        elif url.endswith(snapshot.ENDING):
            raise ConfigError(f"{what}={list(sources)} has a snapshot among other places. Give it alone; it says all there is to train on.")
        else:
            shards.append(url)
    built = snapshot.build(shards, transport, sources=sources, folders=folders, left_out=left_out)
    if not len(built):
        raise DataError(f"{what}={list(sources)} holds no samples. Give indexed tars, or a folder with pictures and a .txt caption beside each.")
    return built


def squares(sources: Sequence[str], what: str, resolution: int, reading: Reading = AS_IT_IS, background: str = pictures.WHITE) -> Iterator[Batch]:
    """Center-cropped squares of every picture of folders and indexed tars."""
    source = open_snapshot(sources, what, Transport(ReadConfig()), reading)
    return squares_of(source, range(len(source)), resolution, background)


def recorded_training(config: dict[str, Any], id: str) -> Snapshot:
    """The training pictures of the data configuration that an artifact has recorded, `id` its snapshot's.

    Raises a StageError for pictures that are gone, DataError if other ones are there now.
    """
    found = open_snapshot(config["train"], "data.train", Transport(ReadConfig()), recorded(config)[0])
    if found.id != id:
        raise DataError(f"data.train={config['train']} holds other pictures now than were trained on. Put those back, if they are needed.")
    return found


def recorded(config: dict[str, Any]) -> tuple[Reading, str]:
    """How folders are read and the background, of the data configuration that an artifact has recorded; keys with default values are missing."""
    reading = {name: config[name] for name in ("caption_lines", "repeats", "folder_captions") if name in config}
    return Reading(**reading), config.get("background", pictures.WHITE)


def squares_of(
    source: Snapshot, rows: Sequence[int], resolution: int, background: str = pictures.WHITE, read: ReadConfig | None = None
) -> Iterator[Batch]:
    """Center-cropped squares of some pictures of a snapshot, by their numbers; skips unusable ones."""
    square, read = (resolution, resolution), replace(read or ReadConfig(), workers=0)
    stream = Stream(Order(source, [square], 0, 1), read, Augment(background=background), Quarantine(source))
    return stream.rows(rows, square, SQUARES_BATCH)


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers 0 to count - 1, evenly spread."""
    return [number * count // min(count, most) for number in range(min(count, most))]


def describe_notes(snap: Snapshot, what: str, background: str) -> list[str]:
    """A line for everything that is left out, altered or repeated; `what` names the setting."""
    lines = [f"{what}: left out of {redact_url(folder)}: {notes.left_out(files)}" for folder, files in snap.left_out.items()]
    lines += [f"{what}: {line}" for line in notes.altered(snap.altered, background)]
    repeats = Counter[int]()
    for shard in snap.shards:
        repeats[shard.repeat] += shard.samples
    once = [folder for folder in snap.head["folders"] if REPEATS.fullmatch(os.path.basename(folder)) and not max(repeats) > 1]
    lines += [f"{what}: {redact_url(folder)} is taken once an epoch; data.repeats=honour takes it as often as its name says" for folder in once]
    several = [(times, f"{count:,} {'picture is' if count == 1 else 'pictures are'}") for times, count in sorted(repeats.items()) if times > 1]
    return lines + [f"{what}: {are} taken {times} times an epoch" for times, are in several]


def describe(stream: Stream) -> dict[str, Any]:
    """Data statistics of a run, for its artifact."""
    run_order = stream.order
    buckets = [{"size": f"{w}x{h}", "samples": samples, "steps": steps} for (w, h), samples, steps, _ in run_order.histogram()]
    return {
        "samples": len(run_order.snapshot), "steps_per_epoch": run_order.steps_per_epoch, "left_out_per_epoch": run_order.dropped,
        "cropped_away": round(run_order.cropped_away(), 4), "buckets": buckets, "quarantined": len(stream.quarantine),
        "waited_seconds": round(stream.wait_seconds, 1), **({"altered": altered} if (altered := run_order.snapshot.altered) else {}),
        **({"left_out": left_out} if (left_out := run_order.snapshot.left_out) else {}),
    }  # fmt: skip


def summary_line(stream: Stream) -> str:
    """The statistics as one line, printed before training."""
    stats = describe(stream)
    buckets = ", ".join(f"{bucket['size']}: {bucket['samples']:,}" for bucket in stats["buckets"])
    return (
        f"data: {stats['samples']:,} samples ({buckets}), {stats['cropped_away']:.1%} of their area cropped away; {stats['steps_per_epoch']:,} steps "
        f"an epoch, {stats['left_out_per_epoch']:,} samples left out of each in turn"
    )
