"""evaluate: every LoRA on every inference base, same seeds and prompts, judged by CLIP and DINOv2, with paired intervals and a report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data import sources
from data.loading.stream import Batch
from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DataError, TryAgainError
from dev2pro.escape import printable
from dev2pro.judging import cell_store, cells, comparison, grids, metrics, report
from dev2pro.judging import prompts as prompt_file
from dev2pro.judging.cells import Inference
from dev2pro.judging.comparison import Cell
from dev2pro.judging.judge import ImageJudge, Judge
from dev2pro.judging.sampled_cells import PlannedCell, SampledCells
from dev2pro.judging.sampler import Sampler
from dev2pro.judging.style_judge import StyleJudge
from dev2pro.log import Log
from dev2pro.models import model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from dev2pro.planning import plan
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from stages import frame

MOST_TRAINING = 512  # training pictures of a style that memorisation is measured against
References = tuple[Tensor, Tensor | None]  # a judge's embeddings of a style's held-out (M, D) and training pictures (N, D)


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
    style_judge: str | None = field(default=None, metadata={"identity": "if set"})
    cells: str | None = field(default=None, metadata={"identity": False})
    publish: str | None = field(default=None, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: EvaluateConfig) -> Artifact | None:
    """Samples and judges every cell; writes metrics.json, pictures.csv, report.html, sheets/*.png and artifact.json into `config.out`."""
    config.sampling.check()
    cell_store.check_folder(config.cells)
    groups = prompt_file.read_prompts(config.prompts)
    if plan.check("evaluate", config, [(config.resolution,) * 2], sum(map(len, groups))):
        return None
    loras = cells.find_loras(config.loras, config.model.path)
    rivals = {"teacher": config.teacher, "recovered": config.recovered}
    inferences = cells.list_inferences(config.model.path, config.model.usual_guidance, config.sampling.cfg_scale, **rivals)
    model_folder.check_models(config.model.path, config.model.variant, base=True, **rivals)
    Judge.check(config.judge)
    if config.style_judge:
        StyleJudge.check(config.style_judge)
    references = read_references(config, loras)
    parents = {inference.name: inference.path for inference in inferences} | {"judge": config.judge, "prompts": config.prompts}
    parents |= {"style_judge": config.style_judge} if config.style_judge else {}
    parents |= {f"{style}/{lora.inference['arm']}": lora.uri for style, arms in cells.by_style(loras).items() for lora in arms}
    accelerator = distributed.accelerator(config.hardware)
    with accelerator.main_process_first():
        finished = run_folder.acquire(config.out, "evaluate", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("evaluate", config)

    prompts = [prompt for group in groups for prompt in group]
    sampler = Sampler.of(config, prompts, accelerator.device)
    planned = plan_cells(config, inferences, loras, sampler)
    sampled, judge = SampledCells(planned, sampler, accelerator), Judge(config.judge, accelerator.device)
    style_judge = StyleJudge(config.style_judge, accelerator.device) if config.style_judge else judge
    styles = {style: embed_references(config, arms[0], references[style], style_judge, accelerator) for style, arms in cells.by_style(loras).items()}
    judged = judge_cells(config, groups, planned, sampled, (judge, style_judge), styles)
    found = comparison.compare(judged, cells.kinds(loras, **rivals), config.bootstrap, config.seed)
    settings = {
        "model": config.model.path, "judge": config.judge, "prompts": prompts, "meanings": len(groups),
        "seeds": config.seeds, "steps": config.sampling.steps, "guidance": config.model.usual_guidance, "cfg_scale": config.sampling.cfg_scale,
        "images_per_cell": sampler.count, "bootstrap": config.bootstrap, "seed": config.seed,
    }  # fmt: skip
    if strengths := {f"{cell.style}/{cell.arm}": cell.strength for cell in planned if cell.strength != 1}:
        settings["strengths"] = strengths
    fresh = {style: metrics.memorisation_of_heldout(training, heldout) for style, (heldout, training) in styles.items() if training is not None}
    result = {"settings": settings, **found, "memorisation_of_heldout": fresh, "recovery": recovery(config)}
    if config.style_judge:
        settings["style_judge"], named = config.style_judge, {"prompt_fidelity": config.judge, "clip_score": config.judge}
        result["judged_by"] = named | {name: config.style_judge for name in metrics.LOOKS if name in found["cells"][0]}
    if accelerator.is_main_process:
        write_results(Path(config.out), result, judged, groups)
    summary = {"verdict": found["verdict"], "gains": found["gains"]}
    return record.publish(accelerator, config.out, "evaluate", "evaluation", config, parents, step=len(judged), metrics=summary)


def plan_cells(config: EvaluateConfig, inferences: list[Inference], loras: list[Artifact], sampler: Sampler) -> list[PlannedCell]:
    """Every cell and its files, one inference base after the other. Pictures are kept exactly if their distance to the ideal is measured."""
    root = Path(config.cells or Path(config.out) / record.CELLS)

    def planned(inference: Inference, style: str, arm: str, lora: Artifact | None) -> PlannedCell:
        path, strength = (lora.uri, cells.strength(lora)) if lora else (None, 1.0)
        return PlannedCell.of(style, arm, inference, path, strength, sampler=sampler, root=root, exact=config.teacher is not None, out=config.out)

    return [planned(inference, *cell) for inference in inferences for cell in cells.plan([inference], loras)]


def read_references(config: EvaluateConfig, loras: list[Artifact]) -> dict[str, list[Batch]]:
    """style -> its held-out pictures, the ones its first LoRA was measured on."""
    return {
        style: list(sources.squares(data["heldout"], f"the held-out pictures of {style}", config.resolution, *sources.recorded(data)))
        for style, data in ((style, cells.data(arms[0])) for style, arms in cells.by_style(loras).items())
    }


def embed_references(config: EvaluateConfig, lora: Artifact, heldout: list[Batch], judge: ImageJudge, accelerator: Accelerator) -> References:
    """A judge's embeddings of a style's pictures: held out, and those its first LoRA was trained on, up to MOST_TRAINING and evenly spread.

    Without the second, and a line says why, where they cannot be read any more.
    """
    pictures = torch.cat([feed.pixels(batch) for batch in heldout]) / 2 + 0.5
    embedded = judge.shared(accelerator, len(pictures), lambda rows: pictures[rows.start : rows.stop])
    data, ids = cells.data(lora), {parent["role"]: parent["id"] for parent in lora.parents}
    try:
        if not data.get("train") or "data.train" not in ids:
            raise DataError("its record names no training pictures.")
        training = sources.recorded_training(data, ids["data.train"])
    except (ConfigError, DataError, TryAgainError) as error:
        accelerator.print(printable(f"memorisation of {data['name']} is not measured, {lora.uri}'s training pictures cannot be read: {error}"))
        return embedded, None
    chosen, background = sources.spread(len(training), MOST_TRAINING), sources.recorded(data)[1]

    def read(rows: range) -> Tensor:
        batches = sources.squares_of(training, chosen[rows.start : rows.stop], config.resolution, background)
        return torch.cat([feed.pixels(batch) for batch in batches]) / 2 + 0.5

    return embedded, judge.shared(accelerator, len(chosen), read)


def judge_cells(
    config: EvaluateConfig, groups: list[list[str]], planned: list[PlannedCell], sampled: SampledCells, judges: tuple[Judge, ImageJudge],
    styles: dict[str, References],
) -> list[Cell]:  # fmt: skip
    """Samples and measures one cell after the other; the teacher's own LoRAs come first and are the ideal of their style.

    `judges`: of fidelity to the prompts, and of the looks.
    """
    judge, style_judge = judges
    accelerator, prompts = sampled.accelerator, judge.prompts(sampled.sampler.prompts)
    meaning = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    judged: list[Cell] = []
    ideal: dict[str, PlannedCell] = {}
    with Log(config.out, "evaluate", sampled.forecast.pictures, accelerator.is_main_process) as log:
        for cell in planned:
            sampled.sample(cell, log)
            if cell.arm == "ideal":
                ideal[cell.style] = cell
            distance = sampled.distance(cell, ideal[cell.style]) if cell.style in ideal else None
            features = sampled.embeddings(cell, judge)
            looks = sampled.embeddings(cell, style_judge) if style_judge is not judge else features
            values, kid = metrics.measure(features, looks, prompts, meaning, *styles[cell.style], distance)
            inference, thumbnails = cell.inference, grids.thumbnails(cell.files, meaning) if accelerator.is_main_process else []
            judged.append(Cell(cell.style, cell.arm, inference.name, inference.guidance, inference.cfg_scale, values, kid, thumbnails))
            log.step(sampled.forecast.done, fidelity=values["prompt_fidelity"].mean().item())
    return judged


def recovery(config: EvaluateConfig) -> dict[str, Any] | None:
    """The recovery curve, from the recovered model's own record."""
    artifact = record.read_if_artifact(store.resolve(config.recovered)) if config.recovered else None
    return {key: artifact.metrics[key] for key in ("guidance", "recovered", "curve")} if artifact and artifact.stage == "recover" else None


def write_results(out: Path, result: dict[str, Any], judged: list[Cell], groups: list[list[str]]) -> None:
    """metrics.json, pictures.csv, report.html, and a PNG sheet per style and seed."""
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    comparison.write_pictures(out / "pictures.csv", judged, [number for number, group in enumerate(groups) for _ in group])
    report_grids = grids.arrange(judged, result["styles"], [group[0] for group in groups])
    report.write(out / "report.html", result, report_grids)
    grids.write_sheets(out / "sheets", report_grids)


if __name__ == "__main__":
    frame.main("evaluate", EvaluateConfig, run)
