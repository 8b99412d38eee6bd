"""tune: which step of a LoRA works best on the base it is applied to, at which strength and guidance; publishes that LoRA, which says so."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from data import sources
from dev2pro.artifacts import record, run_folder, verify
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, DivergedError
from dev2pro.judging import cell_store, cells, grids, metrics, selection
from dev2pro.judging import prompts as prompt_file
from dev2pro.judging.bootstrap import LEVEL, Bootstrap
from dev2pro.judging.cells import Inference
from dev2pro.judging.judge import Judge
from dev2pro.judging.sampled_cells import PlannedCell, SampledCells
from dev2pro.judging.sampler import Sampler
from dev2pro.judging.selection import METRICS, Choice, Point, Reference
from dev2pro.judging.style_judge import StyleJudge
from dev2pro.log import Progress
from dev2pro.models import lora, model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from dev2pro.planning import plan
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from stages import frame

KEPT = re.compile(rf"({record.STEPS}/([0-9]{{1,9}}))/{re.escape(lora.WEIGHTS)}")  # a LoRA of a step, as records name it


@dataclass(slots=True, kw_only=True)
class TuneConfig:
    """See conf/tune.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    hardware: HardwareConfig
    sampling: SamplingConfig
    judge: str
    lora: str
    prompts: str
    seeds: int
    resolution: int
    bootstrap: int
    strengths: list[float]
    guidances: list[float] | None
    collapse: float
    style_judge: str | None = None
    cells: str | None = field(default=None, metadata={"identity": False})
    publish: str | None = field(default=None, metadata={"identity": False})
    plan: bool = field(default=False, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: TuneConfig) -> Artifact | None:
    """Chooses among the steps, then among strengths and guidances; writes the LoRA, tune.json, points.csv, sheets/*.png, artifact.json into `out`."""
    groups = check(config)
    if groups is None:
        return None
    source = cells.find_lora(config.lora, config.model.path)
    folders = steps(source)
    default = Point(source.step, 1.0, config.model.usual_guidance)
    by_step, by_setting = [Point(step, 1.0, default.guidance) for step in folders], settings(config, default)
    check_bootstrap(config, max(len(by_step), len(by_setting)))
    heldout = read_heldout(config, source)
    parents = find_parents(config, source)
    accelerator = distributed.accelerator(config.hardware)
    with accelerator.main_process_first():
        finished = run_folder.acquire(config.out, "tune", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("tune", config)
    verify.check(source)
    if len(folders) == 1:
        accelerator.print(
            f"{source.uri} keeps no LoRAs of steps (checkpoint.loras of stages.lora): only strength and guidance are chosen", flush=True
        )

    gauge = Gauge(config, groups, folders, heldout, accelerator)
    bootstrap = Bootstrap((len(gauge.meaning), config.seeds), config.bootstrap, config.seed)
    gauge.measure("tune steps", [None, *by_step])
    reference = gauge.reference()
    of_steps = selection.choose({point: gauge.values[point] for point in by_step}, default, reference, bootstrap, config.collapse)
    step = (of_steps.point or by_step[-1]).step  # where all have collapsed at strength 1, less may be well
    at_step = [Point(step, *setting) for setting in by_setting]
    gauge.measure("tune strength and guidance", at_step)
    points = {point: gauge.values[point] for point in at_step}
    of_settings = selection.choose(points, Point(step, 1.0, default.guidance), reference, bootstrap, config.collapse)
    result = describe(config, reference, {"steps": of_steps, "settings": of_settings})
    if accelerator.is_main_process:
        write_results(Path(config.out), result, gauge, by_step, at_step)
        print("\n".join(result["words"]), flush=True)
    if not (chosen := of_settings.point):
        raise DivergedError(
            f"Every strength and guidance of {config.lora} has collapsed: {config.out}/points.csv has the numbers. Train it for fewer steps or with "
            f"a lower optim.lr, or add smaller strengths=; collapse={config.collapse} says what counts as collapsed."
        )
    contract = use(source, chosen)
    if accelerator.is_main_process:
        header = {key: value for key, value in contract.items() if key != "data"} | {"config": source.config}
        lora.write(lora.read(folders[chosen.step])[0], config.out, header)
    summary = {"words": result["words"], "chosen": asdict(chosen), "points": len(gauge.values) - 1}
    return record.publish(accelerator, config.out, "tune", "lora", config, parents, step=chosen.step, metrics=summary, inference=contract)


def check(config: TuneConfig) -> list[list[str]] | None:
    """The prompts, grouped by meaning; None if the run was only to be planned. Raises ConfigError for invalid values, before anything is read."""
    cell_store.check_folder(config.cells)
    config.sampling.check()
    for key, values in (("strengths", config.strengths), ("guidances", config.guidances)):
        if values is not None and not values:
            raise ConfigError(f"{key}=[] leaves nothing to try. Give some, such as {key}=[{'0.8,1.2' if key == 'strengths' else '2.5,4.5'}].")
    if config.model.usual_guidance <= 0:
        raise ConfigError(f"model.usual_guidance={config.model.usual_guidance} is no guidance of a distilled base. Give that people use it at.")
    if config.seeds < 2:
        raise ConfigError(f"seeds={config.seeds} cannot show a collapse, which makes the pictures of a prompt alike. Give 2 or more.")
    groups = prompt_file.read_prompts(config.prompts)
    if plan.check("tune", config, [(config.resolution,) * 2], sum(map(len, groups))):
        return None
    model_folder.check_models(config.model.path, config.model.variant, base=True)
    Judge.check(config.judge)
    if config.style_judge:
        StyleJudge.check(config.style_judge)
    return groups


def check_bootstrap(config: TuneConfig, points: int) -> None:
    """Raises ConfigError where so few resamplings could never show one of so many points to be better: the smallest p-value is 1 by their number."""
    if config.bootstrap < (least := math.ceil(points / (1 - LEVEL)) + 1):
        raise ConfigError(f"bootstrap={config.bootstrap} cannot show which of {points} points is better. Give {least} or more; 2000 is usual.")


def steps(source: Artifact) -> dict[int, str]:
    """step -> folder of every LoRA that a run kept, in ascending order; the last is its result."""
    kept = {int(name[2]): f"{source.uri}/{name[1]}" for entry in source.files if (name := KEPT.fullmatch(entry["path"]))}
    earlier = {step: folder for step, folder in sorted(kept.items()) if 0 < step < source.step}
    return earlier | {source.step: source.uri}


def settings(config: TuneConfig, default: Point) -> list[tuple[float, float]]:
    """(strength, guidance) of the grid; the default's are among them."""
    usual = default.guidance
    guidances = config.guidances or [guidance for guidance in (usual - 1, usual + 1) if guidance > 0]
    return [(strength, guidance) for strength in sorted({*config.strengths, 1.0}) for guidance in sorted({*guidances, usual})]


def find_parents(config: TuneConfig, source: Artifact) -> dict[str, str | tuple[str, str]]:
    """What the result is made from; what the LoRA was trained with and on stays on record, as evaluate asks for it."""
    parents: dict[str, str | tuple[str, str]] = {"lora": config.lora, "base": config.model.path, "judge": config.judge, "prompts": config.prompts}
    if any(KEPT.fullmatch(entry["path"]) for entry in source.files):
        parents["steps"] = f"{source.uri}/{record.STEPS}"  # the LoRA's id does not cover them
    parents |= {"style_judge": config.style_judge} if config.style_judge else {}
    return parents | {parent["role"]: (parent["uri"], parent["id"]) for parent in source.parents if parent["role"] in cells.INHERITED}


def read_heldout(config: TuneConfig, source: Artifact) -> Tensor:
    """The held-out pictures (N, 3, H, W) of the LoRA's style, in [0, 1]."""
    data = source.config["data"]
    batches = sources.squares(data["heldout"], f"the held-out pictures of {data['name']}", config.resolution, *sources.recorded(data))
    pictures = torch.cat([feed.pixels(batch) for batch in batches]) / 2 + 0.5
    if len(pictures) < 2:
        raise ConfigError(f"The style of lora={config.lora} has one held-out picture, and is measured on two or more. Train it with more of them.")
    return pictures


class Gauge:
    """Samples and judges points, each once; None is the base without the LoRA. Call `measure` on every rank."""

    def __init__(self, config: TuneConfig, groups: list[list[str]], folders: dict[int, str], heldout: Tensor, accelerator: Accelerator) -> None:
        prompts = [prompt for group in groups for prompt in group]
        self.config, self.folders, self.accelerator, self.titles = config, folders, accelerator, [group[0] for group in groups]
        self.sampler, self.judge = Sampler.of(config, prompts, accelerator.device), Judge(config.judge, accelerator.device)
        self.style_judge = StyleJudge(config.style_judge, accelerator.device) if config.style_judge else self.judge
        self.meaning = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        self.prompts = self.judge.prompts(prompts)
        self.style = self.style_judge.shared(accelerator, len(heldout), lambda rows: heldout[rows.start : rows.stop])
        self.values: dict[Point | None, dict[str, Tensor]] = {}
        self.pictures: dict[Point | None, list[Image.Image]] = {}  # of the first seed, on the main process

    def measure(self, title: str, points: Sequence[Point | None]) -> None:
        """Fills `values` and `pictures` for points that are not there yet."""
        planned = {point: self._cell(point) for point in points if point not in self.values}
        if not planned:
            return
        sampled = SampledCells(list(planned.values()), self.sampler, self.accelerator)
        with Progress(title, sampled.forecast.pictures, self.accelerator.is_main_process) as log:
            for point, cell in planned.items():
                sampled.sample(cell, log)
                features = sampled.embeddings(cell, self.judge)
                looks = sampled.embeddings(cell, self.style_judge) if self.style_judge is not self.judge else features
                self.values[point], _ = metrics.measure(features, looks, self.prompts, self.meaning, self.style, None, None)
                if self.accelerator.is_main_process:
                    self.pictures[point] = grids.thumbnails(cell.files, self.meaning)[0]
                log.step(sampled.forecast.done, fidelity=self.values[point]["prompt_fidelity"].mean().item())

    def reference(self) -> Reference:
        """Of the base without the LoRA, once that is measured, and of the held-out pictures."""
        similarity, diversity = (self.values[None][name].mean().item() for name in ("style_similarity", "diversity"))
        return Reference(similarity, diversity, 1 - metrics.diversity(self.style[None]).mean().item())

    def _cell(self, point: Point | None) -> PlannedCell:
        config, guidance = self.config, point.guidance if point else self.config.model.usual_guidance
        inference = Inference("base", config.model.path, guidance, config.sampling.cfg_scale)
        path, strength = (self.folders[point.step], point.strength) if point else (None, 1.0)
        root = Path(config.cells or Path(config.out) / record.CELLS)
        return PlannedCell.of("", str(point), inference, path, strength, sampler=self.sampler, root=root, exact=False, out=config.out)


def use(source: Artifact, chosen: Point) -> dict[str, Any]:
    """The contract of the result: the LoRA's own, and how it is to be used."""
    arm = f"{source.inference['arm']}{cells.TUNED}"
    at = {"suggested_strength": chosen.strength, "suggested_guidance": chosen.guidance, "step": chosen.step}
    return {**source.inference, "arm": arm, **at, "data": source.config["data"]}


def describe(config: TuneConfig, reference: Reference, choices: dict[str, Choice]) -> dict[str, Any]:
    """The contents of tune.json."""
    words = [] if reference.sees_style else ["The judge does not see this style: the base's pictures are as near to the held-out ones as these are "
                                             "to each other. The score is prompt fidelity alone."]  # fmt: skip
    searches = {name: choice.rows for name, choice in choices.items()}
    titles = {"steps": "Steps", "settings": "Strength and guidance"}
    words += [f"{titles[name]}: {' '.join(choice.words)}" for name, choice in choices.items() if name == "settings" or len(choice.rows) > 1]
    chosen = choices["settings"].point
    return {
        "lora": config.lora, "model": config.model.path, "reference": asdict(reference), "collapse": config.collapse, **searches,
        "chosen": asdict(chosen) if chosen else None, "words": words,
    }  # fmt: skip


def write_results(out: Path, result: dict[str, Any], gauge: Gauge, by_step: list[Point], at_step: list[Point]) -> None:
    """tune.json, points.csv and sheets/."""
    record.write_json(out / "tune.json", result)
    with (out / "points.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        numbers = [f"{name}{end}" for name in ("score", "gain", *METRICS) for end in ("", "_low", "_high")]
        rows.writerow(["search", "step", "strength", "guidance", *numbers, "p", "collapsed", "chosen"])
        for search in ("steps", "settings"):
            for row in result[search]:
                intervals = [row[name].get(end, "") for name in ("score", "gain", *METRICS) for end in ("mean", "low", "high")]
                shown = [f"{value:.6g}" if value != "" else "" for value in intervals]
                place = [row[name] for name in ("step", "strength", "guidance")]
                rows.writerow([search, *place, *shown, row["gain"].get("p", ""), row["collapsed"], int(row["chosen"])])
    chosen = Point(**result["chosen"]) if result["chosen"] else None
    of_steps, of_settings = ({point: gauge.pictures[point] for point in points} for points in (by_step, at_step))
    grids.write_tune_sheets(out / "sheets", gauge.titles, gauge.pictures[None], of_steps, of_settings, chosen)


if __name__ == "__main__":
    frame.main("tune", TuneConfig, run)
