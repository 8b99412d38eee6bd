"""evaluate: every LoRA on every inference base, same seeds and prompts, judged by CLIP, with paired intervals and a report."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from data import sources
from dev2pro import contact_sheet
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.judging import comparison, metrics, report
from dev2pro.judging.comparison import Cell
from dev2pro.judging.judge import Judge
from dev2pro.log import Log
from dev2pro.models import encodings, flow_matching, flux1, lora, sampling
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from stages import frame

SHOWN_SEEDS = 2  # picture grids per style in the report


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """See conf/evaluate.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    hardware: HardwareConfig
    sampling: SamplingConfig
    judge: str
    loras: list[str]
    prompts: str
    seeds: int
    resolution: int
    bootstrap: int
    recovered: str | None = None
    teacher: str | None = None
    publish: str | None = field(default=None, metadata={"identity": False})


@dataclass(frozen=True)
class Inference:
    """A model to put LoRAs on, and how it is sampled."""

    name: str
    path: str
    guidance: float
    cfg_scale: float


def run(config: EvaluateConfig) -> Artifact:
    """Samples and judges every cell; writes metrics.json, report.html, sheets/*.png and artifact.json into `config.out`."""
    config.sampling.check()
    groups = read_prompts(config.prompts)
    loras = find_loras(config)
    inferences = list_inferences(config)
    for inference in inferences:
        flux1.check_transformer(inference.path)
    references = {
        style: list(sources.squares(arms[0].config["data"]["heldout"], f"the held-out pictures of {style}", config.resolution))
        for style, arms in by_style(loras).items()
    }
    parents = {p.name: p.path for p in inferences} | {"judge": config.judge, "prompts": config.prompts}
    parents |= {f"{style}/{one.inference['arm']}": one.uri for style, arms in by_style(loras).items() for one in arms}
    accelerator = distributed.accelerator(config.hardware)
    with accelerator.main_process_first():
        finished = run_folder.acquire(config.out, "evaluate", config, parents)
    if finished:
        return finished

    sampler = Sampler(config, groups, accelerator)
    judged = {style: sampler.judge.images(torch.cat([feed.pixels(some) for some in found]) / 2 + 0.5) for style, found in references.items()}
    cells: list[Cell] = []
    with Log(config.out, "evaluate", sum(1 for _ in plan(inferences, loras)), accelerator.is_main_process) as log:
        ideal: dict[str, Tensor] = {}
        for inference, transformer in load_transformers(inferences, config, accelerator):
            for style, arm, path in plan([inference], loras):
                images = sampler.sample_cell(transformer, inference, path)
                if arm == "ideal":
                    ideal[style] = images
                values, kid = measure(sampler, images, judged[style], ideal.get(style))
                cells.append(
                    Cell(style, arm, inference.name, inference.guidance, inference.cfg_scale, values, kid, thumbnails(images, sampler.meaning))
                )
                log.step(len(cells), fidelity=values["prompt_fidelity"].mean().item())

    found = comparison.compare(cells, kinds(config, loras), config.bootstrap, config.seed)
    settings = {
        "model": config.model.path, "judge": config.judge, "prompts": [p for group in groups for p in group], "meanings": len(groups),
        "seeds": config.seeds, "steps": config.sampling.steps, "guidance": config.model.usual_guidance, "cfg_scale": config.sampling.cfg_scale,
        "images_per_cell": len(sampler.rows), "bootstrap": config.bootstrap, "seed": config.seed,
    }  # fmt: skip
    result = {"settings": settings, **found, "recovery": recovery(config)}
    if accelerator.is_main_process:
        (Path(config.out) / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
        write_report(Path(config.out), result, cells, [group[0] for group in groups])
    summary = {"verdict": found["verdict"], "gains": found["gains"]}
    return record.publish(accelerator, config.out, "evaluate", "evaluation", config, parents, step=len(cells), metrics=summary)


# ---- what to compare ---------------------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[list[str]]:
    """Prompts grouped by meaning, from a JSON list (of prompts, or of lists that say the same in other words) or a text file, one a line."""
    try:
        text = Path(path).read_text()
        prompts = json.loads(text) if path.endswith(".json") else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"prompts={path} cannot be read ({error}). Give a JSON list of prompts, or a text file with one a line.") from error
    groups = [[p] if isinstance(p, str) else p for p in prompts]
    every = [p for group in groups if isinstance(group, list) for p in group]
    if len(groups) < 2 or not all(groups) or not all(isinstance(p, str) and p.strip() for p in every) or len(set(every)) < len(every):
        raise ConfigError(
            f"prompts={path} must hold at least two prompts, all different and none empty: R-precision asks which of them a picture shows."
        )
    return groups


