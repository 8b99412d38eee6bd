"""The recurring recovery: what is new is trained on, on top of the last promoted model, measured, and promoted if it is no worse.

`python -m flows.recurring line=main "shards=[shards/*.tar]"`; docs/recurring.md tells what happens when.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import yaml
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed, State
from pydantic import ValidationError

from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import ConfigError, DataError, StageError
from dev2pro.escape import printable
from flows.forms import BESIDE, Recurring, mistakes, overrides
from flows.generations import aliases, history, lifecycle
from flows.generations.lifecycle import WORSE, Generation
from flows.plan import hydra_args
from flows.processes.launch import RETRY_OPTIONS, StageFailed, command, launch, run_context

SKIPPED, NOT_PROMOTED = "Skipped", "Not promoted"  # names of states in which a run has completed
REGRESSION = "dev2pro.regression"  # an event, for automations
LISTS = ("shards", "heldout")
FOR_RECOVER = ("experiment", "model", "hardware", "seed", "batch", "publish", "ema", "optim", "checkpoint", "probe")


@dataclass(frozen=True)
class Found:
    """What is new: so many samples in so many shards, of all that were looked at, and those that cannot be used (shard, reason)."""

    samples: int
    shards: int
    of: int
    unusable: list[dict[str, str]]


@task(task_run_name="look for what is new", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def look(form: Recurring, number: int, handle: int) -> Found:
    """Indexes the shards, and pins those that the line has not consumed in the folder of the next generation."""
    place = lifecycle.out(form.line, number)
    shutil.rmtree(ROOT / place, ignore_errors=True)  # of a run that was killed before it began this generation
    to, index = ([], []) if form.index == BESIDE else ([f"--to={form.index}"], [f"--index={form.index}"])
    indexed = _reported("data.index", [*to, "--", *form.shards], form.line, handle)
    own = [*index, "--out", f"{place}/train.snapshot", "--ledger", lifecycle.ledger(form.line), "--only-new", "--skip-unusable"]
    own += ["--without", *spoilt] if (spoilt := lifecycle.quarantines(form.line)) else []
    pinned = _reported("data.snapshot", [*own, "--", *form.shards], form.line, handle)
    reasons = {one["shard"]: one["reason"] for one in (*pinned["unusable"], *indexed["unusable"])}  # the index knows best
    if reasons and len(pinned["unusable"]) == pinned["shards"]:
        raise StageFailed(f"none of {pinned['shards']} shards can be used: {next(iter(reasons.values()))}", DataError.exit_code)
    return Found(pinned["samples"], pinned["pinned"], pinned["shards"], [{"shard": shard, "reason": why} for shard, why in sorted(reasons.items())])


def _reported(module: str, own: list[str], line: str, handle: int) -> dict[str, Any]:
    """What a command of the data room reports. That some data is bad is no failure where it came so far."""
    report = aliases.folder(line) / f"{module}.json"
    report.unlink(missing_ok=True)
    try:
        command(module, ["--report", str(report.relative_to(ROOT)), *own], (handle,))
    except StageFailed as error:
        if error.exit_code != DataError.exit_code or not report.exists():
            raise
    return json.loads(report.read_text())


@task(task_run_name="recover generation {one.number}", cache_policy=NO_CACHE, **RETRY_OPTIONS)
def recover(one: Generation) -> Artifact:
    """Trains it, from where it was interrupted."""
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
    """First what was interrupted, then what is new."""
    done, found = list[Generation](), None
    try:
        before = lifecycle.load_all(form.line)
        done += [_finished(one) for one in before if not one.verdict]
        found = look(form, number := before[-1].number + 1 if before else 1, handle)
        if found.samples >= form.least:
            done.append(_finished(_begun(form, number, found)))
        lifecycle.clean_up(form.line)
        if heavy := lifecycle.prunable(form.line, form.keep):
            command("dev2pro.artifacts", ["prune", *heavy, "--runs", "runs"])
    except Exception:
        history.show(form.line, found.unusable if found else [])
        raise
    history.show(form.line, found.unusable)
    return _state(form, done, found)


def _begun(form: Recurring, number: int, found: Found) -> Generation:
    """The next generation, written down with all that it will be made with."""
    place, start = lifecycle.out(form.line, number), aliases.target(form.line, "latest")
    own: dict[str, Any] = {
        "out": place, "steps": math.ceil(form.epochs * found.samples / form.batch), "ledger": lifecycle.ledger(form.line),
        "data.train": [f"{place}/train.snapshot"], "data.heldout": form.heldout,
    }  # fmt: skip
    own |= {"start": start} if start else {}
    own |= {"data.resolution": form.resolution} if form.resolution else {}
    get_run_logger().info(f"generation {number} begins on {start or 'the base'}: {found.samples:,} new samples in {found.shards:,} shards")
    said = hydra_args(overrides(form, FOR_RECOVER), own)
    return lifecycle.write(
        Generation(form.line, number, said, form.processes, form.tolerance, found.samples, found.shards, lifecycle.now())
    )  # fmt: skip


def _finished(one: Generation) -> Generation:
    """The generation with its verdict. Raises StageFailed."""
    try:
        made = recover(one)
    except StageFailed as error:
        if lifecycle.failed(one, error).verdict:
            get_run_logger().warning(f"generation {one.number} is given up; the next one begins anew on what it had")
            lifecycle.clean_up(one.line)
        raise
    told = lifecycle.with_verdict(one, made)
    get_run_logger().info(history.sentence(told))
    if told.verdict == WORSE:
        emit_event(
            REGRESSION, {"prefect.resource.id": f"dev2pro.line.{one.line}", "prefect.resource.name": f"recurring recovery {one.line}"},
            payload={"message": history.sentence(told), "generation": told.number, "before": told.before, "after": told.after, "id": told.id},
        )  # fmt: skip
    lifecycle.finalize(told, made)
    return told


def _state(form: Recurring, done: list[Generation], found: Found) -> State:
    """How the run ends: it has done its work, and its name says whether a model came of that."""
    said = [history.sentence(one) for one in done]
    if found.samples < form.least:
        new = f"{found.samples:,} new samples in {found.shards:,} of {found.of:,} shards" if found.samples else f"Nothing new in {found.of:,} shards"
        said.append(f"{new}; the line {form.line} waits for {form.least:,} samples.")
    if found.unusable:
        said.append(f"{len(found.unusable):,} shards cannot be used; the history says why.")
    name = SKIPPED if not done else NOT_PROMOTED if any(one.verdict == WORSE for one in done) else None
    return Completed(name=name, message=" ".join(said))


def main(arguments: list[str]) -> int:
    """`key=value` words to the flow's parameter; prints how it came out. Returns the exit code."""
    try:
        state = recurring(Recurring.model_validate(nested(arguments)), return_state=True)
        state.result()  # raises what it failed with
    except ValidationError as error:
        print("\n".join(printable(f"recurring: {line}") for line in mistakes(error, Recurring)), file=sys.stderr)
        return ConfigError.exit_code
    except (StageError, StageFailed) as error:
        print(printable(f"recurring: {error}"), file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code  # of a stage that was killed, as a shell tells it
    print(printable(f"{state.name}: {state.message}"))
    return 0


def nested(words: list[str]) -> dict[str, Any]:
    """`a.b=c` words as the form has them. A value that begins with [ is a list; one place alone is a list of one."""
    found: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        *above, last = key.split(".")
        group = found
        for part in above:
            if not isinstance(group := group.setdefault(part, {}), dict):
                raise ConfigError(f"{word}: {part} has a value already. Give one or the other.")
        try:
            group[last] = yaml.safe_load(value) if value.startswith("[") else [value] if key in LISTS else value
        except yaml.YAMLError as error:
            raise ConfigError(f"{word} is no list. Write it as in {key}=[one,two], and what has braces in quotes.") from error
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
