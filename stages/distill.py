"""distill: guidance distillation as the article guesses FLUX.1-dev was made, from any teacher.

The student takes a random guidance as input and learns the prediction the teacher makes under true classifier-free guidance of
that strength, plus plain flow matching with a weight (Meng et al., "On Distillation of Guided Diffusion Models", 2022,
https://arxiv.org/abs/2210.03142; John Shi 2024). It makes the miniature's base.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from data import sources
from data.sources import DataConfig, RunSnapshots
from dev2pro import draws
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.log import Log
from dev2pro.models import encodings, flux1
from dev2pro.models.flux1 import ModelConfig
from dev2pro.training import checkpoint_files, distributed, feed, optim
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import GuardConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.loss import distillation_loss
from dev2pro.training.optim import OptimConfig
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
    publish: str | None = field(default=None, metadata={"identity": False})


def run(config: DistillConfig) -> Artifact:
    """Distils the teacher into a student that starts as its copy; writes `transformer/`, metrics.jsonl and artifact.json."""
    check(config)
    low, high = config.guidance
    accelerator = distributed.accelerator(config.hardware)
    distributed.rank_slots(config.batch, config.hardware.micro_batch, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents: record.Parents = {"teacher": config.teacher, **snapshots.parents()}
        finished = run_folder.acquire(config.out, "distill", config, parents)
        if finished:
            return finished
        snapshots.write_and_verify()

    dtype, scheduler = distributed.DTYPES[config.hardware.dtype], flux1.scheduler_settings(config.model.path)
    checkpoint_files.check_start(config.out, flux1.parameters(config.teacher), config.optim, dtype, config.ema)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    accelerator.print(sources.summary_line(stream))
    train_feed, prompt_encoder, held_out = feed.prepare(config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator)
    teacher = flux1.load_transformer(config.teacher, dtype, config.model.variant).to(accelerator.device).eval().requires_grad_(False)
    student = flux1.load_transformer(config.teacher, dtype, config.model.variant)
    training = Training(
        accelerator, student, config.optim, config.hardware, steps=config.steps, batch=config.batch, ema=config.ema, guard=config.guard
    )
    probe = HeldoutProbe(held_out, config.probe, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )
    probe.set_teacher(teacher)

    def make_batch(step: int, slots: range) -> tuple[encodings.NoisedBatch, flux1.Conditioning, torch.Tensor]:
        encoded = train_feed.get_batch(step, slots)
        batch = encodings.noise_batch(encoded, prompt_encoder.empty, scheduler, config.caption_dropout, config.seed, step, slots)
        guidance = low + (high - low) * draws.uniform(config.seed, "guidance", step, slots)
        return batch, flux1.build_conditioning(*prompt_encoder.encode([""] * len(slots)), encoded.grid), guidance.to(batch.x_t)

    def compute_loss(batch_args: tuple[encodings.NoisedBatch, flux1.Conditioning, torch.Tensor]) -> torch.Tensor:
        batch, null_conditioning, guidance = batch_args
        return distillation_loss(training.model, teacher, batch, null_conditioning, guidance, config.flow_weight)

    def validate(done: int) -> dict[str, Any]:
        with training.ema_weights() as model:
            preview.draw(model, done, config.model.usual_guidance)
            return {"step": done, **probe.measure(model, 1.0, config.model.usual_guidance)}

    checkpoints = Checkpoints(config.out, training, config.checkpoint, config.steps, stream.state)
    start, curve = checkpoints.restore()
    train_feed.begin(start, config.steps, training.slots)
    with Log(config.out, "distill", config.steps, accelerator.is_main_process, start) as log, checkpoints:
        curve = curve or [validate(0)]
        log.emit_validation(*curve)
        for step in range(start, config.steps):
            loss, norm = training.step(step, lambda slots: make_batch(step, slots), compute_loss)  # noqa: B023
            log.write(step + 1, loss=loss, gradient_norm=norm, lr=training.lr)
            if (step + 1) % config.probe.every == 0 or step + 1 == config.steps:
                curve.append(validate(step + 1))
                log.emit_validation(curve[-1])
            checkpoints.on_step_end(step + 1, curve)
            log.step(step + 1, loss=loss, guidance_gap=curve[-1]["guidance_gap"])

    record.invalidate(config.out)
    training.save(config.out, distributed.DTYPES[config.save_dtype])
    metrics = {**checkpoints.metrics(), "guidance": config.guidance, "curve": curve, "data": sources.describe(stream)}
    return record.publish(
        accelerator, config.out, "distill", "transformer", config, parents, step=config.steps, metrics=metrics, watched=snapshots.local_inputs()
    )


def check(config: DistillConfig) -> None:
    """Raises ConfigError for invalid values, before anything is read."""
    low, high = config.guidance
    if not 0 < low <= high:
        raise ConfigError(f"guidance={config.guidance} is no range. Give the lowest and the highest guidance to train at, such as [2,6].")
    flux1.check_transformer(config.teacher)
    optim.check(config.optim, shard=config.hardware.shard)
    distributed.check_dtype("save_dtype", config.save_dtype)


if __name__ == "__main__":
    frame.main("distill", DistillConfig, run)
