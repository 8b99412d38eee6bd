"""lora: trains a LoRA on any base, at a fixed guidance, with plain flow matching, and records what it may be applied to."""

from dataclasses import dataclass, field
from typing import Any

import torch

from data import sources
from data.sources import DataConfig, RunSnapshots
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.log import Log
from dev2pro.models import encodings, flux1, lora
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import distributed, feed, optim
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import GuardConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.preview import Preview, PreviewConfig
from dev2pro.training.step import Training
from stages import frame


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """See conf/lora.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    data: DataConfig
    hardware: HardwareConfig
    optim: OptimConfig
    probe: ProbeConfig
    adapter: AdapterConfig
    trained_on: str
    arm: str
    steps: int
    batch: int
    guidance: float
    caption_dropout: float
    checkpoint: CheckpointConfig = field(metadata={"identity": False})
    guard: GuardConfig = field(metadata={"identity": False})
    preview: PreviewConfig = field(metadata={"identity": False})
    publish: str | None = field(default=None, metadata={"identity": False})


def run(config: LoraConfig) -> Artifact:
    """Trains one LoRA and writes it in the diffusers layout, with metrics.jsonl and artifact.json, into `config.out`."""
    check(config)
    accelerator = distributed.accelerator(config.hardware)
    distributed.rank_slots(config.batch, config.hardware.micro_batch, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents: record.Parents = {"trained_on": config.trained_on, "apply_to": config.model.path, **snapshots.parents()}
        if finished := run_folder.acquire(config.out, "lora", config, parents):
            return finished
        snapshots.write_and_verify()

    dtype, scheduler = distributed.DTYPES[config.hardware.dtype], flux1.scheduler_settings(config.model.path)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    accelerator.print(sources.summary_line(stream))
    train_feed, prompt_encoder, held_out = feed.prepare(config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator)
    transformer = flux1.load_transformer(config.trained_on, dtype, config.model.variant)
    if config.hardware.int8_base:
        lora.to_int8(transformer, accelerator.device)
    lora.inject(transformer, config.adapter, config.seed)
    training = Training(accelerator, transformer, config.optim, config.hardware, steps=config.steps, batch=config.batch, guard=config.guard)
    probe = HeldoutProbe(held_out, config.probe, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )

    def make_batch(step: int, slots: range) -> encodings.NoisedBatch:
        encoded = train_feed.get_batch(step, slots)
        return encodings.noise_batch(encoded, prompt_encoder.empty, scheduler, config.caption_dropout, config.seed, step, slots)

    def compute_loss(batch: encodings.NoisedBatch) -> torch.Tensor:
        return flow_matching_loss(training.model, batch, config.guidance)

    def validate(done: int) -> dict[str, Any]:
        with training.ema_weights() as model:
            preview.draw(model, done, config.guidance)
            return {"step": done, **probe.measure(model, config.guidance, config.model.usual_guidance)}

    checkpoints = Checkpoints(config.out, training, config.checkpoint, config.steps, stream.state)
    start, curve = checkpoints.restore()
    train_feed.begin(start, config.steps, training.slots)
    with Log(config.out, f"lora {config.arm}", config.steps, accelerator.is_main_process, start) as log, checkpoints:
        curve = curve or [validate(0)]
        log.emit_validation(*curve)
        for step in range(start, config.steps):
            loss, norm = training.step(step, lambda slots: make_batch(step, slots), compute_loss)  # noqa: B023
            log.write(step + 1, loss=loss, gradient_norm=norm, lr=training.lr)
            if (step + 1) % config.probe.every == 0 or step + 1 == config.steps:
                curve.append(validate(step + 1))
                log.emit_validation(curve[-1])
            checkpoints.on_step_end(step + 1, curve)
            log.step(step + 1, loss=loss, held_out=curve[-1]["loss"])

    contract = inference_contract(config)
    record.invalidate(config.out)
    if accelerator.is_main_process:
        lora.save(accelerator.unwrap_model(training.model), config.adapter, config.out, {**contract, "config": record.identity(config)})
    metrics = {**checkpoints.metrics(), "guidance": config.guidance, "curve": curve, "data": sources.describe(stream)}
    return record.publish(
        accelerator, config.out, "lora", "lora", config, parents, step=config.steps, metrics=metrics, inference=contract,
        watched=snapshots.local_inputs(),
    )  # fmt: skip


def inference_contract(config: LoraConfig) -> dict[str, Any]:
    """What the LoRA was trained on, what it is to be applied to, and how."""
    return {
        "arm": config.arm,
        "trained_on": {"path": config.trained_on, "id": record.fingerprint(config.trained_on)},
        "apply_to": {"path": config.model.path, "id": record.fingerprint(config.model.path)},
        "training_guidance": config.guidance,
        "suggested_guidance": config.model.usual_guidance,
        "suggested_strength": 1.0,
    }


def check(config: LoraConfig) -> None:
    """Raises ConfigError for invalid values, before anything is read."""
    lora.check(config.adapter)
    if config.hardware.int8_base:
        optim.need_torchao("hardware.int8_base=true")
    if config.hardware.shard:
        raise ConfigError(
            "hardware.shard=true is for recover: a LoRA's weights are small, every process keeps the base whole. Set hardware.shard=false."
        )
    flux1.check_transformer(config.trained_on)
    check_guidance(config.trained_on, config.guidance)
    optim.check(config.optim)


def check_guidance(base: str, guidance: float) -> None:
    """Raises ConfigError for training on a recovered model at another guidance than it was recovered at: its guidance input knows no other."""
    artifact = record.read_if_artifact(store.resolve(base))
    if artifact and artifact.stage == "recover" and (recovered_at := artifact.metrics["guidance"]) != guidance:
        raise ConfigError(
            f"guidance={guidance}, but {base} was recovered at guidance {recovered_at} and knows no other. Set "
            f"guidance={recovered_at}; the guidance people use the LoRA at is model.usual_guidance, and true CFG is sampling.cfg_scale."
        )


if __name__ == "__main__":
    frame.main("lora", LoraConfig, run)
