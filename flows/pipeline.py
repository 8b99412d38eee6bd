"""The main path: recover -> one LoRA per arm and style -> evaluate. `python -m flows.pipeline plan=miniature seed=0 out=runs/demo`."""

import sys
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import ParameterBindError, ParameterTypeError
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import StringConstraints

from dev2pro.artifact import Artifact
from dev2pro.errors import ConfigError
from flows import plan as plans
from flows.launch import StageFailed, at_most, launch
from flows.plan import Name, Plan, folder, words

RunFolder = Annotated[str, StringConstraints(pattern=r"^runs(/[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63})+$")]


@task(task_run_name="recover (dev2pro)", cache_policy=NO_CACHE)
def recover(plan: Plan, seed: int, out: str) -> Artifact:
    """Fine-tunes the base at guidance 1.0."""
    place = folder(out, "recover")
    return launch("recover", words(plan.common, plan.recover, out=place, seed=seed), place, plan.processes.get("recover", 1))


@task(task_run_name="lora {style} {arm}", cache_policy=NO_CACHE)
def lora(plan: Plan, seed: int, out: str, style: str, arm: str, recovered: Artifact | None) -> Artifact:
    """Trains one arm's LoRA in one style."""
    place = folder(out, "lora", style, arm)
    bases = {"base": plan.base, "teacher": plan.teacher, "recovered": recovered and folder(out, "recover")}
    own = {"out": place, "seed": seed, "arm": arm, "trained_on": bases[plan.arms[arm].base], "guidance": plan.arms[arm].guidance}
    return launch("lora", words(plan.common, plan.lora, plan.styles[style], own), place, plan.processes.get("lora", 1))


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(plan: Plan, seed: int, out: str, recovered: Artifact, loras: list[Artifact]) -> Artifact:
    """Puts every LoRA on every inference base and compares the pictures."""
    place = folder(out, "evaluate")
    own = {"out": place, "seed": seed, "recovered": folder(out, "recover"), "loras": [folder(out, "lora", s, a) for s, a in plan.pairs()]}
    return launch("evaluate", words(plan.common, plan.evaluate, own), place, plan.processes.get("evaluate", 1))


@flow(name="dev2pro", flow_run_name="{plan} seed {seed}", task_runner=ThreadPoolTaskRunner())
def pipeline(plan: Name = "miniature", seed: int = 0, out: RunFolder = "runs/demo") -> dict[str, Any]:
    """Recover, train the LoRAs, evaluate; finished stages are skipped. Returns where the report is and what it says."""
    what = plans.read(plan)
    with at_most(what.parallel):
        recovered = recover.submit(what, seed, out)
        loras = [lora.submit(what, seed, out, style, arm, recovered if what.arms[arm].base == "recovered" else None) for style, arm in what.pairs()]
        result = evaluate(what, seed, out, recovered.result(), [one.result() for one in loras])  # the first failure ends the flow
    create_markdown_artifact(key="verdict", markdown=f"{result.metrics['verdict']}\n\nReport: `{result.uri}/report.html`")
    return {"verdict": result.metrics["verdict"], "report": f"{result.uri}/report.html"}


def main(arguments: list[str]) -> int:
    """`key=value` words to the flow's parameters; prints the verdict. Returns the exit code."""
    values = dict(word.partition("=")[::2] for word in arguments)
    try:
        plans.read(values.get("plan", "miniature"))  # a mistake in it needs no server to be told
        said = pipeline(**values)
    except (ConfigError, StageFailed, ParameterBindError, ParameterTypeError) as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return getattr(error, "exit_code", ConfigError.exit_code)
    print(f"\n{said['verdict']}\n\nReport: {said['report']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
