"""diagnose: how a base was distilled and what its guidance input does, from held-out pictures alone; and what LoRAs change on it."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor

from data import sources
from data.loading.stream import Batch
from data.sources import DataConfig
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DataError
from dev2pro.judging import diagnosis, lora_effect, lora_training
from dev2pro.judging.diagnosis import Guidances, Predictions, dot
from dev2pro.judging.lora_training import TrainedModel, Training
from dev2pro.log import Log
from dev2pro.models import flow_matching, flux1, lora, model_folder
from dev2pro.models.encodings import TEXT_PARTS, PromptEncoder, concatenate
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from stages import frame

Pair = tuple[Tensor, Tensor]  # of a pass, the velocities for the captions and for the empty one
Effects = dict[float, list[Tensor]]  # guidance -> what a LoRA changes on the base in every pass


@dataclass(slots=True, kw_only=True)
class DiagnoseConfig:
    """See conf/diagnose.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    data: DataConfig
    hardware: HardwareConfig
    probe: ProbeConfig
    line: list[float]
    loras: list[str]
    outside: list[str] = field(default_factory=list, metadata={"identity": "if set"})
    teacher: str | None = None
    publish: str | None = field(default=None, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: DiagnoseConfig) -> Artifact | None:
    """Measures the base, and every LoRA on it; writes diagnosis.json and artifact.json into `config.out`, and prints what they say."""
    guidances, trainings = check(config)
    parents = {"base": config.model.path} | ({"teacher": config.teacher} if config.teacher else {})
    parents |= {f"lora {number}": path for number, path in enumerate(config.loras, 1)}
    style, outside = (
        sources.squares(urls, what, config.data.resolution, config.data.reading, config.data.background) if urls else iter(())
        for what, urls in (("data.heldout", config.data.heldout), ("outside", config.outside))
    )
    accelerator = distributed.accelerator(config.hardware)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"diagnose runs as one process and cannot use {accelerator.num_processes}. Start it without torchrun, with processes=1 in a flow."
        )
    finished = run_folder.acquire(config.out, "diagnose", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("diagnose", config)

    pictures = encode(config, style, outside, accelerator)
    usable = [path for path, training in trainings.items() if not training.missing]
    with Log(config.out, "diagnose", 1 + len(config.loras) + len(usable), accelerator.is_main_process) as log:
        teacher = ask_teacher(config, pictures) if config.teacher else None
        found, effects = on_base(config, guidances, pictures, trainings, teacher, log)
        gaps = on_trained(config, pictures, effects, {path: trainings[path] for path in usable}, log)
    for one in found[1:]:
        one["transfer"] = gaps.get(one["name"]) or {"missing": trainings[one["name"]].missing}
    result: dict[str, Any] = {
        "model": config.model.path,
        "usual_guidance": guidances.usual,
        "line": config.line,
        "times": pictures.style.times.tolist(),
        "found": found,
    }
    result["words"] = diagnosis.words(result) + lora_effect.words(result)
    record.write_json(Path(config.out) / "diagnosis.json", result)
    print("\n".join(result["words"]), flush=True)
    return record.publish(accelerator, config.out, "diagnose", "diagnosis", config, parents, step=len(found), metrics={"words": result["words"]})


def check(config: DiagnoseConfig) -> tuple[Guidances, dict[str, Training]]:
    """The guidances to ask at, and how each LoRA was trained. Raises ConfigError for invalid values, before anything is read."""
    low, high = config.line if len(config.line) == 2 else (0.0, 0.0)
    if not 1 < low < high:
        raise ConfigError(f"line={config.line} is no line. Give two guidances above 1 that the base was surely distilled at, such as [2,6].")
    model_folder.check_models(config.model.path, config.model.variant, base=True, teacher=config.teacher)
    sources.check(config.data)
    skeleton = flux1.skeleton(config.model.path)
    for path in config.loras:
        lora.merge(skeleton, store.resolve(path))
    trainings = {path: lora_training.read(path, config.model) for path in config.loras}
    return Guidances(config.model.usual_guidance, low, high), trainings


@dataclass(frozen=True)
class Pictures:
    """What models are asked about: held-out pictures of the style, others outside of it, the states of the empty caption."""

    style: HeldoutProbe
    outside: HeldoutProbe | None
    empty: tuple[Tensor, Tensor]

    @property
    def device(self) -> torch.device:
        """Where they are, and models have to be."""
        return self.style.x0.device


def encode(config: DiagnoseConfig, style: Iterator[Batch], outside: Iterator[Batch], accelerator: Accelerator) -> Pictures:
    """The first `probe.samples` pictures of both, encoded; the encoders are gone. Raises DataError if none of the asked ones can be read."""
    encoders = Encoders(config.model, config.hardware.encoders, accelerator.device, int8=config.hardware.int8_encoders)
    prompts = PromptEncoder(config.model, encoders, config.hardware.encodings_gb * 1e9)
    scheduler, needed = flux1.scheduler_settings(config.model.path), -(-config.probe.samples // sources.SQUARES_BATCH)

    def probe(batches: Iterator[Batch], what: str) -> HeldoutProbe:
        encoded = [feed.encode(batch, encoders, prompts) for batch in itertools.islice(batches, needed)]
        if not encoded:
            raise DataError(f"No picture of {what} could be read. Look at the pictures there.")
        data, batch = concatenate(encoded), config.hardware.micro_batch
        return HeldoutProbe(data, config.probe, accelerator, scheduler=scheduler, seed=config.seed, batch=batch)

    found = Pictures(probe(style, "data.heldout"), probe(outside, "outside") if config.outside else None, prompts.empty)
    encoders.free("vae", *TEXT_PARTS)
    return found


def load(config: DiagnoseConfig, model: TrainedModel, device: torch.device) -> FluxTransformer2DModel:
    """A transformer for predictions."""
    transformer = model.apply(flux1.load_transformer(model.path, config.hardware.inference, config.model.variant))
    return transformer.to(device).eval().requires_grad_(False)


@torch.no_grad()
def velocities(model: FluxTransformer2DModel, probe: HeldoutProbe, guidance: float, prompt: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    """What a model predicts (B, S, C) in every pass, float32 in host memory."""
    return [one.float().cpu() for one in probe.predictions(model, guidance, prompt)]


def ask_teacher(config: DiagnoseConfig, pictures: Pictures) -> list[Pair]:
    """An undistilled model's predictions."""
    model = load(config, TrainedModel(str(config.teacher)), pictures.device)
    return list(zip(*(velocities(model, pictures.style, 1.0, prompt) for prompt in (None, pictures.empty)), strict=True))


def predictions(model: FluxTransformer2DModel, pictures: Pictures, guidances: Guidances) -> list[Predictions]:
    """What a model predicts of the style's pictures in every pass: five forward passes of each."""
    asked = [(1.0, None), (guidances.usual, None), (guidances.low, None), (guidances.high, None), (guidances.usual, pictures.empty)]
    return [Predictions(*one) for one in zip(*(velocities(model, pictures.style, *what) for what in asked), strict=True)]


def on_base(
    config: DiagnoseConfig, guidances: Guidances, pictures: Pictures, trainings: dict[str, Training], teacher: list[Pair] | None, log: Log
) -> tuple[list[dict[str, Any]], dict[str, Effects]]:
    """The summaries of the base and of every LoRA on it, and each LoRA's effect at the usual guidance and, if it is known then, at its training's."""
    model = TrainedModel(config.model.path)
    transformer = load(config, model, pictures.device)
    base, outside = predictions(transformer, pictures, guidances), on_outside(transformer, pictures, guidances.usual)
    found, effects = [{"name": "base", **measure(pictures.style, guidances, base, teacher)}], dict[str, Effects]()
    log.step(1, loss=found[0]["loss"])
    for path in config.loras:
        lora.load_lora(transformer, store.resolve(path))
        with_lora, outside_with_lora = predictions(transformer, pictures, guidances), on_outside(transformer, pictures, guidances.usual)
        lora.unload_lora(transformer)
        before, after = guidances.known(base), guidances.known(with_lora)
        wanted = {guidances.usual} | ({trainings[path].guidance} & before.keys() if trainings[path].model == model else set())
        effects[path] = {guidance: lora_effect.effect(before[guidance], after[guidance]) for guidance in wanted}
        own, _ = averaged(pictures.style, [{"square": dot(one)} for one in effects[path][guidances.usual]])
        one = {"name": path, **measure(pictures.style, guidances, with_lora), "response_kept": guidances.kept(base, with_lora)}
        one |= {"effect": math.sqrt(own["square"])}
        if pictures.outside:
            one["forgetting"] = forgetting(pictures.outside, guidances, outside, outside_with_lora, own["square"])
        found.append(one)
        log.step(len(found), loss=one["loss"])
    return found, effects


def on_outside(model: FluxTransformer2DModel, pictures: Pictures, usual: float) -> list[Pair]:
    """What a model predicts of the pictures outside the style, if there are any: two forward passes of each."""
    if not pictures.outside:
        return []
    return list(zip(*(velocities(model, pictures.outside, usual, prompt) for prompt in (None, pictures.empty)), strict=True))


def forgetting(probe: HeldoutProbe, guidances: Guidances, before: list[Pair], after: list[Pair], own: float) -> dict[str, float]:
    """What a LoRA does to pictures outside its style; `own`: the mean square of its effect on the style's."""
    target, sums = flow_matching.velocity(probe.x0, probe.noise).cpu(), []
    for (_, rows), without, with_lora in zip(probe.passes, before, after, strict=True):
        losses = [dot(guidances.unguided(*one) - target[rows]) for one in (without, with_lora)]
        sums.append({"effect": dot(with_lora[0] - without[0]), "before": losses[0], "after": losses[1]})
    mean, _ = averaged(probe, sums)
    return {
        "effect": math.sqrt(mean["effect"]), "leak": lora_effect.leak(own, mean["effect"]),
        "loss_unguided": mean["after"], "loss_rise": mean["after"] - mean["before"],
    }  # fmt: skip


def on_trained(
    config: DiagnoseConfig, pictures: Pictures, effects: dict[str, Effects], trainings: dict[str, Training], log: Log
) -> dict[str, dict[str, Any]]:
    """The transfer gap of every LoRA; each model that some were trained on is loaded once, and what is known from the base is not asked again."""
    base = TrainedModel(config.model.path)
    known = {path: effects[path][one.guidance] for path, one in trainings.items() if one.model == base and one.guidance in effects[path]}
    asked: dict[TrainedModel, dict[str, float]] = {}
    for path, one in trainings.items():
        if path not in known:
            asked.setdefault(one.model, {})[path] = one.guidance
    gaps = dict[str, dict[str, Any]]()
    for path, effect in itertools.chain(known.items(), *(ask_trained(config, pictures, *some) for some in asked.items())):
        whole, by_time = averaged(pictures.style, map(lora_effect.sums, effects[path][config.model.usual_guidance], effect))
        what = {"trained_on": str(trainings[path].model), "guidance": trainings[path].guidance}
        gaps[path] = {**what, **lora_effect.gap(whole), "by_time": [lora_effect.gap(one) for one in by_time]}
        log.step(1 + len(config.loras) + len(gaps))
    return gaps


def ask_trained(config: DiagnoseConfig, pictures: Pictures, model: TrainedModel, guidances: dict[str, float]) -> Iterator[tuple[str, list[Tensor]]]:
    """(LoRA, its effect in every pass) on the model that all of `guidances` were trained on, each at its own."""
    transformer, before = load(config, model, pictures.device), dict[float, list[Tensor]]()
    for path, guidance in guidances.items():
        if guidance not in before:
            before[guidance] = velocities(transformer, pictures.style, guidance)
        lora.load_lora(transformer, store.resolve(path))
        after = velocities(transformer, pictures.style, guidance)
        lora.unload_lora(transformer)
        yield path, lora_effect.effect(before[guidance], after)


def measure(probe: HeldoutProbe, guidances: Guidances, found: list[Predictions], teacher: list[Pair] | None = None) -> dict[str, Any]:
    """The summary over all passes, and `by_time` that of each time."""
    target = flow_matching.velocity(probe.x0, probe.noise).cpu()
    true: Sequence[Pair | None] = teacher or [None] * len(found)
    sums = [guidances.sums(one, target[rows], theirs) for (_, rows), one, theirs in zip(probe.passes, found, true, strict=True)]
    whole, by_time = averaged(probe, sums)
    summary = guidances.summary(whole)
    return {**summary, "regime": guidances.regime(summary), "by_time": [guidances.summary(one) for one in by_time]}


def averaged(probe: HeldoutProbe, sums: Iterable[dict[str, float]]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The mean of all passes' sums over their pictures, and that of each time."""
    by_time: dict[int, list[tuple[int, dict[str, float]]]] = {}
    for (number, rows), one in zip(probe.passes, sums, strict=True):
        by_time.setdefault(number, []).append((rows.stop - rows.start, one))
    return diagnosis.mean([part for parts in by_time.values() for part in parts]), [diagnosis.mean(parts) for parts in by_time.values()]


if __name__ == "__main__":
    frame.main("diagnose", DiagnoseConfig, run)
