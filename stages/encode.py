"""encode: rewrites shards with VAE latents and text encodings beside each picture, so that training needs no encoders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data import captions, packed, shard_writer, sources
from data.loading.buckets import bucket_sizes
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Batch, Stream
from data.shards import encoded, pictures, sidecar, snapshot
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.transport import ReadConfig, Transport
from data.tokens import T5Tokens
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DataError
from dev2pro.escape import printable
from dev2pro.log import Progress
from dev2pro.models import model_folder
from dev2pro.models.encodings import PromptEncoder
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.planning import plan
from dev2pro.redact import redact_url
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from stages import frame


@dataclass(slots=True, kw_only=True)
class EncodeConfig:
    """See conf/encode.yaml for what each value is and why."""

    out: str
    to: str
    shards: list[str]
    parts: list[str]
    resolution: int
    aspect: float
    bucket_step: int
    model: ModelConfig
    hardware: HardwareConfig
    background: str = field(default=pictures.WHITE, metadata={"identity": "if set"})
    read: ReadConfig = field(default_factory=ReadConfig, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: EncodeConfig) -> Artifact | None:
    """Encodes shard by shard, the ranks sharing them, into `config.to`; `encoded.snapshot` and artifact.json go into `config.out`.

    Shards that exist and are indexed are kept, so that an interrupted run resumes with its current shard.
    """
    if not config.parts or set(config.parts) - set(feed.STORABLE):
        raise ConfigError(f"parts={config.parts} cannot be encoded. Choose among {', '.join(feed.STORABLE)}.")
    sources.check_background(config.background, "background")
    packed.check_out(config.out, {"shards": config.shards})
    if plan.check("encode", config, sizes := bucket_sizes(config.resolution, config.bucket_step, config.aspect)):
        return None
    model_folder.check_models(config.model.path, config.model.variant, base=False)
    accelerator = distributed.accelerator(config.hardware)
    transport, target = Transport(config.read), urls.normalize(config.to)
    with accelerator.main_process_first():
        source = sources.open_snapshot(config.shards, "shards", transport)
        parents: record.Parents = {"data.shards": (", ".join(config.shards), source.id), "model": config.model.path}
        finished = run_folder.acquire(config.out, "encode", config, parents, look=config.check)
    if finished:
        return finished
    for line in sources.describe_notes(source, "shards", config.background):
        accelerator.print(line)
    if config.check:
        return frame.checked("encode", config)

    if accelerator.is_main_process and "text" in config.parts:
        for finding in captions.sentences(captions.check(source, config.read, T5Tokens(config.model.path, config.model.max_sequence_length))):
            print(printable(f"data: {finding}"), flush=True)
    encoders = Encoders(config.model, config.hardware.encoders, accelerator.device, int8=config.hardware.int8_encoders)
    fingerprints = feed.fingerprints(encoders, sizes, config.parts, pictures.other_than_white(config.background))
    if "text" in config.parts:
        prompt_encoder = PromptEncoder(config.model, encoders, config.hardware.encodings_gb * 1e9)

    def members(batch: Batch) -> list[dict[str, bytes]]:
        """The encodings of each sample, as files."""
        values = {
            "latents": lambda: dict(zip(("mean", "std"), encoders.encode_images(feed.pixels(batch, encoders.device)), strict=True)),
            "text": lambda: dict(zip(("prompt", "pooled"), prompt_encoder.encode(batch.captions), strict=True)),
        }
        of_parts = {part: values[part]() for part in fingerprints}
        return [
            {
                f"{part}.safetensors": encoded.member({n: v[i].cpu().clone() for n, v in tensors.items()}, fingerprints[part])
                for part, tensors in of_parts.items()
            }
            for i in range(len(batch.rows))
        ]

    quarantine = Quarantine(source, f"{config.out}/quarantine-{accelerator.process_index}.jsonl")
    stream = Stream(Order(source, sizes, 0, 1, cropped=True), config.read, Augment(background=config.background), quarantine, keep=True)
    shards = [(f"{target}/{number:06d}.tar", shard) for number, shard in enumerate(source.shards)]
    rank_shards = shards[accelerator.process_index :: accelerator.num_processes]
    with Progress("encode", len(rank_shards), accelerator.is_main_process) as progress:
        for done, (name, shard) in enumerate(rank_shards, 1):
            if not _already_encoded(name, fingerprints, transport):
                batches = stream.row_range(shard.first, shard.first + shard.samples, feed.PICTURES)
                samples = (sample for batch in batches for sample in _samples(batch, source, members))
                shard_writer.write(samples, name, f"{config.out}/{accelerator.process_index}.partial", transport, shard.repeat)
            progress.step(done)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        encoded_snapshot = snapshot.build([name for name, _ in shards], transport, sources=[config.to])
        encoded_snapshot.write(f"{config.out}/encoded{snapshot.ENDING}")
    return record.publish(accelerator, config.out, "encode", "encodings", config, parents, step=len(shards), metrics={"samples": len(source)})


def _already_encoded(name: str, fingerprints: dict[str, Any], transport: Transport) -> bool:
    """Whether a shard was encoded before with the same settings. Raises ConfigError for other settings."""
    try:
        shard_index = sidecar.read(name, transport)
    except DataError:
        return False
    if len(shard_index) and shard_index.head["encodings"] != fingerprints:
        raise ConfigError(f"{redact_url(name)} was encoded in another way. Choose another to=, or remove it.")
    return not shard_index.info.difference(transport.info(name))


def _samples(batch: Batch, source: Snapshot, members: Callable[[Batch], list[dict[str, bytes]]]) -> Iterator[dict[str, Any]]:
    """The samples of a batch for webdataset's writer: the original files and their encodings."""
    for row, parts, encodings in zip(batch.rows, batch.parts, members(batch), strict=True):
        kind = "json" if source.columns["caption_json"][row] else "txt"
        sample = {pictures.suffix(parts["picture"]): parts["picture"], kind: parts["caption"]}
        yield {"__key__": f"{row - source.shard(row).first:08d}", **sample, **encodings}


if __name__ == "__main__":
    frame.main("encode", EncodeConfig, run)
