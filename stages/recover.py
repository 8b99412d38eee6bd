"""recover (dev2pro): fine-tunes the whole transformer of a guidance-distilled model at a fixed guidance, with plain flow matching.

At guidance 1.0 classifier-free guidance has no effect, so no teacher is needed: the result approximates the undistilled model
that the base was distilled from. It is for training LoRAs on, not for use (John Shi, "Why Flux LoRA So Hard to Train and How to
Overcome It?", 2024).
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from data import ledger, sources
from data.sources import DataConfig, RunSnapshots
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
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.preview import Preview, PreviewConfig
from dev2pro.training.step import Training
from stages import frame


@dataclass(slots=True, kw_only=True)
class RecoverConfig:
    """See conf/recover.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    data: DataConfig
    hardware: HardwareConfig
    optim: OptimConfig
    probe: ProbeConfig
    steps: int
    batch: int
    guidance: float
    caption_dropout: float
    ema: float
    save_dtype: str
    checkpoint: CheckpointConfig = field(metadata={"identity": False})
    guard: GuardConfig = field(metadata={"identity": False})
    preview: PreviewConfig = field(metadata={"identity": False})
    start: str | None = None
    teacher: str | None = None
    ledger: str | None = field(default=None, metadata={"identity": False})
    publish: str | None = field(default=None, metadata={"identity": False})


def run(config: RecoverConfig) -> Artifact:
    """Recovers the base and writes `transformer/` in diffusers layout, metrics.jsonl and artifact.json into `config.out`."""
    check(config)
    parents: record.Parents = {
        role: path for role, path in (("base", config.model.path), ("start", config.start), ("teacher", config.teacher)) if path
    }
    accelerator = distributed.accelerator(config.hardware)
    distributed.rank_slots(config.batch, config.hardware.micro_batch, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents = {**parents, **snapshots.parents()}
        finished = run_folder.acquire(config.out, "recover", config, parents)
        if finished:
            return record_in_ledger(config, snapshots, finished)
        snapshots.write_and_verify()

    dtype, scheduler = distributed.DTYPES[config.hardware.dtype], flux1.scheduler_settings(config.model.path)
    checkpoint_files.check_start(config.out, flux1.parameters(config.model.path), config.optim, dtype, config.ema)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    accelerator.print(sources.summary_line(stream))
    train_feed, prompt_encoder, held_out = feed.prepare(config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator)
    origin, variant = (config.start, None) if config.start else (config.model.path, config.model.variant)
    transformer = flux1.load_transformer(origin, dtype, variant)
    training = Training(
        accelerator, transformer, config.optim, config.hardware, steps=config.steps, batch=config.batch, ema=config.ema, guard=config.guard
    )
    probe = HeldoutProbe(held_out, config.probe, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )
    if config.teacher:
        probe.set_teacher(flux1.load_transformer(config.teacher, dtype, config.model.variant).to(accelerator.device))

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
    with Log(config.out, "recover (dev2pro)", config.steps, accelerator.is_main_process, start) as log, checkpoints:
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

    record.invalidate(config.out)
    training.save(config.out, distributed.DTYPES[config.save_dtype])
    metrics = {
        **checkpoints.metrics(), "guidance": config.guidance, "curve": curve, "recovered": None if config.start else _recovered(curve),
        "data": sources.describe(stream),
    }  # fmt: skip
    artifact = record.publish(
        accelerator, config.out, "recover", "transformer", config, parents, step=config.steps, metrics=metrics, watched=snapshots.local_inputs()
    )
    return record_in_ledger(config, snapshots, artifact)


def check(config: RecoverConfig) -> None:
    """Raises ConfigError for invalid values and DataError for a damaged ledger, before anything is written."""
    base = flux1.check_transformer(config.model.path)
    if config.teacher:
        flux1.check_transformer(config.teacher)
    if config.start:
        start = flux1.check_transformer(config.start)  # another version of diffusers may have written more keys
        if others := [key for key in start if not key.startswith("_") and base.get(key, start[key]) != start[key]]:
            raise ConfigError(
                f"start={config.start} has another shape than the base, model.path={config.model.path} ({others[0]}). "
                "Give a model that was recovered from this base."
            )
    optim.check(config.optim, shard=config.hardware.shard)
    distributed.check_dtype("save_dtype", config.save_dtype)
    if config.ledger:
        ledger.consumed(config.ledger)


def record_in_ledger(config: RecoverConfig, snapshots: RunSnapshots, artifact: Artifact) -> Artifact:
    """Records the finished run in the ledger as a consumer of its shards, and returns the artifact."""
    if config.ledger and snapshots.is_main_process:
        epochs = config.steps / artifact.metrics["data"]["steps_per_epoch"]
        ledger.record(config.ledger, artifact.id, snapshots.train.id, [shard.sha256 for shard in snapshots.train.shards], epochs)
    return artifact


def _recovered(curve: list[dict[str, Any]]) -> float | None:
    """The share of the base's distance to the teacher that was closed; None without a teacher, or if the distance was zero."""
    if not curve[0].get("teacher_distance"):
        return None
    return 1 - curve[-1]["teacher_distance"] / curve[0]["teacher_distance"]


if __name__ == "__main__":
    frame.main("recover", RecoverConfig, run)
