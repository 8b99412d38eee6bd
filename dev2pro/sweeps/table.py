"""One table of a sweep: the swept values, then the main numbers of each job's artifact, the best first."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from dev2pro.escape import printable

FILE = "sweep.csv"
HIGHER_IS_BETTER = ("prompt_fidelity",)
ON_BASE = ("prompt_fidelity", "distance_to_ideal", "style_similarity", "clip_score", "diversity", "kid")


@dataclass(frozen=True)
class Row:
    """A job: its swept values, the folder of its artifact, and its exit code; None before it was run."""

    values: dict[str, str]
    out: str
    exit_code: int | None


def results(row: Row, stage: str) -> dict[str, float]:
    """The main numbers of a job's artifact, name -> number, the most telling first; none of a job that failed or is not finished."""
    artifact = None if row.exit_code else record.read_if_artifact(row.out)
    if artifact is None or artifact.stage != stage or stage not in RESULTS:
        return {}
    return {name: value for name, value in RESULTS[stage](artifact).items() if value is not None}


def _training(artifact: Artifact) -> dict[str, Any]:
    """The last point of the curve; what recovery closed of the distance to the teacher, where that is known."""
    last = artifact.metrics["curve"][-1]
    shared = {"held_out_loss": last["loss"], "teacher_distance": last.get("teacher_distance"), "recovered": artifact.metrics.get("recovered")}
    return {**shared, "steps_per_second": artifact.metrics.get("steps_per_second")}


def _evaluation(artifact: Artifact) -> dict[str, Any]:
    """Means over the LoRAs and styles, applied to the base."""
    cells = [cell for cell in _json(artifact, "metrics.json")["cells"] if cell["inference"] == "base" and cell["arm"] != "none"]
    named = {name: [cell[name]["mean"] for cell in cells if name in cell] for name in ON_BASE}
    return {name: sum(means) / len(means) for name, means in named.items() if means}


def _diagnosis(artifact: Artifact) -> dict[str, Any]:
    base = _json(artifact, "diagnosis.json")["found"][0]
    return {name: base.get(name) for name in ("loss", "loss_usual", "response", "acts_like")}


def _json(artifact: Artifact, name: str) -> dict[str, Any]:
    return json.loads((Path(artifact.uri) / name).read_text())


RESULTS: dict[str, Callable[[Artifact], dict[str, Any]]] = {
    "recover": _training,
    "lora": _training,
    "distill": _training,
    "evaluate": _evaluation,
    "diagnose": _diagnosis,
    "extract": lambda artifact: {"lost_mean": artifact.metrics["lost_mean"]},
    "tune": lambda artifact: artifact.metrics["chosen"],
    "encode": lambda artifact: {"samples": artifact.metrics["samples"]},
    "draw": lambda artifact: {"pictures": artifact.metrics["pictures"]},
}


def table(rows: Sequence[Row], stage: str) -> list[dict[str, Any]]:
    """The rows as columns -> cells: swept values, results, exit_code, out. Sorted by the first result, jobs without one last."""
    found = [results(row, stage) for row in rows]
    names = list(dict.fromkeys(name for one in found for name in one))
    cells = [
        {**row.values, **{name: one.get(name, "") for name in names}, "exit_code": "" if row.exit_code is None else row.exit_code, "out": row.out}
        for row, one in zip(rows, found, strict=True)
    ]
    first = names[0] if names else "exit_code"
    sign = -1 if first in HIGHER_IS_BETTER else 1
    return sorted(cells, key=lambda row: (row[first] == "", sign * row[first] if row[first] != "" else 0))


def write(folder: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes sweep.csv under another name and renames it."""
    partial = Path(folder, f"{FILE}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    partial.rename(Path(folder, FILE))


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table in columns, without the folders."""
    names = [name for name in rows[0] if name != "out"]
    lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
