"""draw: a model's own pictures for prompts, as indexed shards to train on: for prior preservation, or where there are no pictures."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from data import captions, packed, shard_writer, sources
from data.storage.transport import ReadConfig, Transport
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.judging.cells import Inference
from dev2pro.judging.prompts import read_prompts
from dev2pro.judging.sampler import Sampler
from dev2pro.judging.shares import share
from dev2pro.log import Progress
from dev2pro.models import model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from dev2pro.planning import account
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from stages import frame

SHARD_PICTURES = 64  # about: whole batches. A kill costs up to a shard a rank


@dataclass(slots=True, kw_only=True)
class DrawConfig:
    """See conf/draw.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    hardware: HardwareConfig
    sampling: SamplingConfig
    prompts: str | None
    captions: list[str]
    seeds: int
    guidance: float
    resolution: int
    publish: str | None = field(default=None, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: DrawConfig) -> Artifact | None:
    """Draws shard by shard, the ranks sharing them; writes 000000.tar and so on, their indexes and artifact.json into `config.out`.

    Shards that are there are kept, so that an interrupted run resumes with its current ones.
    """
    prompts, parents = check(config)
    accelerator, transport = distributed.accelerator(config.hardware), Transport(ReadConfig())
    with accelerator.main_process_first():
        finished = run_folder.acquire(config.out, "draw", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("draw", config)

    sampler = Sampler.of(config, prompts, accelerator.device)
    inference = Inference("base", config.model.path, config.guidance, config.sampling.cfg_scale)
    batch = config.sampling.batch
    size = max(1, SHARD_PICTURES // batch) * batch
    shards = [range(first, min(first + size, sampler.count)) for first in range(0, sampler.count, size)]

    def samples(rows: range) -> Iterator[dict[str, Any]]:
        sampler.apply(inference, None)
        for first in range(rows.start, rows.stop, batch):
            some = range(first, min(first + batch, rows.stop))
            for row, picture in zip(some, sampler.sample(some), strict=True):
                yield {"__key__": f"{row:08d}", "png": png(picture), "txt": prompts[row // config.seeds]}
                progress.step(row + 1)

    def draw(rows: range) -> None:
        name = f"{config.out}/{rows.start // size:06d}.tar"
        if os.path.exists(name):
            shard_writer.add_index(name, transport)
        else:
            shard_writer.write(samples(rows), name, f"{config.out}/{accelerator.process_index}.partial", transport)

    with Progress("draw", sampler.count, accelerator.is_main_process) as progress:
        share(accelerator, shards, draw)
    metrics = {"pictures": sampler.count, "prompts": len(prompts), "shards": len(shards)}
    return record.publish(accelerator, config.out, "draw", "pictures", config, parents, step=sampler.count, metrics=metrics)


def check(config: DrawConfig) -> tuple[list[str], record.Parents]:
    """The prompts, and what the pictures come from. Raises ConfigError for invalid values, before weights are read."""
    config.sampling.check()
    if bool(config.prompts) == bool(config.captions):
        given = "Both prompts= and captions= are" if config.prompts else "Neither prompts= nor captions= is"
        raise ConfigError(f"{given} given, and one of them says what is drawn. Give a file of prompts, or shards with captions.")
    model_folder.check_models(config.model.path, config.model.variant, base=True)
    encoders = account.load_encoders(config)
    encoders.grid((config.resolution,) * 2)
    parents: dict[str, Any] = {"model": config.model.path}
    if config.prompts:
        found = [prompt for group in read_prompts(config.prompts, least=1) for prompt in group]
        parents["prompts"] = config.prompts
    else:
        packed.check_out(config.out, {"captions": config.captions})
        source = sources.open_snapshot(config.captions, "captions", Transport(read := ReadConfig()))
        found = list(dict.fromkeys(text for _, text in captions.read_captions(source, range(len(source)), read)))
        parents["data.captions"] = (", ".join(config.captions), source.id)
    if (needed := len(found) * encoders.text_bytes() / 1e9) > config.hardware.encodings_gb:
        raise ConfigError(
            f"{len(found):,} prompts take {needed:.3g} GB of host memory once they are encoded, and hardware.encodings_gb is "
            f"{config.hardware.encodings_gb:g}. Draw them in several runs, or raise it."
        )
    return found, parents


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in [0, 1] as a PNG of 8 bits a channel."""
    encoded = io.BytesIO()
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(encoded, "PNG")
    return encoded.getvalue()


if __name__ == "__main__":
    frame.main("draw", DrawConfig, run)
