"""Every way to train a LoRA on every kind of base: `make study`, `make study SEED=0`, `python -m bench.study --base inside --seed 1`.

A part is a base and a seed: it recovers the base, trains the LoRAs of conf/pipeline/study.yaml and evaluates them, each stage with the command that
`python -m flows.pipeline` would give it, in two processes that stay. A part that was interrupted goes on; a finished stage is skipped. Its numbers
go to docs/study/<base>-<seed>.csv, one row for an arm, a style and a digit; `python -m bench.study_tables` merges what is there into docs/study.md.
"""

import stages  # isort: skip  # noqa: F401  (first, because it quiets the libraries)

import argparse
import contextlib
import csv
import importlib
import json
import multiprocessing
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from dev2pro import signals
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from dev2pro.log import Progress
from flows import plan as plans
from flows.plan import Plan, hydra_args
from stages import frame

RUNS, RESULTS = Path("runs/study"), Path("docs/study")
BUNDLE = Path("data/miniature")
METRICS = ("prompt_fidelity", "distance_to_ideal", "style_similarity", "clip_score", "diversity", "memorisation")
EFFECTS = ("response_kept", "cosine", "ratio", "leak")  # of stages.diagnose: docs/diagnosis.md
COLUMNS = ("base", "seed", "style", "arm", "digit", "pictures", "steps", "seconds", *EFFECTS, *METRICS)
NO_EFFECT = ("1", "", "", "")
OUTSIDE = f"{BUNDLE}/shards/ink/heldout-*.tar"  # pictures of no style, in the same words
BASES = ("outside", "inside", "dead")  # where guidance 1 lies in what the base was distilled at; or its guidance input does nothing
DEAD = {"guidance": [3.5, 3.5], "save_dtype": "bfloat16", "preview.pictures": 0}  # always the same guidance: the input means nothing


@dataclass(frozen=True)
class Job:
    """One stage; `needs` are the names of those that come before it."""

    name: str
    stage: str
    words: list[str]
    needs: list[str] = field(default_factory=list)


def pipeline(base: str) -> Path:
    """The pipeline folder of a base, made of the bundled one's frozen parts and the base's transformer."""
    if base == "outside":
        return BUNDLE / "pipeline"
    folder, transformer = RUNS / "bases" / base, (BUNDLE if base == "inside" else RUNS / "bases/distilled") / base / "transformer"
    if not (folder / "transformer").is_dir():
        shutil.copytree(BUNDLE / "pipeline", folder, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
        shutil.copytree(transformer, folder / "partial")
        (folder / "partial").rename(folder / "transformer")
    return folder


def judged(plan: Plan, out: Path, stage: str, style: str) -> Path:
    """Where a style's arms are evaluated or diagnosed: elsewhere with other arms, and only pictures of new ones are then sampled."""
    return out / stage / f"{style}-{record.digest(sorted(plan.arms))[:8]}"


def jobs(plan: Plan, base: str, seed: int) -> list[Job]:
    """The stages of a part: recover, every LoRA, and an evaluation for each style; with a diagnosis of them all."""
    plan = plan.model_copy(update={"base": str(pipeline(base))})
    out, common = RUNS / base / str(seed), plan.common | {"model.path": plan.base, "seed": seed}
    recovered = str(out / "recover")
    found = [Job("recover", "recover", hydra_args(common, plan.recover, {"preview.pictures": 0, "out": recovered}))]
    for rank in plan.adapters:
        words = hydra_args(common, recovered=recovered, rank=rank, out=str(out / "adapter" / str(rank)))
        found.append(Job(f"adapter {rank}", "extract", words, ["recover"]))
    for style, arm in plan.pairs():
        chosen = plan.arms[arm]
        needs = ["recover"] if "recovered" in chosen.models else []
        needs += [f"adapter {chosen.adapter}"] if chosen.adapter else []
        needs += [f"{style} {chosen.teacher_arm}"] if chosen.teacher_arm else []
        found.append(Job(f"{style} {arm}", "lora", hydra_args(common, plan.lora_values(style, arm, str(out))), needs))
    for style in plan.styles:
        loras = [str(out / "lora" / style / arm) for arm in plan.arms]
        needs = [f"{style} {arm}" for arm in plan.arms]
        values = {"out": str(judged(plan, out, "evaluate", style)), "loras": loras, "recovered": None, "cells": str(out / "cells")}
        found.append(Job(f"evaluate {style}", "evaluate", hydra_args(common, plan.evaluate, values), needs))
        values = {"out": str(judged(plan, out, "diagnose", style)), "loras": loras, "outside": [OUTSIDE]}
        found.append(Job(f"diagnose {style}", "diagnose", hydra_args(common, plan.styles[style], values), needs))
    return found


def run(job: Job, log: str) -> None:
    """Runs a stage in this process, its lines going to a file."""
    module = importlib.import_module(f"stages.{job.stage}")
    schema = getattr(module, f"{job.stage.title()}Config")
    ConfigStore.instance().store(name=f"{job.stage}_schema", node=schema)
    GlobalHydra.instance().clear()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print(f"== {job.name}: python -m stages.{job.stage} {' '.join(job.words)}", flush=True)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            config = frame.typed(schema, hydra.compose(job.stage, job.words))
        try:
            module.run(config)
        finally:
            run_folder.release()


def run_all(todo: list[Job], name: str, log: Path, processes: int) -> None:
    """Runs jobs as soon as what they need is there, the earlier ones first. The first failure ends the part."""
    log.parent.mkdir(parents=True, exist_ok=True)
    waiting, running, done = list(todo), dict[Future, Job](), set[str]()
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(processes, context, signals.signal_at_parent_death, (signal.SIGKILL,)) as pool, Progress(name, len(todo)) as progress:
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= done][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(run, job, str(log))] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    raise SystemExit(f"{name}: {job.name} failed ({error}). {log} has its lines; the same command goes on.")
                done.add(job.name)
            progress.step(len(done))


