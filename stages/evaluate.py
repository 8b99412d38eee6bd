"""evaluate: every LoRA on every inference base, same seeds and prompts, judged by CLIP, with paired intervals and a report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import sources
from data.loading.stream import Batch
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.judging import cells, comparison, grids, metrics, report
from dev2pro.judging.cells import Inference
from dev2pro.judging.comparison import Cell
from dev2pro.judging.judge import Judge
from dev2pro.judging.sampler import Sampler
from dev2pro.log import Log
from dev2pro.models import flux1
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from stages import frame


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


def run(config: EvaluateConfig) -> Artifact:
    """Samples and judges every cell; writes metrics.json, report.html, sheets/*.png and artifact.json into `config.out`."""
    config.sampling.check()
    groups = cells.read_prompts(config.prompts)
    loras = cells.find_loras(config.loras, config.model.path)
    rivals = {"teacher": config.teacher, "recovered": config.recovered}
    inferences = cells.list_inferences(config.model.path, config.model.usual_guidance, config.sampling.cfg_scale, **rivals)
    for inference in inferences:
        flux1.check_transformer(inference.path)
    references = read_references(config, loras)
    parents = {inference.name: inference.path for inference in inferences} | {"judge": config.judge, "prompts": config.prompts}
    parents |= {f"{style}/{lora.inference['arm']}": lora.uri for style, arms in cells.by_style(loras).items() for lora in arms}
    accelerator = distributed.accelerator(config.hardware)
    with accelerator.main_process_first():
        finished = run_folder.acquire(config.out, "evaluate", config, parents)
    if finished:
        return finished

    prompts = [prompt for group in groups for prompt in group]
    sampler = Sampler(
        config.model, config.sampling, prompts, seeds=config.seeds, seed=config.seed, resolution=config.resolution,
        dtype=distributed.DTYPES[config.hardware.dtype], text_cache_bytes=config.hardware.encodings_gb * 1e9, accelerator=accelerator,
    )  # fmt: skip
    judged = judge_cells(config, groups, inferences, loras, references, sampler)
    found = comparison.compare(judged, cells.kinds(loras, **rivals), config.bootstrap, config.seed)
    settings = {
        "model": config.model.path, "judge": config.judge, "prompts": prompts, "meanings": len(groups),
        "seeds": config.seeds, "steps": config.sampling.steps, "guidance": config.model.usual_guidance, "cfg_scale": config.sampling.cfg_scale,
        "images_per_cell": len(sampler.rows), "bootstrap": config.bootstrap, "seed": config.seed,
    }  # fmt: skip
    result = {"settings": settings, **found, "recovery": recovery(config)}
    if accelerator.is_main_process:
        write_results(Path(config.out), result, judged, [group[0] for group in groups])
    summary = {"verdict": found["verdict"], "gains": found["gains"]}
    return record.publish(accelerator, config.out, "evaluate", "evaluation", config, parents, step=len(judged), metrics=summary)


def read_references(config: EvaluateConfig, loras: list[Artifact]) -> dict[str, list[Batch]]:
    """style -> its held-out pictures, the ones its first LoRA was measured on."""
    return {
        style: list(sources.squares(arms[0].config["data"]["heldout"], f"the held-out pictures of {style}", config.resolution))
        for style, arms in cells.by_style(loras).items()
    }


def judge_cells(
    config: EvaluateConfig,
    groups: list[list[str]],
    inferences: list[Inference],
    loras: list[Artifact],
    references: dict[str, list[Batch]],
    sampler: Sampler,
) -> list[Cell]:
    """Samples and measures one cell after the other; the teacher's own LoRAs come first and are the ideal of their style."""
    accelerator, judge = sampler.accelerator, Judge(config.judge, sampler.accelerator.device)
    meaning = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    prompts = judge.prompts(sampler.prompts)
    styles = {style: judge.images(torch.cat([feed.pixels(batch) for batch in found]) / 2 + 0.5) for style, found in references.items()}
    judged: list[Cell] = []
    ideal: dict[str, Tensor] = {}
    with Log(config.out, "evaluate", sum(1 for _ in cells.plan(inferences, loras)), accelerator.is_main_process) as log:
        for inference in inferences:
            transformer = sampler.load(inference)  # one in memory at a time
            for style, arm, path in cells.plan([inference], loras):
                images = sampler.sample_cell(transformer, inference, path)
                if arm == "ideal":
                    ideal[style] = images
                features = judge.images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
                values, kid = metrics.measure(features, images, prompts, meaning, styles[style], ideal.get(style))
                thumbnails = grids.thumbnails(images, meaning)
                judged.append(Cell(style, arm, inference.name, inference.guidance, inference.cfg_scale, values, kid, thumbnails))
                log.step(len(judged), fidelity=values["prompt_fidelity"].mean().item())
            del transformer
    return judged


def recovery(config: EvaluateConfig) -> dict[str, Any] | None:
    """The recovery curve, from the recovered model's own record."""
    artifact = record.read_if_artifact(store.resolve(config.recovered)) if config.recovered else None
    return {key: artifact.metrics[key] for key in ("guidance", "recovered", "curve")} if artifact and artifact.stage == "recover" else None


def write_results(out: Path, result: dict[str, Any], judged: list[Cell], prompts: list[str]) -> None:
    """metrics.json, report.html, and a PNG sheet per style and seed."""
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    report_grids = grids.arrange(judged, result["styles"], prompts)
    report.write(out / "report.html", result, report_grids)
    grids.write_sheets(out / "sheets", report_grids)


if __name__ == "__main__":
    frame.main("evaluate", EvaluateConfig, run)