def find_loras(config: EvaluateConfig) -> list[Artifact]:
    """The finished LoRA artifacts of the globs. Raises ConfigError for none, for strangers, and for LoRAs of another base."""
    folders = [f for one in config.loras for f in ([store.resolve(one)] if "://" in one else sorted(glob.glob(one)))]
    if not folders:
        raise ConfigError(f"loras={config.loras} matches no folder. Give the output folders of stages.lora, such as loras=[runs/demo/lora/*/*].")
    found = [record.read(f) for f in folders]
    base = record.fingerprint(config.model.path)
    for one in found:
        if one.kind != "lora":
            raise ConfigError(f"{one.uri} is a {one.kind}, not a LoRA. Leave it out of loras=.")
        if one.inference["apply_to"]["id"] != base:
            raise ConfigError(
                f"The LoRA {one.uri} is to be applied to {one.inference['apply_to']['path']}, not to {config.model.path}. "
                "Change model, or leave the LoRA out."
            )
    for style, arms in by_style(found).items():
        names = [one.inference["arm"] for one in arms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"loras={config.loras} holds arm {min(twice)} of style {style} more than once. Leave one out, or train it under another arm= name."
            )
    return found


def by_style(loras: list[Artifact]) -> dict[str, list[Artifact]]:
    """style -> LoRAs, in the order they were given."""
    styles: dict[str, list[Artifact]] = {}
    for one in loras:
        styles.setdefault(one.config["data"]["name"], []).append(one)
    return styles


def list_inferences(config: EvaluateConfig) -> list[Inference]:
    """The models to put LoRAs on; the teacher comes first, because its pictures are the ideal the others are held against."""
    true_cfg = {"guidance": 1.0, "cfg_scale": config.sampling.cfg_scale}
    return [
        *([Inference("teacher", config.teacher, **true_cfg)] if config.teacher else []),
        Inference("base", config.model.path, config.model.usual_guidance, 1.0),
        *([Inference("recovered", config.recovered, **true_cfg)] if config.recovered else []),
    ]


def plan(inferences: list[Inference], loras: list[Artifact]) -> Iterator[tuple[str, str, str | None]]:
    """(style, arm, LoRA) of every cell; on the teacher only its own LoRA, the ideal."""
    for inference in inferences:
        for style, arms in by_style(loras).items():
            if inference.name == "teacher":
                yield from ((style, "ideal", a.uri) for a in arms if a.inference["trained_on"]["id"] == record.fingerprint(inference.path))
            else:
                yield style, "none", None
                yield from ((style, a.inference["arm"], a.uri) for a in arms)


def kinds(config: EvaluateConfig, loras: list[Artifact]) -> dict[str, str]:
    """arm -> what it was trained on: recovered, teacher or base. A recovered model of others, which has no record, is known by `recovered=`."""
    teacher, recovered = (record.fingerprint(path) if path else None for path in (config.teacher, config.recovered))
    found = {}
    for one in loras:
        base = one.inference["trained_on"]
        made = record.read_if_artifact(store.resolve(base["path"]))
        by_us = made is not None and made.stage == "recover"
        found[one.inference["arm"]] = "teacher" if base["id"] == teacher else "recovered" if by_us or base["id"] == recovered else "base"
    return found


def recovery(config: EvaluateConfig) -> dict[str, Any] | None:
    """The recovery curve, from the recovered model's own record."""
    made = record.read_if_artifact(store.resolve(config.recovered)) if config.recovered else None
    return {key: made.metrics[key] for key in ("guidance", "recovered", "curve")} if made and made.stage == "recover" else None


# ---- sampling and judging ------------------------------------------------------------------------------------------------------


