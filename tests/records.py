"""Small artifacts, made as by a stage: claim the folder, write files, write the record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record, run_folder


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1


@dataclass(frozen=True)
class Config:
    """Shaped like a stage's."""

    out: str
    steps: int = 3
    names: list[str] = field(default_factory=lambda: ["a"])
    optim: Optim = Optim()


def make(config: Config, parents: record.Parents, **what: Any) -> record.Artifact:
    """Makes an artifact as a stage does: claim, write files, record."""
    assert run_folder.acquire(config.out, "test", config, parents) is None
    (Path(config.out) / "transformer").mkdir(exist_ok=True)
    (Path(config.out) / "transformer" / "weights.bin").write_bytes(b"weights")
    (Path(config.out) / "metrics.jsonl").write_text(what.pop("rows", '{"step": 1}\n'))
    return record.write(config.out, "test", "thing", config, parents, **{"step": 3, "metrics": {"loss": 0.5}, **what})
