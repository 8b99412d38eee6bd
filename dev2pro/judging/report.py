"""The report of an evaluation: one HTML file that needs nothing else.

Plots are HTML and hand-made SVG in the page's own colours and letters, so they read in light and dark, on paper and on a phone.
Names and prompts are untrusted: the template escapes them, and the page forbids itself scripts and network.
"""

import math
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dev2pro import page
from dev2pro.judging.cells import TUNED
from dev2pro.page import number

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")
LARGEST, SMALLEST = 160, 56  # pixels of a picture's longer side in the page
PLOT = {"width": 360, "height": 200, "left": 46, "right": 14, "top": 22, "bottom": 30}  # of the recovery's charts, in SVG units


@dataclass(frozen=True)
class Grid:
    """The pictures of one style and seed: `rows` are (cell label such as "recovered@1 on base", one picture per prompt)."""

    style: str
    seed: int
    prompts: list[str]
    rows: list[tuple[str, list[Image.Image]]]
    sampled: list[str] = field(default_factory=list)  # how the pictures of each row were sampled


@dataclass(frozen=True)
class Metric:
    """How a number of the evaluation is shown and read; `sign` is 1 where more is better, -1 where less is."""

    key: str
    name: str
    sign: int
    digits: int
    scale: float = 1.0
    unit: str = ""
    gain_unit: str = ""


METRICS = (  # the template has a sentence on each
    Metric("prompt_fidelity", "Prompt fidelity", 1, 1, 100, "%", "percentage points"),
    Metric("style_similarity", "Style similarity", 1, 3),
    Metric("distance_to_ideal", "Distance to the ideal", -1, 3),
    Metric("clip_score", "CLIP score", 1, 1),
    Metric("kid", "Kernel inception distance", -1, 4),
    Metric("diversity", "Diversity", 1, 3),
    Metric("memorisation", "Memorisation", -1, 3),
)
LOSSES = {  # arms that are named after theirs
    "cfg_augmented": "the CFG-augmented loss", "guidance": "the guidance loss", "model_guidance": "the recovered model's guidance in its target",
}  # fmt: skip
GAINS = METRICS[:3]  # the ones whose gains are drawn


def write(path: pathlib.Path, metrics: dict[str, Any], grids: list[Grid]) -> None:
    """Writes the report of an evaluation's metrics (the contents of metrics.json) and its pictures as one HTML file.

    `gains` are read as signed so that more is better, distances too. Without a teacher or a recovery their parts are left out.
    """
    matrices = [m for metric in METRICS if (m := _matrix(metrics, metric))["blocks"]]
    html = page.render(
        TEMPLATE,
        number=number,
        interval=interval,
        picture=lambda image: page.picture(image, LARGEST, SMALLEST),
        arm_of=_arm,
        verdict=metrics["verdict"],
        judged_by=metrics.get("judged_by", {}),
        settings=metrics["settings"],
        styles=metrics["styles"],
        arms=sorted(metrics["arms"], key=_is_reference),
        subjects={g["arm"] for g in metrics["gains"]},
        models=_inference_models(metrics),
        references=any(map(_is_reference, [*metrics["arms"], *(c["arm"] for c in metrics["cells"])])),
        matrices=matrices,
        forests=[f for metric in GAINS if (f := _forest(metrics, metric))["groups"]],
        recovery=metrics.get("recovery"),
        charts=_charts(metrics["recovery"]) if metrics.get("recovery") else [],
        gallery={style: [g for g in grids if g.style == style] for style in dict.fromkeys(g.style for g in grids)},
        plot=PLOT,
        fresh={style: score for style, score in metrics.get("memorisation_of_heldout", {}).items() if score is not None},
    )
    path.write_text(html, "utf-8", newline="\n")


def interval(score: dict[str, float] | None, metric: Metric, digits: int | None = None) -> str:
    """Formats the 95 % interval; empty if there is none."""
    if not score or "low" not in score:
        return ""
    return " to ".join(number(score[end] * metric.scale, metric.digits if digits is None else digits) for end in ("low", "high"))


