"""recover (dev2pro): fine-tunes the whole transformer of a guidance-distilled model at a fixed guidance, with plain flow matching.

At guidance 1.0 classifier-free guidance has no effect, so no teacher is needed: the result approximates the undistilled model
that the base was distilled from. It is for training LoRAs on, not for use (John Shi, "Why Flux LoRA So Hard to Train and How to
Overcome It?", 2024).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from data import ledger, report, sources
from data.loading.buckets import bucket_sizes
from data.sources import DataConfig, RunSnapshots
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.log import Log
from dev2pro.models import encodings, flux1, model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.planning import plan
from dev2pro.training import checkpoint_space, distributed, feed, optim, plateau, time_limits, trainable, wrapping
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import GuardConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.prefetch import Prefetcher
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
    trainable: list[str] | None = field(default=None, metadata={"identity": "if set"})
    logit_mean: float = field(default=0.0, metadata={"identity": "if set"})
    stop: float | None = field(default=None, metadata={"identity": "if set"})
    ledger: str | None = field(default=None, metadata={"identity": False})
    publish: str | None = field(default=None, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: RecoverConfig) -> Artifact | None:
    """Recovers the base and writes `transformer/` in diffusers layout, metrics.jsonl and artifact.json into `config.out`."""
    if check(config):
        return None
    accelerator = distributed.accelerator(config.hardware)
    distributed.rank_slots(config.batch, config.hardware, accelerator)
    with accelerator.main_process_first():
        snapshots = RunSnapshots(config.data, config.out, resuming=run_folder.has_output(config.out), is_main_process=accelerator.is_main_process)
        parents: record.Parents = {**_models(config), **snapshots.parents()}
        if finished := run_folder.acquire(config.out, "recover", config, parents, look=config.check):
            return record_in_ledger(config, snapshots, finished)
        snapshots.write_and_verify(write=not config.check)

    dtype, result, scheduler = config.hardware.weights, distributed.DTYPES[config.save_dtype], flux1.scheduler_settings(config.model.path)
    skeleton = trainable.select(flux1.skeleton(config.model.path, dtype), config.trainable, config.model.path)
    checkpoint_space.check(config.out, skeleton, config.optim, config.checkpoint, config.steps, config.ema, result)
    stream = snapshots.stream(config.seed, config.batch, accelerator.process_index)
    data_facts = report.start(snapshots, stream, config.model.path, config.model.max_sequence_length, write=not config.check)
    if config.check:
        return frame.checked("recover", config)
    train_feed, prompt_encoder, held_out = feed.prepare(config.model, stream, snapshots.reference(config.probe.samples), config.hardware, accelerator)
    whole = wrapping.load_transformer(config.start or config.model.path, config.hardware, accelerator, config.model.variant)
    training = Training(
        accelerator, trainable.select(whole, config.trainable, config.model.path), config.optim, config.hardware, steps=config.steps,
        batch=config.batch, ema=config.ema, guard=config.guard,
    )  # fmt: skip
    probe = HeldoutProbe(held_out, config.probe, accelerator, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    preview = Preview(
        config.preview, config.model, config.hardware, held_out, prompt_encoder, scheduler, accelerator, seed=config.seed, out=config.out
    )
    if config.teacher:
        probe.set_teacher(wrapping.load_transformer(config.teacher, config.hardware, accelerator, config.model.variant).to(accelerator.device))

    def make_batch(step: int, slots: range) -> encodings.NoisedBatch:
        encoded = train_feed.get_batch(step, slots)
        drawn = encoded, prompt_encoder.empty, scheduler, config.caption_dropout, config.seed, step, slots
        return encodings.noise_batch(*drawn, logit_mean=config.logit_mean)

    def compute_loss(batch: encodings.NoisedBatch) -> torch.Tensor:
        return flow_matching_loss(training.model, batch, config.guidance)

    def validate(done: int) -> dict[str, Any]:
        with training.ema_weights() as model:
            preview.draw(model, done, config.guidance)
            return {"step": done, **probe.measure(model, config.guidance, config.model.usual_guidance)}

    checkpoints = Checkpoints(config.out, training, config.checkpoint, config.steps, stream.state)
    done, curve = checkpoints.restore()
    batches = Prefetcher(train_feed, make_batch, range(done, config.steps), training.slots, accelerator.device)
    log = Log(config.out, "recover (dev2pro)", config.steps, accelerator.is_main_process, done)
    with batches, log, time_limits.strict(accelerator), checkpoints:
        curve = curve or [validate(0)]
        log.emit_validation(*curve)
        while not _ended(config, done, curve):
            loss, norm = training.step(done, lambda slots: batches.get(done, slots), compute_loss)  # noqa: B023
            done += 1
            log.write(done, loss=loss, gradient_norm=norm, lr=training.lr)
            if done % config.probe.every == 0 or done == config.steps:
                curve.append(validate(done))
                log.emit_validation(curve[-1])
            checkpoints.on_step_end(done, curve, last=_ended(config, done, curve))
            log.step(done, loss=loss, held_out=curve[-1]["loss"])

    record.invalidate(config.out)
    training.save(config.out, result)
    metrics = {**checkpoints.metrics(), **_results(config, done, curve), "data": sources.describe(stream) | data_facts}
    artifact = record.publish(
        accelerator, config.out, "recover", "transformer", config, parents, step=done, metrics=metrics, watched=snapshots.local_inputs()
    )
    return record_in_ledger(config, snapshots, artifact)


def check(config: RecoverConfig) -> bool:
    """Whether the run was only to be planned. Raises ConfigError for invalid values and DataError for a damaged ledger; nothing is written."""
    if plan.check("recover", config, bucket_sizes(config.data.resolution, config.data.bucket_step, config.data.aspect)):
        return True
    model_folder.check_models(config.model.path, config.model.variant, base=True, start=config.start, teacher=config.teacher)
    trainable.select(flux1.skeleton(config.model.path), config.trainable, config.model.path)
    distributed.check_full(config.hardware)
    optim.check(config.optim, config.hardware.weights, shard=config.hardware.shard)
    distributed.check_dtype("save_dtype", config.save_dtype)
    if config.ledger:
        ledger.consumed(config.ledger)
    return False


def _models(config: RecoverConfig) -> dict[str, str]:
    """role -> path of the models that the result depends on."""
    models = {"base": config.model.path, "start": config.start, "teacher": config.teacher}
    return {role: path for role, path in models.items() if path}


def record_in_ledger(config: RecoverConfig, snapshots: RunSnapshots, artifact: Artifact) -> Artifact:
    """Records the finished run in the ledger as a consumer of its shards, and returns the artifact."""
    if config.ledger and snapshots.is_main_process and not config.check:
        epochs = artifact.step / artifact.metrics["data"]["steps_per_epoch"]
        ledger.record(config.ledger, artifact.id, snapshots.train.id, [shard.sha256 for shard in snapshots.train.shards], epochs)
    return artifact


def _ended(config: RecoverConfig, done: int, curve: list[dict[str, Any]]) -> bool:
    """Whether all steps are done, or what was just measured says that the others would gain too little."""
    return done >= config.steps or (curve[-1]["step"] == done and plateau.reached(curve, config.steps, config.stop))


def _results(config: RecoverConfig, done: int, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run's record says of its training; `stopped` is why it ended before its steps were done."""
    results = {"guidance": config.guidance, "curve": curve, "recovered": None if config.start else _recovered(curve)}
    if done < config.steps and (outlook := plateau.outlook(curve, config.steps)):
        results["stopped"] = {"of_steps": config.steps, "share": config.stop, **asdict(outlook)}
    return results


def _recovered(curve: list[dict[str, Any]]) -> float | None:
    """The share of the base's distance to the teacher that was closed; None without a teacher, or if the distance was zero."""
    if not curve[0].get("teacher_distance"):
        return None
    return 1 - curve[-1]["teacher_distance"] / curve[0]["teacher_distance"]


if __name__ == "__main__":
    frame.main("recover", RecoverConfig, run)
