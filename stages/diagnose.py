"""diagnose: how a base was distilled, and what its guidance input does, from held-out pictures alone and before anything is trained."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from data import sources
from data.sources import DataConfig
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.judging import diagnosis
from dev2pro.judging.diagnosis import Guidances, Predictions
from dev2pro.log import Log
from dev2pro.models import flow_matching, flux1, lora, model_folder
from dev2pro.models.encodings import TEXT_PARTS, PromptEncoder, concatenate
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from stages import frame


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
    teacher: str | None = None
    publish: str | None = field(default=None, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: DiagnoseConfig) -> Artifact | None:
    """Measures the base, and every LoRA on it; writes diagnosis.json and artifact.json into `config.out`, and prints what they say."""
    guidances = check(config)
    parents = {"base": config.model.path} | ({"teacher": config.teacher} if config.teacher else {})
    parents |= {f"lora {number}": path for number, path in enumerate(config.loras, 1)}
    batches = sources.squares(config.data.heldout, "data.heldout", config.data.resolution, config.data.reading, config.data.background)
    accelerator = distributed.accelerator(config.hardware)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"diagnose runs as one process and cannot use {accelerator.num_processes}. Start it without torchrun, with processes=1 in a flow."
        )
    finished = run_folder.acquire(config.out, "diagnose", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("diagnose", config)

    encoders = Encoders(config.model, config.hardware.encoders, accelerator.device, int8=config.hardware.int8_encoders)
    prompts = PromptEncoder(config.model, encoders, config.hardware.encodings_gb * 1e9)
    needed = -(-config.probe.samples // sources.SQUARES_BATCH)
    pictures = concatenate([feed.encode(batch, encoders, prompts) for batch in itertools.islice(batches, needed)])
    encoders.free("vae", *TEXT_PARTS)
    scheduler = flux1.scheduler_settings(config.model.path)
    probe = HeldoutProbe(pictures, config.probe, accelerator, scheduler=scheduler, seed=config.seed, batch=config.hardware.micro_batch)
    teacher = None
    if config.teacher:
        model = load(config, config.teacher, accelerator.device)
        teacher = list(zip(probe.predictions(model, 1.0), probe.predictions(model, 1.0, prompts.empty), strict=True))
        del model
    transformer = load(config, config.model.path, accelerator.device)
    with Log(config.out, "diagnose", 1 + len(config.loras), accelerator.is_main_process) as log:
        base = predictions(transformer, probe, guidances, prompts.empty)
        found = [{"name": "base", **measure(probe, guidances, base, teacher)}]
        log.step(1, loss=found[0]["loss"])
        for path in config.loras:
            lora.load_lora(transformer, store.resolve(path))
            with_lora = predictions(transformer, probe, guidances, prompts.empty)
            lora.unload_lora(transformer)
            found.append({"name": path, **measure(probe, guidances, with_lora), "response_kept": guidances.kept(base, with_lora)})
            log.step(len(found), loss=found[-1]["loss"])
    result: dict[str, Any] = {
        "model": config.model.path,
        "usual_guidance": guidances.usual,
        "line": config.line,
        "times": probe.times.tolist(),
        "found": found,
    }
    result["words"] = diagnosis.words(result)
    record.write_json(Path(config.out) / "diagnosis.json", result)
    print("\n".join(result["words"]), flush=True)
    return record.publish(accelerator, config.out, "diagnose", "diagnosis", config, parents, step=len(found), metrics={"words": result["words"]})


def check(config: DiagnoseConfig) -> Guidances:
    """The guidances to ask at. Raises ConfigError for invalid values, before anything is read."""
    low, high = config.line if len(config.line) == 2 else (0.0, 0.0)
    if not 1 < low < high:
        raise ConfigError(f"line={config.line} is no line. Give two guidances above 1 that the base was surely distilled at, such as [2,6].")
    model_folder.check_models(config.model.path, config.model.variant, base=True, teacher=config.teacher)
    sources.check(config.data)
    skeleton = flux1.skeleton(config.model.path)
    for path in config.loras:
        lora.merge(skeleton, store.resolve(path))
    return Guidances(config.model.usual_guidance, low, high)


def load(config: DiagnoseConfig, path: str, device: torch.device) -> FluxTransformer2DModel:
    """A transformer for predictions."""
    return flux1.load_transformer(path, config.hardware.inference, config.model.variant).to(device).eval().requires_grad_(False)


@torch.no_grad()
def predictions(model: FluxTransformer2DModel, probe: HeldoutProbe, guidances: Guidances, empty: tuple[Tensor, Tensor]) -> list[Predictions]:
    """What a model predicts in every pass, in host memory: five forward passes of each."""
    asked = [(1.0, None), (guidances.usual, None), (guidances.low, None), (guidances.high, None), (guidances.usual, empty)]
    passes = zip(*(probe.predictions(model, guidance, prompt) for guidance, prompt in asked), strict=True)
    return [Predictions(*(one.float().cpu() for one in a_pass)) for a_pass in passes]


Teacher = list[tuple[Tensor, Tensor]]  # of every pass, its velocities for the captions and for the empty one


def measure(probe: HeldoutProbe, guidances: Guidances, found: list[Predictions], teacher: Teacher | None = None) -> dict[str, Any]:
    """The summary over all passes, and `by_time` that of each time."""
    target = flow_matching.velocity(probe.x0, probe.noise).cpu()
    sums: dict[int, list[tuple[int, dict[str, float]]]] = {}
    for i, ((number, rows), predicted) in enumerate(zip(probe.passes, found, strict=True)):
        true = (teacher[i][0].float().cpu(), teacher[i][1].float().cpu()) if teacher else None
        sums.setdefault(number, []).append((rows.stop - rows.start, guidances.sums(predicted, target[rows], true)))
    whole = guidances.summary(diagnosis.mean([part for parts in sums.values() for part in parts]))
    return {**whole, "regime": guidances.regime(whole), "by_time": [guidances.summary(diagnosis.mean(parts)) for parts in sums.values()]}


if __name__ == "__main__":
    frame.main("diagnose", DiagnoseConfig, run)
