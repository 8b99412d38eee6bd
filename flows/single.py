"""One stage as a flow of its own, for the forms of the UI. `python -m flows.single lora out=runs/mine`."""

import sys
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from dev2pro.errors import ConfigError
from dev2pro.escape import printable
from flows import frame
from flows.forms import Diagnose, Distill, Evaluate, Lora, Recover, Stage, Tune, overrides
from flows.generations import aliases
from flows.plan import hydra_args
from flows.processes import reach
from flows.processes.launch import RETRY_OPTIONS, launch, run_context
from flows.ui import verdict

stage = task(launch, name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
NAMES = {"recover": "recover (dev2pro)"}  # the name in the UI


def _run(name: str, form: Stage, *models: str) -> State:
    """Runs one stage. `models`: fields that may hold an alias, such as latest."""
    with run_context():
        resolved = {field: aliases.resolve(model) for field in models if (model := getattr(form, field))}
        artifact = stage.with_options(task_run_name=NAMES.get(name, name))(name, hydra_args(overrides(form), resolved), form.out, form.processes)
    if artifact.kind == "evaluation":
        verdict.show(artifact)
    if name in verdict.WORDS:
        verdict.show_words(artifact)
    return Completed(message=f"{artifact.kind} {artifact.id[:12]} in {artifact.uri}")


@flow(name="recover (dev2pro)", flow_run_name="{recover.out}")
def recover(recover: Recover) -> State:
    """Fine-tunes the whole base at guidance 1.0, where no teacher is needed. The result is for training LoRAs on, not for use."""
    return _run("recover", recover)


@flow(name="lora", flow_run_name="{lora.out}")
def lora(lora: Lora) -> State:
    """Trains a LoRA on a recovered model. Apply it to the original base at its usual guidance."""
    return _run("lora", lora, "trained_on")


@flow(name="evaluate", flow_run_name="{evaluate.out}")
def evaluate(evaluate: Evaluate) -> State:
    """Puts every LoRA on every base, judges the pictures, compares, and writes a report."""
    return _run("evaluate", evaluate, "recovered")


@flow(name="tune", flow_run_name="{tune.out}")
def tune(tune: Tune) -> State:
    """Finds which step of a LoRA works best on the base, at which strength and guidance, and makes a LoRA that says so."""
    return _run("tune", tune)


@flow(name="diagnose", flow_run_name="{diagnose.out}")
def diagnose(diagnose: Diagnose) -> State:
    """Tells without a teacher, and before anything is trained, how a base was distilled and what its guidance input does."""
    return _run("diagnose", diagnose, "teacher")


@flow(name="distill", flow_run_name="{distill.out}")
def distill(distill: Distill) -> State:
    """Makes a guidance-distilled student from an undistilled teacher, as the article guesses FLUX.1-dev was made."""
    return _run("distill", distill, "teacher")


FLOWS: dict[str, tuple[Any, type[Stage]]] = {
    "recover": (recover, Recover), "lora": (lora, Lora), "evaluate": (evaluate, Evaluate), "tune": (tune, Tune),
    "diagnose": (diagnose, Diagnose), "distill": (distill, Distill),
}  # fmt: skip


def main(args: list[str]) -> int:
    """Runs the flow of the stage that the first argument names with the others, `key=value`, and prints its final state. Returns the exit code."""
    if not args or args[0] not in FLOWS:
        print(f"single: the first word must be a stage, one of {', '.join(FLOWS)}.", file=sys.stderr)
        return ConfigError.exit_code
    flow_of_stage, form = FLOWS[args[0]]

    def run_and_tell(filled: Stage) -> None:
        reach.check()
        state = flow_of_stage(filled, return_state=True)
        state.result()  # raises the error of a failed run
        print(printable(state.message or ""))

    return frame.run(args[0], form, args[1:], run_and_tell)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