# ---- arms and the models they are applied to ------------------------------------------------------------------------------------


def _is_reference(arm: str) -> bool:
    """Whether this arm is unavailable for FLUX.1-dev, because it needs the teacher."""
    return arm == "ideal" or arm.startswith("teacher@")


def _model(name: str) -> str:
    return f"the {name} model" if name == "recovered" else f"the {name}"


def _arm(name: str) -> dict[str, Any]:
    """An arm's name, a description of its training, and whether it is a reference."""
    model, at, guidance = name.removesuffix(TUNED).rpartition("@")
    trained_on, loss = ("base", f" with {LOSSES[model]}") if model in LOSSES else (model, "")
    description = f"trained on {_model(trained_on)} at guidance {guidance}{loss}" if at else ""
    if name.endswith(TUNED):
        description = f"{description}{', ' * bool(description)}used as stages.tune chose"
    return {"name": name, "description": description, "reference": _is_reference(name)}


def _inference_models(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The models LoRAs were applied to, in order, with a description of their sampling."""
    first: dict[str, dict[str, Any]] = {}
    for cell in metrics["cells"]:
        first.setdefault(cell["inference"], cell)
    models = []
    for name in [n for n in dict.fromkeys([*metrics["inference"], *first]) if n in first]:
        cfg = f", true CFG {first[name]['cfg_scale']:g}" if first[name]["cfg_scale"] != 1 else ""
        models.append({"name": name, "title": _model(name), "sampled": f"guidance {first[name]['guidance']:g}{cfg}"})
    return models


# ---- the tables of numbers ------------------------------------------------------------------------------------------------------


def _matrix(metrics: dict[str, Any], metric: Metric) -> dict[str, Any]:
    """One metric: a block per model applied to, a row per arm, a value per style, the best arm of a block and style marked."""
    values = {(c["inference"], c["arm"], c["style"]): c[metric.key] for c in metrics["cells"] if metric.key in c}
    arms = ["none", *sorted(metrics["arms"], key=_is_reference), "ideal"]
    blocks = []
    for model in _inference_models(metrics):
        rows = [
            {"arm": arm, "values": [*scores, *([_mean(scores)] if len(scores) > 1 else [])]}
            for arm in arms
            if any(scores := [values.get((model["name"], arm, style)) for style in metrics["styles"]])
        ]
        if rows:
            best = [_best([(row["arm"], row["values"][i]) for row in rows], metric) for i in range(len(rows[0]["values"]))]
            blocks.append({**model, "rows": rows, "best": best})
    return {"metric": metric, "blocks": blocks}


def _mean(scores: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """The mean over styles; the mean of the intervals' ends is its interval if the styles err together, and too wide if not."""
    present = [f for f in scores if f]
    return {key: sum(f[key] for f in present) / len(present) for key in present[0]} if len(present) == len(scores) else None


def _best(column: Iterable[tuple[str, dict[str, float] | None]], metric: Metric) -> set[str]:
    """The arms with the best mean as printed, several if they tie; "none" and references do not compete."""
    means = {arm: round(v["mean"] * metric.scale, metric.digits) for arm, v in column if v and arm != "none" and not _is_reference(arm)}
    top = max((metric.sign * m for m in means.values()), default=0)
    return {arm for arm, mean in means.items() if metric.sign * mean == top} if len(means) > 1 else set()


# ---- the forest plot ------------------------------------------------------------------------------------------------------------


def _forest(metrics: dict[str, Any], metric: Metric) -> dict[str, Any]:
    """The gains in one metric: groups (arm against rival) of rows, with every x in per cent of the plot's width."""
    gains = [g for g in metrics["gains"] if g["metric"] == metric.key and (g["style"] is not None or len(metrics["styles"]) > 1)]
    ends = [g[end] * metric.scale for g in gains for end in ("low", "high")] + [0.0]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - margin, max(ends) + margin

    def x(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for gain in sorted(gains, key=lambda g: g["style"] is None):
        proof = "gain" if gain["low"] > 0 else "loss" if gain["high"] < 0 else "unsure"
        at = {key: x(gain[key] * metric.scale) for key in ("mean", "low", "high")}
        groups.setdefault((gain["arm"], gain["rival"]), []).append({**gain, "proof": proof, "x": at})
    ticks = [(x(tick), label) for tick, label in _ticks(low, high, 5)]
    return {"metric": metric, "groups": groups, "ticks": ticks, "zero": x(0)}


def _ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """About `wanted` round numbers between two, with their labels."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * wanted >= high - low)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, number(i * step, digits)) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---- the recovery's charts ------------------------------------------------------------------------------------------------------


def _charts(recovery: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss, guidance gap and distance to the teacher over steps, and the loss by time before and after."""
    curve = recovery["curve"]

    def over_steps(key: str) -> list[tuple[float, float]]:
        return [(point["step"], point[key]) for point in curve if point.get(key) is not None]

    loss = f"at guidance {recovery['guidance']:g}"
    charts = [
        _chart("Loss on held-out pictures", "step", {loss: over_steps("loss"), "at the usual guidance": over_steps("loss_usual")}),
        _chart("Guidance gap", "step", {"": over_steps("guidance_gap")}, log=True),
        _chart("Distance to the teacher", "step", {"": over_steps("teacher_distance")}, log=True),
        _chart("Loss by time", "", {name: list(enumerate(point.get("loss_by_time") or [], 1))
               for name, point in (("after", curve[-1]), ("before", curve[0]))}),
    ]  # fmt: skip
    return [chart for chart in charts if chart]


def _chart(title: str, axis: str, lines: dict[str, list[tuple[float, float]]], log: bool = False) -> dict[str, Any] | None:
    """Lines in SVG units, ticks and a description; None without at least two points. The first line is the main one."""
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    xs, ys = ([point[i] for points in lines.values() for point in points] for i in (0, 1))
    log = log and min(ys) > 0 and max(ys) > 5 * min(ys)
    bottom, top = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(0.0, *ys), max(ys))
    top += 0.04 * (top - bottom) or 1.0
    bottom -= 0.06 * (top - bottom) if log else 0
    right, floor = PLOT["width"] - PLOT["right"], PLOT["height"] - PLOT["bottom"]

    def x(value: float) -> float:
        return round(PLOT["left"] + (value - min(xs)) / (max(xs) - min(xs)) * (right - PLOT["left"]), 1)

    def y(value: float) -> float:
        return round(floor - ((math.log10(value) if log else value) - bottom) / (top - bottom) * (floor - PLOT["top"]), 1)

    drawn = [{"name": n, "at": [(x(a), y(b)) for a, b in p], "first": f"{p[0][1]:.3g}", "last": f"{p[-1][1]:.3g}"} for n, p in lines.items()]
    ends = [(x(min(xs)), "little noise", "start"), (x(max(xs)), "much noise", "end")]
    return {
        "title": title,
        "axis": axis,
        "log": log,
        "lines": drawn,
        "description": "; ".join(f"{line['name'] or title} goes from {line['first']} to {line['last']}" for line in drawn),
        "y": [(y(tick), label) for tick, label in (_log_ticks(bottom, top) if log else _ticks(bottom, top, 4))],
        "x": [(x(tick), label, "middle") for tick, label in _ticks(min(xs), max(xs), 4)] if axis else ends,
    }


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """The powers of ten between two exponents, with 2 and 5 between them if there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    choices = [[m * 10.0**e for e in powers for m in inner if low <= math.log10(m * 10.0**e) <= high] for inner in ((1,), (1, 3), (1, 2, 5))]
    ticks = next((choice for choice in choices if len(choice) >= 3), choices[-1])
    return [(tick, f"{tick:g}") for tick in ticks]
