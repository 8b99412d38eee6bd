"""The recurring recovery: fine-tunes the last promoted model on new shards, measures the result, and promotes it if it is no worse.

`python -m flows.recurring line=main "shards=[shards/*.tar]"`; see docs/recurring.md.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import DataError
from dev2pro.escape import printable
from flows import frame
from flows.forms import BESIDE, Recurring, overrides
from flows.generations import aliases, history, lifecycle
from flows.generations.lifecycle import WORSE, Generation
from flows.plan import hydra_args
from flows.processes import reach
from flows.processes.launch import RETRY_OPTIONS, StageFailed, command, launch, run_context

SKIPPED, NOT_PROMOTED = "Skipped", "Not promoted"  # names of completed states
REGRESSION = "dev2pro.regression"  # an event, for automations
LISTS = ("shards", "heldout")
FOR_RECOVER = ("experiment", "model", "hardware", "seed", "batch", "publish", "ema", "optim", "checkpoint", "probe")


@dataclass(frozen=True)
class NewShards:
    """The unconsumed data: number of samples and shards, total number of shards, and the unusable ones (shard, reason)."""

    samples: int
    shards: int
    total: int
    unusable: list[dict[str, str]]


@task(task_run_name="look for what is new", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def look(form: Recurring, number: int, handle: int) -> NewShards:
    """Indexes the shards, and writes a snapshot of those the line has not consumed into the next generation's folder."""
    out = lifecycle.out(form.line, number)
    shutil.rmtree(ROOT / out, ignore_errors=True)  # left by a run that was killed before it started this generation
    to, index = ([], []) if form.index == BESIDE else ([f"--to={form.index}"], [f"--index={form.index}"])
    indexed = _run_data_command("data.index", [*to, "--", *form.shards], form.line, handle)
    args = [*index, "--out", f"{out}/train.snapshot", "--ledger", lifecycle.ledger(form.line), "--only-new", "--skip-unusable"]
    args += ["--without", *quarantined] if (quarantined := lifecycle.quarantines(form.line)) else []
    snapshot = _run_data_command("data.snapshot", [*args, "--", *form.shards], form.line, handle)
    reasons = {shard["shard"]: shard["reason"] for shard in (*snapshot["unusable"], *indexed["unusable"])}  # the index has the most specific reason
    if reasons and len(snapshot["unusable"]) == snapshot["shards"]:
        raise StageFailed(f"none of {snapshot['shards']} shards can be used: {next(iter(reasons.values()))}", DataError.exit_code)
    return NewShards(
        snapshot["samples"], snapshot["pinned"], snapshot["shards"], [{"shard": shard, "reason": why} for shard, why in sorted(reasons.items())]
    )


def _run_data_command(module: str, args: list[str], line: str, handle: int) -> dict[str, Any]:
    """The JSON report of a command of `data/`. Bad data is no failure if the command wrote its report."""
    report = aliases.line_folder(line) / f"{module}.json"
    report.unlink(missing_ok=True)
    try:
        command(module, ["--report", str(report.relative_to(ROOT)), *args], (handle,))
    except StageFailed as error:
        if error.exit_code != DataError.exit_code or not report.exists():
            raise
    return json.loads(report.read_text())