class Sampler:
    """Everything the cells share: prompts, noise, VAE and judge. A cell's pictures are (P, R, 3, H, W) in [0, 1]."""

    def __init__(self, config: EvaluateConfig, groups: list[list[str]], accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.no_lora_images: dict[str, Tensor] = {}
        prompts = [prompt for group in groups for prompt in group]
        self.meaning = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        self.dtype = distributed.DTYPES[config.hardware.dtype]
        self.encoders = flux1.Encoders(config.model, self.dtype, self.accelerator.device)
        self.grid, shape = self.encoders.grid((config.resolution,) * 2), self.encoders.token_shape((config.resolution,) * 2)
        self.prompts, self.texts = prompts, encodings.PromptEncoder(config.model, self.encoders, config.hardware.encodings_gb * 1e9)
        self.judge = Judge(config.judge, self.accelerator.device)
        self.prompt_embeddings = self.judge.prompts(prompts)
        self.mu = flow_matching.shift_mu(shape[0], flux1.scheduler_settings(config.model.path))
        pairs = [(p, r) for p in range(len(prompts)) for r in range(config.seeds)]
        self.rows = torch.tensor([p for p, _ in pairs])
        self.noise = torch.stack([sampling.initial_noise(config.seed, r, p, shape) for p, r in pairs])

    def sample_cell(self, transformer: FluxTransformer2DModel, inference: Inference, path: str | None) -> Tensor:
        """The pictures of one cell, on the CPU of every rank; the ranks share the work. Without a LoRA they are the same for every style."""
        if path is None and inference.name in self.no_lora_images:
            return self.no_lora_images[inference.name]
        if path:
            lora.load_lora(transformer, path)
        batches = list(enumerate(torch.arange(len(self.rows)).split(self.config.sampling.batch)))
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        some = gather_object([(number, self._batch(transformer, inference, rows)) for number, rows in mine])
        if path:
            lora.unload_lora(transformer)
        images = torch.cat([drawn for _, drawn in sorted(some, key=lambda pair: pair[0])]).unflatten(0, (-1, self.config.seeds))
        if path is None:
            self.no_lora_images[inference.name] = images
        return images

    def _batch(self, transformer: FluxTransformer2DModel, inference: Inference, rows: Tensor) -> Tensor:
        conditioning = flux1.build_conditioning(*self.texts.encode([self.prompts[i] for i in self.rows[rows]]), self.grid)
        nothing = flux1.build_conditioning(*self.texts.encode([""] * len(rows)), self.grid)
        noise = self.noise[rows].to(self.accelerator.device)
        latents = sampling.sample(
            transformer,
            noise,
            conditioning,
            nothing,
            guidance=inference.guidance,
            cfg_scale=inference.cfg_scale,
            steps=self.config.sampling.steps,
            mu=self.mu,
        )
        return self.encoders.decode(latents, self.config.resolution, self.config.resolution).float().cpu()


def load_transformers(
    inferences: list[Inference], config: EvaluateConfig, accelerator: Accelerator
) -> Iterator[tuple[Inference, FluxTransformer2DModel]]:
    """Each inference base with its transformer, one in memory at a time."""
    for one in inferences:
        yield one, flux1.load_transformer(one.path, distributed.DTYPES[config.hardware.dtype], config.model.variant).to(accelerator.device).eval()


def measure(sampler: Sampler, images: Tensor, style: Tensor, ideal: Tensor | None) -> tuple[dict[str, Tensor], float]:
    """Every metric picture by picture, name -> (P, R), and the KID of them all."""
    judged = sampler.judge.images(images.flatten(0, 1))
    by_prompt = judged.unflatten(0, images.shape[:2])
    values = {
        "prompt_fidelity": metrics.r_precision(by_prompt, sampler.prompt_embeddings, sampler.meaning),
        "clip_score": metrics.clip_score(by_prompt, sampler.prompt_embeddings),
        "style_similarity": metrics.style_similarity(by_prompt, style),
        "diversity": metrics.diversity(by_prompt),
    }
    if ideal is not None:
        values["distance_to_ideal"] = metrics.distance(images, ideal)
    return values, metrics.kid(judged, style)


# ---- pictures for people -------------------------------------------------------------------------------------------------------


def thumbnails(images: Tensor, meaning: Tensor) -> list[list[Image.Image]]:
    """The pictures of the first seeds and of the first prompt of each meaning, as PIL images: [seed][meaning]."""
    first = [int((meaning == number).nonzero()[0]) for number in meaning.unique()]
    ready = (images[first, :SHOWN_SEEDS] * 255).round().byte().permute(1, 0, 3, 4, 2).numpy()
    return [[Image.fromarray(picture) for picture in row] for row in ready]


def write_report(out: Path, result: dict[str, Any], cells: list[Cell], prompts: list[str]) -> None:
    """report.html, and a PNG sheet per style and seed."""
    grids = [
        report.Grid(style, seed, prompts, [(f"{c.arm} on {c.inference}", c.images[seed]) for c in cells if c.style == style])
        for style in result["styles"]
        for seed in range(len(cells[0].images))
    ]
    report.write(out / "report.html", result, grids)
    (out / "sheets").mkdir(exist_ok=True)
    for number, grid in enumerate(grids):
        contact_sheet.contact_sheet(f"{grid.style}, seed {grid.seed}", grid.prompts, grid.rows, 64).save(out / "sheets" / f"{number:02d}.png")


if __name__ == "__main__":
    frame.main("evaluate", EvaluateConfig, run)
