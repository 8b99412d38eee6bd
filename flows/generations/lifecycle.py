"""The generations of a line of recovered models: what each was begun with, what came of it, and whose weights are kept."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import ConfigError, DataError, DivergedError
from flows.generations import aliases
from flows.generations.aliases import ALIASES, folder
from flows.processes.launch import StageFailed

RECORD = re.compile(r"[0-9]{4,}\.json")
PROMOTED, WORSE, FAILED = "promoted", "not promoted", "failed"  # verdicts
HOPELESS = (ConfigError.exit_code, DataError.exit_code, DivergedError.exit_code)  # with the same snapshot and values it would end so again
BUG, TRIES = 1, 3  # the exit code of what nobody foresaw, and how often a generation may end so
PATIENCE = 3.0  # seconds to wait for what a killed run has started to be gone
WEIGHTS = "*.safetensors"
REMAINS = ("train.snapshot", "metrics.jsonl", "quarantine*.jsonl")  # of a generation that failed


@dataclass(frozen=True)
class Generation:
    """Its folder is `out`, its record <number>.json beside that. `verdict` is empty while it is under way.

    `before` and `after` are the losses on the same held-out pictures and noise: of the model it began with, and of what it made.
    """

    line: str
    number: int
    words: list[str]  # for recover
    processes: int
    tolerance: float
    samples: int
    shards: int
    begun: str
    failures: int = 0  # how often it ended with BUG
    verdict: str = ""
    why: str = ""
    before: float | None = None
    after: float | None = None
    id: str = ""

    @property
    def out(self) -> str:
        """Its folder, below the root."""
        return out(self.line, self.number)


def out(line: str, number: int) -> str:
    """The folder of a generation, below the root."""
    return str((folder(line) / f"{number:04d}").relative_to(ROOT))


def ledger(line: str) -> str:
    """What the line has consumed: a file below the root."""
    return str((folder(line) / "ledger.jsonl").relative_to(ROOT))


def load_all(line: str) -> list[Generation]:
    """All that were begun, the oldest first. Raises ConfigError for a damaged record."""
    records = sorted((int(file.stem), file) for file in folder(line).glob("*.json") if RECORD.fullmatch(file.name))
    try:
        return [Generation(**record.read_json(file)) for _, file in records]
    except TypeError as error:
        raise ConfigError(f"A record in {folder(line)} is damaged ({error}). Bring the old one back.") from error


def write(one: Generation) -> Generation:
    """Puts the record in place, whole."""
    record.write_json(folder(one.line) / f"{one.number:04d}.json", asdict(one))
    return one


def now() -> str:
    """The time as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def exclusive(line: str) -> Iterator[int | None]:
    """Within, the line is this process's, and that of processes which inherit the handle; None where it is another's."""
    folder(line).mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + PATIENCE
    while (handle := run_folder.lock(folder(line))) is None and time.monotonic() < patience:
        time.sleep(0.1)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


# ---- what came of it ------------------------------------------------------------------------------------------------------------------


def with_verdict(one: Generation, made: Artifact) -> Generation:
    """The generation with its verdict.

    It is compared with the model it began with, and with the best one where that was measured in the same way: many small
    steps down must not add up.
    """
    before, after = losses(made)
    best = _best(one.line, made)
    limit = before if best is None else min(before, best)
    told = replace(one, before=before, after=after, id=made.id)
    if after <= limit * (1 + one.tolerance):
        return replace(told, verdict=PROMOTED)
    than = "the model it began with" if limit == before else "the best one"
    return replace(told, verdict=WORSE, why=f"its held-out loss is {after:.5f}, more than {100 * one.tolerance:g}% above the {limit:.5f} of {than}")


def finalize(one: Generation, made: Artifact) -> None:
    """Has the aliases name a promoted generation, then writes its verdict down. Doing that again changes nothing."""
    if one.verdict == PROMOTED:
        best = _best(one.line, made)
        aliases.promote(one.line, "latest", one.out, made.id)
        if best is None or losses(made)[1] < best:
            aliases.promote(one.line, "best", one.out, made.id)
    write(one)


def losses(made: Artifact) -> tuple[float, float]:
    """On held-out pictures: of the model a run began with, and of what it made."""
    curve = made.metrics["curve"]
    return curve[0]["loss"], curve[-1]["loss"]


def _best(line: str, made: Artifact) -> float | None:
    """The held-out loss of the best model, where there is one and the numbers can be compared."""
    place = aliases.target(line, "best")
    best = record.read_if_artifact(str(ROOT / place)) if place else None
    return losses(best)[1] if best and _measured(best) == _measured(made) else None


def _measured(made: Artifact) -> list[Any]:
    """What the held-out loss depends on, besides the model."""
    config = made.config
    pictures = [parent["id"] for parent in made.parents if parent["role"] == f"{record.DATA}heldout"]
    told = [config["data"]["resolution"], config["probe"]["samples"], config["probe"]["bins"]]
    return [pictures, config["seed"], config["guidance"], config["model"], *told]


def failed(one: Generation, error: StageFailed) -> Generation:
    """The generation after its stage ended badly: over, if it would end so again; else it is gone on with the next time."""
    failures = one.failures + (error.exit_code == BUG)
    if error.exit_code not in HOPELESS and failures < TRIES:
        return write(replace(one, failures=failures))
    return write(replace(one, failures=failures, verdict=FAILED, why=str(error)[:1000]))


# ---- what is kept ---------------------------------------------------------------------------------------------------------------------


def clean_up(line: str) -> None:
    """Removes what finished generations need no more: checkpoints; of failed ones all that a run would go on from; and what was half written."""
    for left in folder(line).glob("*.partial"):
        left.unlink()
    for one in load_all(line):
        place = ROOT / one.out
        if one.verdict == FAILED and (place / record.CONFIG).exists():
            kept = {file for pattern in REMAINS for file in place.glob(pattern)}
            for there in set(place.iterdir()) - kept - {place / record.CONFIG}:
                shutil.rmtree(there) if there.is_dir() else there.unlink()
            (place / record.CONFIG).unlink()
        elif one.verdict and any(place.glob("checkpoint-*")):
            record.remove_temporary(place, keep=0)


def prunable(line: str, keep: int) -> list[str]:
    """The folders of old generations that still have their weights, though they are none of the `keep` newest and no alias names them."""
    finished = [one.out for one in load_all(line) if one.verdict in (PROMOTED, WORSE)]
    kept = {*finished[-keep:], *(aliases.target(line, alias) for alias in ALIASES)}
    return [place for place in finished if place not in kept and any((ROOT / place).rglob(WEIGHTS))]


def quarantines(line: str) -> list[str]:
    """Files that name samples which could not be used: they are left out of what comes."""
    return sorted(str(file.relative_to(ROOT)) for file in folder(line).glob("*/quarantine*.jsonl"))