def rows(plan: Plan, base: str, seed: int) -> Iterator[list[str]]:
    """The rows of a part's CSV: means over a digit's phrasings and seeds, the LoRA on the base at its usual guidance."""
    out = RUNS / base / str(seed)
    for style in plan.styles:
        with (judged(plan, out, "evaluate", style) / "pictures.csv").open() as file:
            pictures = [row for row in csv.DictReader(file) if row["inference"] == "base"]
        by_arm: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in pictures:
            by_arm[row["arm"], row["meaning"]].append(row)
        diagnosis = json.loads((judged(plan, out, "diagnose", style) / "diagnosis.json").read_text())
        effects = {Path(one["name"]).name: effect(one) for one in diagnosis["found"][1:]}
        for (arm, digit), some in by_arm.items():
            trained = record.read(str(out / "lora" / style / arm)) if arm in plan.arms else None
            steps, seconds = (trained.step, trained.step / trained.metrics["steps_per_second"]) if trained else (0, 0.0)
            means = [f"{sum(float(row[metric]) for row in some) / len(some):.6g}" for metric in METRICS]
            yield [base, str(seed), style, arm, digit, str(len(some)), str(steps), f"{seconds:.1f}", *effects.get(arm, NO_EFFECT), *means]


def effect(one: dict[str, Any]) -> list[str]:
    """A diagnosed LoRA's EFFECTS, empty where there is no such number."""
    numbers = (one["response_kept"], one["transfer"]["cosine"], one["transfer"]["ratio"], one["forgetting"]["leak"])
    return ["" if number is None else f"{number:.4f}" for number in numbers]


def write(file: Path, arms: Collection[str], found: Iterable[Sequence[str]]) -> None:
    """Writes a part's CSV; rows that it has of other arms than these stay."""
    there = list(csv.DictReader(file.open())) if file.exists() else []
    kept = [[row.get(column, "") for column in COLUMNS] for row in there if row["arm"] not in arms]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([COLUMNS, *sorted([*kept, *found], key=lambda row: row[2])])


def part(plan: Plan, base: str, seed: int, processes: int, results: Path = RESULTS) -> None:
    """Runs a part and writes its CSV into `results`."""
    start = time.monotonic()
    if base == "dead":
        words = hydra_args(plan.common, DEAD, teacher=plan.teacher, out=str(RUNS / "bases/distilled/dead"))
        run_all([Job("dead base", "distill", words)], "study: the dead base", RUNS / "bases/log.txt", 1)
    run_all(jobs(plan, base, seed), f"study {base} {seed}", RUNS / base / f"{seed}.txt", processes)
    write(file := results / f"{base}-{seed}.csv", {*plan.arms, "none"}, rows(plan, base, seed))
    print(f"study {base} {seed}: {(time.monotonic() - start) / 60:.1f} min, {file}", flush=True)


def only(plan: Plan, arms: Sequence[str]) -> Plan:
    """The plan with these arms, and those that they or the ideal come from. Raises ConfigError for one that it lacks."""
    if unknown := [arm for arm in arms if arm not in plan.arms]:
        raise ConfigError(f"--arm {unknown[0]} is not in the plan. Choose among {', '.join(plan.arms)}.")
    ideal = {name for name, arm in plan.arms.items() if arm.base == "teacher"}
    needed = {*arms, *ideal, *(plan.arms[arm].teacher_arm for arm in arms)}
    return plan.model_copy(update={"arms": {name: arm for name, arm in plan.arms.items() if name in needed}})


def main() -> None:
    """Runs the parts that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, action="append", help="one of the bases; may be given several times; all of them without it")
    parser.add_argument("--seed", type=int, action="append", help="of every training and picture; may be given several times; 0, 1 and 2 without it")
    parser.add_argument("--arm", action="append", default=[], help="one of the plan's; may be given several times; all of them without it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plan", default="study", help="of conf/pipeline/; the CSV files of another than study go to a folder of its name")
    asked = parser.parse_args()
    try:
        plan = plans.read(asked.plan)
        plan = only(plan, asked.arm) if asked.arm else plan
    except ConfigError as error:
        raise SystemExit(f"study: {error}") from error
    for seed in asked.seed or [0, 1, 2]:
        for base in asked.base or BASES:
            part(plan, base, seed, asked.processes, RESULTS if asked.plan == "study" else RESULTS / asked.plan)


if __name__ == "__main__":
    main()
