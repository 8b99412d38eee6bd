"""recover (dev2pro): fine-tunes the whole transformer of a guidance-distilled model at a fixed guidance, with plain flow matching.

At guidance 1.0 classifier-free guidance has no effect, so no teacher is needed: the result approximates the undistilled model
that the base was distilled from. It is for training LoRAs on, not for use (John Shi, "Why Flux LoRA So Hard to Train and How to
Overcome It?", 2024).
"""

from dataclasses import dataclass
from typing import Any

import torch

from data import order
from data.pictures import DataConfig
from dev2pro import artifact, distributed, encodings, flow, flux, optim, stage
from dev2pro.artifact import Artifact
from dev2pro.distributed import HardwareConfig
from dev2pro.flux import ModelConfig
from dev2pro.log import Log
from dev2pro.optim import OptimConfig
from dev2pro.probe import Probe, ProbeConfig
from dev2pro.training import Training


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
    teacher: str | None = None


def run(config: RecoverConfig) -> Artifact:
    """Recovers the base and writes `transformer/` in diffusers layout, metrics.jsonl and artifact.json into `config.out`."""
    flux.check_transformer(config.model.path)
    parents = {"base": config.model.path} | ({"teacher": config.teacher} if config.teacher else {})
    if config.teacher:
        flux.check_transformer(config.teacher)
    train, held_out = config.data.read()
    parents |= config.data.sources()
    optim.check(config.optim)
    distributed.check_dtype("save_dtype", config.save_dtype)
    place = distributed.accelerator(config.hardware)
    with place.main_process_first():
        finished = artifact.begin(config.out, "recover", config, parents)
    if finished:
        return finished

    dtype = distributed.DTYPES[config.hardware.dtype]
    train_data, held_out_data = encodings.encode_sets(config.model, [train, held_out], config.data.resolution, place.device, dtype)
    mu = flow.shift_mu(train_data.mean.shape[1], flux.scheduler_settings(config.model.path))
    transformer = flux.load_transformer(config.model.path, dtype, config.model.variant)
    training = Training(place, transformer, config.optim, config.hardware, steps=config.steps, batch=config.batch, ema=config.ema)
    probe = Probe(held_out_data, config.probe, mu=mu, seed=config.seed, batch=config.hardware.micro_batch)
    if config.teacher:
        probe.know_teacher(flux.load_transformer(config.teacher, dtype, config.model.variant).to(place.device))

    def draw(step: int, slots: range) -> encodings.Noised:
        rows = order.samples(len(train_data), config.seed, step, config.batch)[slots]
        return encodings.noised(train_data, rows, mu, config.caption_dropout, config.seed, step, slots)

    def loss_of(batch: encodings.Noised) -> torch.Tensor:
        predicted = flux.predict(training.model, batch.x_t, batch.t, train_data.texts.conditioning(batch.captions), config.guidance)
        return torch.nn.functional.mse_loss(predicted.float(), batch.velocity.float())

    def measured(done: int) -> dict[str, Any]:
        with training.averaged() as model:
            return {"step": done, **probe.measure(model, config.guidance, config.model.usual_guidance)}

    with Log(config.out, "recover (dev2pro)", config.steps, place.is_main_process) as log:
        curve = [measured(0)]
        for step in range(config.steps):
            loss, norm = training.step(step, lambda slots: draw(step, slots), loss_of)  # noqa: B023
            log.write(step + 1, loss=loss, gradient_norm=norm, lr=training.lr)
            if (step + 1) % config.probe.every == 0 or step + 1 == config.steps:
                curve.append(measured(step + 1))
            log.step(step + 1, loss=loss, held_out=curve[-1]["loss"])

    metrics = {**training.clock.metrics(), "guidance": config.guidance, "curve": curve, "recovered": _recovered(curve)}
    training.save(config.out, distributed.DTYPES[config.save_dtype])
    return artifact.publish(place, config.out, "recover", "transformer", config, parents, step=config.steps, metrics=metrics)


def _recovered(curve: list[dict[str, Any]]) -> float | None:
    """The share of the base's distance to the teacher that was closed; None where no teacher is known."""
    if "teacher_distance" not in curve[0]:
        return None
    return 1 - curve[-1]["teacher_distance"] / curve[0]["teacher_distance"]


if __name__ == "__main__":
    stage.main("recover", RecoverConfig, run)
