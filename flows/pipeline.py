"""The main path: recover -> one LoRA per arm and style -> evaluate. `python -m flows.pipeline plan=miniature seed=0 out=runs/demo`."""

import sys
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from dev2pro.artifacts.record import Artifact
from dev2pro.escape import printable
from flows import frame
from flows import plan as plans
from flows.forms import Pipeline
from flows.plan import Plan, hydra_args, stage_folder
from flows.processes import reach
from flows.processes.launch import RETRY_OPTIONS, launch, run_context
from flows.ui import verdict


@task(task_run_name="recover (dev2pro)", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def recover(plan: Plan, seed: int, out: str) -> Artifact:
    """Fine-tunes the base at guidance 1.0."""
    stage_out = stage_folder(out, "recover")
    return launch("recover", hydra_args(plan.common, plan.recover, out=stage_out, seed=seed), stage_out, plan.processes.get("recover", 1))


@task(task_run_name="extract rank {rank}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def extract(plan: Plan, seed: int, out: str, rank: int, recovered: Artifact) -> Artifact:
    """Makes a training adapter of what recovery changed."""
    stage_out = stage_folder(out, "adapter", str(rank))
    return launch("extract", hydra_args(plan.common, out=stage_out, seed=seed, rank=rank, recovered=stage_folder(out, "recover")), stage_out)


@task(task_run_name="lora {style} {arm}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def lora(plan: Plan, seed: int, out: str, style: str, arm: str, recovered: Artifact | None, *needed: Artifact | None) -> Artifact:
    """Trains one arm's LoRA in one style, once what it needs is there."""
    values = plan.lora_values(style, arm, out)
    return launch("lora", hydra_args(plan.common, values, seed=seed), values["out"], plan.processes.get("lora", 1))


@task(task_run_name="evaluate", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def evaluate(plan: Plan, seed: int, out: str, recovered: Artifact, loras: list[Artifact]) -> Artifact:
    """Puts every LoRA on every inference base and compares the pictures."""
    stage_out = stage_folder(out, "evaluate")
    values = {
        "out": stage_out,
        "seed": seed,
        "recovered": stage_folder(out, "recover"),
        "loras": [stage_folder(out, "lora", s, a) for s, a in plan.pairs()],
    }
    return launch("evaluate", hydra_args(plan.common, plan.evaluate, values), stage_out, plan.processes.get("evaluate", 1))


@flow(name="dev2pro", flow_run_name="{pipeline.plan} seed {pipeline.seed}", task_runner=ThreadPoolTaskRunner())
def pipeline(pipeline: Pipeline) -> dict[str, Any]:
    """Recover, train the LoRAs, evaluate; finished stages are skipped. Returns the verdict and the path of the report."""
    plan, seed, out = plans.read(pipeline.plan), pipeline.seed, pipeline.out
    with run_context():
        recovered = recover.submit(plan, seed, out)
        adapters = {rank: extract.submit(plan, seed, out, rank, recovered) for rank in plan.adapters}
        loras: dict[tuple[str, str | None], PrefectFuture] = {}
        for style, arm in plan.pairs():
            chosen = plan.arms[arm]
            model = recovered if "recovered" in chosen.models else None
            needed = loras.get((style, chosen.teacher_arm)), adapters.get(chosen.adapter or 0)
            loras[style, arm] = lora.submit(plan, seed, out, style, arm, model, *needed)
        result = evaluate(plan, seed, out, recovered.result(), [one.result() for one in loras.values()])  # the first failure ends the flow
    verdict.show(result)
    return {"verdict": result.metrics["verdict"], "report": f"{result.uri}/report.html"}


def main(args: list[str]) -> int:
    """Runs the flow with `key=value` arguments and prints the verdict. Returns the exit code."""
    return frame.run("pipeline", Pipeline, args, _run_and_tell)


def _run_and_tell(form: Pipeline) -> None:
    plans.read(form.plan)  # fails on a bad plan before a server starts
    reach.check()
    outcome = pipeline(form)
    print(f"\n{printable(outcome['verdict'])}\n\nReport: {printable(outcome['report'])}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
