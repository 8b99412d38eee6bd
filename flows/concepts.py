"""One recovered model, many LoRAs: trains and evaluates every concept of a list, a few at a time. A failed concept does not stop the others."""

import sys

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import StageError
from dev2pro.escape import markdown, printable
from dev2pro.redact import redact
from flows import frame
from flows.forms import Concept, Concepts, overrides
from flows.generations import aliases
from flows.plan import hydra_args, stage_folder
from flows.processes import reach
from flows.processes.launch import RETRY_OPTIONS, StageFailed, launch, run_context
from flows.ui.progress import key
from flows.ui.verdict import show

stage = task(launch, name="stage", task_run_name="{stage} {out}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
FOR_LORA = ("experiment", "model", "hardware", "seed", "steps", "batch", "data", "optim", "adapter", "checkpoint", "probe", "publish")
FOR_EVALUATE = ("experiment", "model", "hardware", "seed", "prompts", "seeds")


@task(task_run_name="concept {concept.name}", cache_policy=NO_CACHE)
def one(form: Concepts, concept: Concept, recovered: str) -> Artifact:
    """A concept's LoRA on the recovered model, the same on the base if the form names one, and their evaluation."""
    arms = {"recovered@1": recovered} | ({"base@1": form.base} if form.base else {})
    lora_overrides = overrides(form, FOR_LORA)
    pictures = {f"data.{name}": value for name, value in concept.model_dump(exclude_none=True).items()}
    for arm, base in arms.items():
        out = stage_folder(form.out, concept.name, "lora", arm)
        stage("lora", hydra_args(lora_overrides, pictures, out=out, arm=arm, trained_on=base, guidance=1.0), out, form.processes)
    out, loras = stage_folder(form.out, concept.name, "evaluate"), [stage_folder(form.out, concept.name, "lora", arm) for arm in arms]
    evaluation = stage("evaluate", hydra_args(overrides(form, FOR_EVALUATE), out=out, loras=loras, recovered=recovered), out, form.processes)
    show(evaluation)
    return evaluation


@flow(name="concepts", flow_run_name="{concepts.out}")
def concepts(concepts: Concepts) -> State:
    """Trains a LoRA for every concept on one recovered model, and judges each as it is finished. The others go on when one fails."""
    with run_context(), ThreadPoolTaskRunner(max_workers=concepts.at_once) as runner:
        recovered = aliases.resolve(concepts.trained_on)
        futures = {c.name: runner.submit(one, {"form": concepts, "concept": c, "recovered": recovered}) for c in concepts.concepts}
        for future in futures.values():
            future.wait()
    create_markdown_artifact(key=f"{key(ROOT / concepts.out)}-concepts", markdown=summary(futures), description="How the concepts came out")
    failed = [name for name, future in futures.items() if not future.state.is_completed()]
    if failed:
        message = f"{len(failed)} of {len(futures)} concepts failed: {', '.join(failed)}. Retry does these again."
        error = futures[failed[0]].state.result(raise_on_failure=False)
        return Failed(message=message, data=StageFailed(f"{message} The first: {error}", getattr(error, "exit_code", StageError.exit_code)))
    return Completed(message=f"{len(futures)} concepts in {concepts.out}")


def summary(futures: dict[str, PrefectFuture]) -> str:
    """A markdown table with one row per concept."""
    lines = ["| concept | state | verdict | report |", "|---|---|---|---|"]
    for name, future in futures.items():
        result = future.state.result(raise_on_failure=False)
        if isinstance(result, Artifact):
            lines.append(f"| {markdown(name)} | done | {markdown(result.metrics['verdict'])} | {markdown(f'{result.uri}/report.html')} |")
        else:
            lines.append(f"| {markdown(name)} | **{markdown(future.state.name)}** | {markdown(redact(str(result)))} | |")
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Runs the flow with `key=value` arguments and prints its final state. Returns the exit code."""
    return frame.run("concepts", Concepts, args, _run_and_tell)


def _run_and_tell(form: Concepts) -> None:
    reach.check()
    state = concepts(form, return_state=True)
    state.result()  # raises the error of the first concept that failed
    print(printable(state.message or ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
