"""distill: guidance distillation as the article guesses FLUX.1-dev was made, from any teacher.

The student takes a random guidance as input and learns the prediction the teacher makes under true classifier-free guidance of
that strength, plus plain flow matching with a weight (Meng et al., "On Distillation of Guided Diffusion Models", 2022,
https://arxiv.org/abs/2210.03142; John Shi 2024). It makes the miniature's base.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from data import report, sources
from data.loading.buckets import bucket_sizes
from data.sources import DataConfig, RunSnapshots
from dev2pro import draws
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.log import Log
from dev2pro.models import encodings, flux1, model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.transfer import to_device
from dev2pro.planning import plan
from dev2pro.training import checkpoint_space, distributed, feed, optim, time_limits, wrapping
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import GuardConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.loss import distillation_loss, pair_distillation_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.prefetch import Prefetcher
from dev2pro.training.preview import Preview, PreviewConfig
from dev2pro.training.step import Training
from stages import frame


@dataclass(slots=True, kw_only=True)
class DistillConfig:
    """See conf/distill.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    data: DataConfig
    hardware: HardwareConfig
    optim: OptimConfig
    probe: ProbeConfig
    teacher: str
    steps: int
    batch: int
    guidance: list[float]
    flow_weight: float
    caption_dropout: float
    ema: float
    save_dtype: str
    checkpoint: CheckpointConfig = field(metadata={"identity": False})
    guard: GuardConfig = field(metadata={"identity": False})
    preview: PreviewConfig = field(metadata={"identity": False})
    pairs: bool = field(default=False, metadata={"identity": "if set"})
    publish: str | None = field(default=None, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: DistillConfig) -> Artifact | None:
    """Distils the teacher into a student that starts as its copy; writes `transformer/`, metrics.jsonl and artifact.json."""
    if check(config):
        return None
    loss_at = pair_distillation_loss if config.pairs else distillation_loss
    accelerator = distributed.accelerator(config.hardware)
    distributed.rank_slots(config.batch, config.hardware, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents: record.Parents = {"teacher": config.teacher, **snapshots.parents()}
        if finished := run_folder.acquire(config.out, "distill", config, parents, look=config.check):
            return finished
        snapshots.write_and_verify(write=not config.check)

    dtype, result, scheduler = config.hardware.weights, distributed.DTYPES[config.save_dtype], flux1.scheduler_settings(config.model.path)
    checkpoint_space.check(config.out, flux1.skeleton(config.teacher, dtype), config.optim, config.checkpoint, config.steps, config.ema, result)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    data_facts = report.start(snapshots, stream, config.model.path, config.model.max_sequence_length, write=not config.check)
    if config.check:
        return frame.checked("distill", config)
    train_feed, prompt_encoder, held_out = feed.prepare(config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator)
    teacher = wrapping.load_transformer(config.teacher, config.hardware, accelerator, config.model.variant)
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    student = wrapping.load_transformer(config.teacher, config.hardware, accelerator, config.model.variant)
    training = Training(
        accelerator, student, config.optim, config.hardware, steps=config.steps, batch=config.batch, ema=config.ema, guard=config.guard
    )
    probe = HeldoutProbe(held_out, config.probe, accelerator, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )
    probe.set_teacher(teacher)

    def make_batch(step: int, slots: range) -> tuple[encodings.NoisedBatch, flux1.Conditioning, torch.Tensor]:
        encoded = train_feed.get_batch(step, slots)
        batch = encodings.noise_batch(encoded, prompt_encoder.empty, scheduler, config.caption_dropout, config.seed, step, slots)
        return batch, batch.null_conditioning(prompt_encoder.empty), to_device(draw_guidance(config, step, slots), accelerator.device)

    def compute_loss(batch_args: tuple[encodings.NoisedBatch, flux1.Conditioning, torch.Tensor]) -> torch.Tensor:
        batch, null_conditioning, guidance = batch_args
        return loss_at(training.model, teacher, batch, null_conditioning, guidance, config.flow_weight)

    def validate(done: int) -> dict[str, Any]:
        with training.ema_weights() as model:
            preview.draw(model, done, config.model.usual_guidance)
            return {"step": done, **probe.measure(model, 1.0, config.model.usual_guidance)}

    checkpoints = Checkpoints(config.out, training, config.checkpoint, config.steps, stream.state)
    start, curve = checkpoints.restore()
    batches = Prefetcher(train_feed, make_batch, range(start, config.steps), training.slots, accelerator.device)
    log = Log(config.out, "distill", config.steps, accelerator.is_main_process, start)
    with batches, log, time_limits.strict(accelerator), checkpoints:
        curve = curve or [validate(0)]
        log.emit_validation(*curve)
        for step in range(start, config.steps):
            loss, norm = training.step(step, lambda slots: batches.get(step, slots), compute_loss)  # noqa: B023
            log.write(step + 1, loss=loss, gradient_norm=norm, lr=training.lr)
            if (step + 1) % config.probe.every == 0 or step + 1 == config.steps:
                curve.append(validate(step + 1))
                log.emit_validation(curve[-1])
            checkpoints.on_step_end(step + 1, curve)
            log.step(step + 1, loss=loss, guidance_gap=curve[-1]["guidance_gap"])

    record.invalidate(config.out)
    training.save(config.out, result)
    metrics = {**checkpoints.metrics(), "guidance": config.guidance, "curve": curve, "data": sources.describe(stream) | data_facts}
    return record.publish(
        accelerator, config.out, "distill", "transformer", config, parents, step=config.steps, metrics=metrics, watched=snapshots.local_inputs()
    )


def draw_guidance(config: DistillConfig, step: int, slots: range) -> torch.Tensor:
    """The guidance of each sample of a step (B,), in pairs two (2, B); in float32 on the CPU."""
    low, high = config.guidance
    purposes = ("guidance", "second guidance") if config.pairs else ("guidance",)
    return low + (high - low) * torch.stack([draws.uniform(config.seed, purpose, step, slots) for purpose in purposes]).squeeze(0)


def check(config: DistillConfig) -> bool:
    """Whether the run was only to be planned. Raises ConfigError for invalid values, before anything is read."""
    if plan.check("distill", config, bucket_sizes(config.data.resolution, config.data.bucket_step, config.data.aspect)):
        return True
    low, high = config.guidance
    if not 0 < low <= high:
        raise ConfigError(f"guidance={config.guidance} is no range. Give the lowest and the highest guidance to train at, such as [2,6].")
    model_folder.check_models(config.model.path, config.model.variant, base=False, teacher=config.teacher)
    distributed.check_full(config.hardware)
    optim.check(config.optim, config.hardware.weights, shard=config.hardware.shard)
    distributed.check_dtype("save_dtype", config.save_dtype)
    return False


if __name__ == "__main__":
    frame.main("distill", DistillConfig, run)
