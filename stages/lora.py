"""lora: trains a LoRA on any base, with flow matching or a loss that keeps the guidance, and records what it may be applied to."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel

from data import report, sources
from data.loading.buckets import bucket_sizes
from data.sources import DataConfig, RunSnapshots
from dev2pro import draws
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.log import Log
from dev2pro.models import encodings, flux1, lora, model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.lora import AdapterConfig
from dev2pro.models.transfer import to_device
from dev2pro.planning import plan
from dev2pro.training import checkpoint_space, distributed, feed, optim, time_limits
from dev2pro.training.checkpoint import Checkpoints
from dev2pro.training.checkpoint_space import LoraCheckpointConfig
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import GuardConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.lora_origins import Origins
from dev2pro.training.loss import LOSSES, LossConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.prefetch import Prefetcher
from dev2pro.training.preserve import PreserveConfig, preservation_loss
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
    checkpoint: LoraCheckpointConfig = field(metadata={"identity": False})
    guard: GuardConfig = field(metadata={"identity": False})
    preview: PreviewConfig = field(metadata={"identity": False})
    loss: LossConfig = field(default_factory=LossConfig, metadata={"identity": "if set"})
    preserve: PreserveConfig = field(default_factory=PreserveConfig, metadata={"identity": "if set"})
    start: str | None = field(default=None, metadata={"identity": "if set"})
    training_adapter: str | None = field(default=None, metadata={"identity": "if set"})
    publish: str | None = field(default=None, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


# a batch, its guidance (B,), the empty caption, and the captions to preserve if there are any
LossArguments = tuple[encodings.NoisedBatch, torch.Tensor, flux1.Conditioning, flux1.Conditioning | None]


def run(config: LoraConfig) -> Artifact | None:
    """Trains one LoRA and writes it in the diffusers layout, with metrics.jsonl and artifact.json, into `config.out`."""
    if check(config):
        return None
    accelerator = distributed.accelerator(config.hardware)
    hardware = replace(config.hardware, step_in_backward=False)  # a LoRA's gradients are small
    distributed.rank_slots(config.batch, hardware, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents: record.Parents = {**origins_of(config).parents(apply_to=config.model.path), **snapshots.parents()}
        if finished := run_folder.acquire(config.out, "lora", config, parents, look=config.check):
            tell_missing_steps(config, config.steps)
            return finished
        snapshots.write_and_verify(write=not config.check)

    scheduler, contract = flux1.scheduler_settings(config.model.path), inference_contract(config)
    check_space(config, hardware.weights)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    data_facts = report.start(snapshots, stream, config.model.path, config.model.max_sequence_length, write=not config.check)
    if strangers := config.preserve.check_captions(stream.captions()[1]):
        accelerator.print(strangers, flush=True)
    if config.check:
        return frame.checked("lora", config)
    train_feed, prompt_encoder, held_out = feed.prepare(
        config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator, config.preserve.rewrite
    )
    transformer, teacher = load_models(config, hardware, accelerator)
    training = Training(accelerator, transformer, config.optim, hardware, steps=config.steps, batch=config.batch, guard=config.guard)
    probe = HeldoutProbe(held_out, config.probe, accelerator, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )

    def compute_loss(args: LossArguments) -> torch.Tensor:
        batch, guidance, null_conditioning, kept = args
        loss = LOSSES[config.loss.name](training.model, batch, guidance, null_conditioning, teacher)
        return loss + config.preserve.weight * preservation_loss(training.model, batch, guidance, kept) if kept else loss

    def validate(done: int) -> dict[str, Any]:
        with training.ema_weights() as model:
            preview.draw(model, done, config.guidance)
            return {"step": done, **probe.measure(model, config.guidance, config.model.usual_guidance)}

    checkpoints = Checkpoints(config.out, training, config.checkpoint, config.steps, stream.state)
    start, curve = checkpoints.restore()
    tell_missing_steps(config, start)
    make_batch = batch_maker(config, train_feed, prompt_encoder, scheduler, accelerator.device)
    batches = Prefetcher(train_feed, make_batch, range(start, config.steps), training.slots, accelerator.device)
    log = Log(config.out, f"lora {config.arm}", config.steps, accelerator.is_main_process, start)
    with batches, log, time_limits.strict(accelerator), checkpoints:
        curve = curve or [validate(0)]
        log.emit_validation(*curve)
        for step in range(start, config.steps):
            loss, norm = training.step(step, lambda slots: batches.get(step, slots), compute_loss)  # noqa: B023
            log.write(step + 1, loss=loss, gradient_norm=norm, lr=training.lr)
            if (step + 1) % config.probe.every == 0 or step + 1 == config.steps:
                curve.append(validate(step + 1))
                log.emit_validation(curve[-1])
            save_step(config, training, contract, step + 1)  # before the checkpoint: a run that goes on from there does not come back for it
            checkpoints.on_step_end(step + 1, curve)
            log.step(step + 1, loss=loss, held_out=curve[-1]["loss"])

    record.invalidate(config.out)
    if accelerator.is_main_process:
        lora.save(accelerator.unwrap_model(training.model), config.adapter, config.out, {**contract, "config": record.identity(config)})
    metrics = {**checkpoints.metrics(), "guidance": config.guidance, "curve": curve, "data": sources.describe(stream) | data_facts}
    return record.publish(
        accelerator, config.out, "lora", "lora", config, parents, step=config.steps, metrics=metrics, inference=contract,
        watched=snapshots.local_inputs(),
    )  # fmt: skip


def batch_maker(
    config: LoraConfig, train_feed: feed.Feed, prompt_encoder: encodings.PromptEncoder, scheduler: dict[str, Any], device: torch.device
) -> Callable[[int, range], LossArguments]:
    """What makes the micro-batch for some slots of a step."""
    low, high = config.loss.guidances(config.guidance)

    def make_batch(step: int, slots: range) -> LossArguments:
        encoded = train_feed.get_batch(step, slots)
        batch = encodings.noise_batch(encoded, prompt_encoder.empty, scheduler, config.caption_dropout, config.seed, step, slots)
        guidance = low + (high - low) * draws.uniform(config.seed, "guidance", step, slots)
        kept = config.preserve.conditioning(batch, encoded.captions, prompt_encoder)
        return batch, to_device(guidance, device), batch.null_conditioning(prompt_encoder.empty), kept

    return make_batch


def check_space(config: LoraConfig, dtype: torch.dtype) -> None:
    """Raises SpaceError unless the checkpoints, the LoRAs of steps and the result fit into `out`, before a model is loaded."""
    skeleton, checkpoint, steps = flux1.skeleton(config.trained_on, dtype), config.checkpoint, config.steps
    lora.inject(skeleton, config.adapter, config.seed)
    checkpoint_space.check(config.out, skeleton, config.optim, checkpoint, steps, 0, torch.float32, checkpoint.count(steps), whole=False)


def save_step(config: LoraConfig, training: Training, contract: dict[str, Any], step: int) -> None:
    """Writes the LoRA as it is into `out`/steps/<step>, if this is one of the steps to keep; the same weights as a run that ends here would save."""
    accelerator, every = training.accelerator, config.checkpoint.loras
    if every and step % every == 0 and accelerator.is_main_process:
        folder = Path(config.out) / record.STEPS / f"{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        with training.clock.paused():
            lora.save(accelerator.unwrap_model(training.model), config.adapter, str(folder), {**contract, "step": step})


def tell_missing_steps(config: LoraConfig, done: int) -> None:
    """Says which LoRAs of steps this run will not have, because it had come that far when `checkpoint.loras` was set."""
    every, folder = config.checkpoint.loras, Path(config.out) / record.STEPS
    missing = [step for step in range(every, done + 1, every) if not (folder / f"{step:06d}" / lora.WEIGHTS).exists()] if every else []
    if missing and os.environ.get("RANK", "0") == "0":
        several = f"{len(missing)} of them, of steps {missing[0]} to {missing[-1]}, are" if len(missing) > 1 else f"that of step {missing[0]} is"
        print(f"checkpoint.loras={every}: {several} not kept, as the run had come that far before. For all of them choose another out=.", flush=True)


def inference_contract(config: LoraConfig) -> dict[str, Any]:
    """What the LoRA was trained on, what it is to be applied to, and how."""
    return {
        "arm": config.arm,
        "trained_on": {"path": config.trained_on, "id": record.fingerprint(config.trained_on)},
        "apply_to": {"path": config.model.path, "id": record.fingerprint(config.model.path)},
        "training_guidance": config.loss.guidance_range or config.guidance,
        "suggested_guidance": config.model.usual_guidance,
        "suggested_strength": 1.0,
    }


def check(config: LoraConfig) -> bool:
    """Whether the run was only to be planned. Raises ConfigError for invalid values, before anything is read."""
    lora.check(config.adapter)
    if config.hardware.shard:
        raise ConfigError(
            "hardware.shard=true is for recover: a LoRA's weights are small, every process keeps the base whole. Set hardware.shard=false."
        )
    if config.hardware.float8:
        raise ConfigError("hardware.float8=true is for recover and distill, which train the layers it rounds. Set hardware.float8=false.")
    optim.check(config.optim)
    config.loss.check(config.guidance)
    config.preserve.check(config.caption_dropout)
    if plan.check("lora", config, bucket_sizes(config.data.resolution, config.data.bucket_step, config.data.aspect)):
        return True
    has_base = model_folder.has_transformer(config.model.path)  # training reads only the encoders of what the LoRA is to be applied to
    models = {"trained_on": config.trained_on, "loss.teacher": config.loss.teacher}
    model_folder.check_models(config.model.path, config.model.variant, base=has_base, **models)
    origins_of(config).check(config.adapter, config.loss.guidances(config.guidance))
    return False


def origins_of(config: LoraConfig) -> Origins:
    """What the LoRA is made from besides pictures."""
    return Origins(config.trained_on, config.training_adapter, config.start, config.loss.teacher, config.loss.teacher_lora)


def load_models(
    config: LoraConfig, hardware: HardwareConfig, accelerator: Accelerator
) -> tuple[FluxTransformer2DModel, FluxTransformer2DModel | None]:
    """What the LoRA is trained on, with the LoRA in it, and the frozen teacher of the loss, if it has one."""
    transformer = flux1.load_transformer(config.trained_on, hardware.weights, config.model.variant)
    if config.training_adapter:
        lora.merge(transformer, store.resolve(config.training_adapter))
    if hardware.int8_base:
        lora.to_int8(transformer, torch.device("cpu") if hardware.offloaded_blocks else accelerator.device)
    if config.loss.bypass_guidance:
        flux1.bypass_guidance(transformer)
    lora.inject(transformer, config.adapter, config.seed)
    if config.start:
        lora.begin_from(transformer, config.adapter, store.resolve(config.start))
    if not config.loss.teacher:
        return transformer, None
    teacher = flux1.load_transformer(config.loss.teacher, hardware.weights, config.model.variant)
    if config.loss.teacher_lora:
        lora.merge(teacher, store.resolve(config.loss.teacher_lora))
    return transformer, teacher.to(accelerator.device).eval().requires_grad_(False)


if __name__ == "__main__":
    frame.main("lora", LoraConfig, run)