@task(task_run_name="recover generation {one.number}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def recover(one: Generation) -> Artifact:
    """Trains the generation, or resumes its training."""
    return launch("recover", one.words, one.out, one.processes)


@flow(name="recurring recovery", flow_run_name="{recurring.line}")
def recurring(recurring: Recurring) -> State:
    """Trains on what is new since the last time, on top of the last promoted model, and promotes the result if its held-out loss is no worse."""
    with lifecycle.exclusive(recurring.line) as handle:
        if handle is None:
            return Completed(name=SKIPPED, message=f"Another run works on the line {recurring.line}. What is new waits for the next run.")
        with run_context():
            return _work(recurring, handle)


def _work(form: Recurring, handle: int) -> State:
    """Finishes interrupted generations, then trains one on new shards."""
    done, new = list[Generation](), None
    try:
        before = lifecycle.load_all(form.line)
        done += [_finish_generation(generation) for generation in before if not generation.verdict]
        new = look(form, number := before[-1].number + 1 if before else 1, handle)
        if new.samples >= form.least:
            done.append(_finish_generation(_start_generation(form, number, new)))
        lifecycle.clean_up(form.line)
        if prunable := lifecycle.prunable(form.line, form.keep):
            command("dev2pro.artifacts", ["prune", *prunable, "--runs", "runs"])
    except Exception:
        history.show(form.line, new.unusable if new else [])
        raise
    history.show(form.line, new.unusable)
    return _final_state(form, done, new)


def _start_generation(form: Recurring, number: int, new: NewShards) -> Generation:
    """Writes the record of the next generation with its arguments."""
    out, start = lifecycle.out(form.line, number), aliases.target(form.line, "latest")
    values: dict[str, Any] = {
        "out": out, "steps": math.ceil(form.epochs * new.samples / form.batch), "ledger": lifecycle.ledger(form.line),
        "data.train": [f"{out}/train.snapshot"], "data.heldout": form.heldout,
    }  # fmt: skip
    values |= {"start": start} if start else {}
    values |= {"data.resolution": form.resolution} if form.resolution else {}
    get_run_logger().info(f"generation {number} begins on {start or 'the base'}: {new.samples:,} new samples in {new.shards:,} shards")
    args = hydra_args(overrides(form, FOR_RECOVER), values)
    return lifecycle.write(
        Generation(form.line, number, args, form.processes, form.tolerance, new.samples, new.shards, lifecycle.now())
    )  # fmt: skip


def _finish_generation(generation: Generation) -> Generation:
    """Trains the generation and returns it with its verdict. Raises StageFailed."""
    try:
        artifact = recover(generation)
    except StageFailed as error:
        if lifecycle.failed(generation, error).verdict:
            get_run_logger().warning(f"generation {generation.number} is given up; the next one begins anew on what it had")
            lifecycle.clean_up(generation.line)
        raise
    judged = lifecycle.with_verdict(generation, artifact)
    get_run_logger().info(history.sentence(judged))
    if judged.verdict == WORSE:
        emit_event(
            REGRESSION,
            {"prefect.resource.id": f"dev2pro.line.{generation.line}", "prefect.resource.name": f"recurring recovery {generation.line}"},
            payload={
                "message": history.sentence(judged), "generation": judged.number,
                "before": judged.before, "after": judged.after, "id": judged.id,
            },
        )  # fmt: skip
    lifecycle.finalize(judged, artifact)
    return judged


def _final_state(form: Recurring, done: list[Generation], new: NewShards) -> State:
    """A completed state; its name says whether a model was promoted."""
    sentences = [history.sentence(generation) for generation in done]
    if new.samples < form.least:
        counts = f"{new.samples:,} new samples in {new.shards:,} of {new.total:,} shards" if new.samples else f"Nothing new in {new.total:,} shards"
        sentences.append(f"{counts}; the line {form.line} waits for {form.least:,} samples.")
    if new.unusable:
        sentences.append(f"{len(new.unusable):,} shards cannot be used; the history says why.")
    name = SKIPPED if not done else NOT_PROMOTED if any(generation.verdict == WORSE for generation in done) else None
    return Completed(name=name, message=" ".join(sentences))


def main(args: list[str]) -> int:
    """Runs the flow with `key=value` arguments and prints its final state. Returns the exit code."""
    return frame.run("recurring", Recurring, args, _run_and_tell, lists=LISTS)


def _run_and_tell(form: Recurring) -> None:
    reach.check()
    state = recurring(form, return_state=True)
    state.result()  # raises the error of a failed run
    print(printable(f"{state.name}: {state.message}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
