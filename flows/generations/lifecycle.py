"""The generations of a line of recovered models: their records, their verdicts, and whose weights are kept."""

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
from flows.generations.aliases import ALIASES, line_folder
from flows.processes.launch import StageFailed

RECORD = re.compile(r"[0-9]{4,}\.json")
PROMOTED, WORSE, FAILED = "promoted", "not promoted", "failed"  # verdicts
NOT_RETRYABLE = (ConfigError.exit_code, DataError.exit_code, DivergedError.exit_code)  # the same snapshot and values would fail again
BUG, MAX_BUGS = 1, 3  # the exit code of an unexpected error, and after how many of them a generation fails
LOCK_TIMEOUT = 3.0  # seconds to wait until the processes of a killed run have ended
WEIGHTS = "*.safetensors"
PRESERVED = ("train.snapshot", "metrics.jsonl", "quarantine*.jsonl")  # files of a failed generation that are kept


@dataclass(frozen=True)
class Generation:
    """One generation. Its folder is `out`, its record <number>.json beside that. `verdict` is empty while it is trained.

    `before` and `after` are losses on the same held-out pictures and noise: of the start model, and of the trained one.
    """

    line: str
    number: int
    words: list[str]  # arguments of recover
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
    return str((line_folder(line) / f"{number:04d}").relative_to(ROOT))


def ledger(line: str) -> str:
    """The ledger of consumed shards: a file below the root."""
    return str((line_folder(line) / "ledger.jsonl").relative_to(ROOT))


def load_all(line: str) -> list[Generation]:
    """All generations of a line, the oldest first. Raises ConfigError for a damaged record."""
    records = sorted((int(file.stem), file) for file in line_folder(line).glob("*.json") if RECORD.fullmatch(file.name))
    try:
        return [Generation(**record.read_json(file)) for _, file in records]
    except TypeError as error:
        raise ConfigError(f"A record in {line_folder(line)} is damaged ({error}). Bring the old one back.") from error


def write(generation: Generation) -> Generation:
    """Writes the record atomically."""
    record.write_json(line_folder(generation.line) / f"{generation.number:04d}.json", asdict(generation))
    return generation


def now() -> str:
    """The current time in UTC, in the format of records."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def exclusive(line: str) -> Iterator[int | None]:
    """Locks the line for this process and those that inherit the handle; None if another process holds the lock."""
    line_folder(line).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT
    while (handle := run_folder.lock(line_folder(line))) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


# ---- verdicts -------------------------------------------------------------------------------------------------------------------------


def with_verdict(generation: Generation, artifact: Artifact) -> Generation:
    """The generation with its verdict.

    It is compared with its start model, and with the best one if that was measured in the same way, so that many small
    regressions do not add up.
    """
    before, after = losses(artifact)
    best = _best_loss(generation.line, artifact)
    limit = before if best is None else min(before, best)
    measured = replace(generation, before=before, after=after, id=artifact.id)
    if after <= limit * (1 + generation.tolerance):
        return replace(measured, verdict=PROMOTED)
    reference = "the model it began with" if limit == before else "the best one"
    return replace(
        measured,
        verdict=WORSE,
        why=f"its held-out loss is {after:.5f}, more than {100 * generation.tolerance:g}% above the {limit:.5f} of {reference}",
    )


def finalize(generation: Generation, artifact: Artifact) -> None:
    """Points the aliases at a promoted generation, then writes its record. Idempotent."""
    if generation.verdict == PROMOTED:
        best = _best_loss(generation.line, artifact)
        aliases.promote(generation.line, "latest", generation.out, artifact.id)
        if best is None or losses(artifact)[1] < best:
            aliases.promote(generation.line, "best", generation.out, artifact.id)
    write(generation)


def losses(artifact: Artifact) -> tuple[float, float]:
    """Held-out losses of the model a run started with, and of the one it trained."""
    curve = artifact.metrics["curve"]
    return curve[0]["loss"], curve[-1]["loss"]


def _best_loss(line: str, artifact: Artifact) -> float | None:
    """The held-out loss of the best model, if there is one and the losses are comparable."""
    uri = aliases.target(line, "best")
    best = record.read_if_artifact(str(ROOT / uri)) if uri else None
    return losses(best)[1] if best and _probe_settings(best) == _probe_settings(artifact) else None


def _probe_settings(artifact: Artifact) -> list[Any]:
    """The settings that the held-out loss depends on, besides the model."""
    config = artifact.config
    pictures = [parent["id"] for parent in artifact.parents if parent["role"] == f"{record.DATA}heldout"]
    settings = [config["data"]["resolution"], config["probe"]["samples"], config["probe"]["bins"]]
    return [pictures, config["seed"], config["guidance"], config["model"], *settings]


def failed(generation: Generation, error: StageFailed) -> Generation:
    """Records a failure of the stage. The generation fails for good if a retry would fail again; else the next run resumes it."""
    failures = generation.failures + (error.exit_code == BUG)
    if error.exit_code not in NOT_RETRYABLE and failures < MAX_BUGS:
        return write(replace(generation, failures=failures))
    return write(replace(generation, failures=failures, verdict=FAILED, why=str(error)[:1000]))


# ---- files ----------------------------------------------------------------------------------------------------------------------------


def clean_up(line: str) -> None:
    """Removes checkpoints of finished generations, all but PRESERVED of failed ones, and partial files."""
    for partial in line_folder(line).glob("*.partial"):
        partial.unlink()
    for generation in load_all(line):
        path = ROOT / generation.out
        if generation.verdict == FAILED and (path / record.CONFIG).exists():
            preserved = {file for pattern in PRESERVED for file in path.glob(pattern)}
            for entry in set(path.iterdir()) - preserved - {path / record.CONFIG}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            (path / record.CONFIG).unlink()
        elif generation.verdict and any(path.glob("checkpoint-*")):
            record.remove_temporary(path, keep=0)


def prunable(line: str, keep: int) -> list[str]:
    """Folders of old generations that still have weights, but are not among the `keep` newest and not the target of an alias."""
    finished = [generation.out for generation in load_all(line) if generation.verdict in (PROMOTED, WORSE)]
    protected = {*finished[-keep:], *(aliases.target(line, alias) for alias in ALIASES)}
    return [path for path in finished if path not in protected and any((ROOT / path).rglob(WEIGHTS))]


def quarantines(line: str) -> list[str]:
    """Files that list quarantined samples, which later snapshots leave out."""
    return sorted(str(file.relative_to(ROOT)) for file in line_folder(line).glob("*/quarantine*.jsonl"))
