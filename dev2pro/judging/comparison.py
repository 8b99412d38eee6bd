"""Compares evaluated cells: confidence intervals, paired gains over the baselines, and the verdict."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dev2pro.judging.bootstrap import Bootstrap

TRAINED_ON_RECOVERED = "the LoRA trained on the recovered model"
LOWER_IS_BETTER = ("distance_to_ideal", "memorisation")


@dataclass(frozen=True)
class Cell:
    """An arm's LoRA on an inference base: `values` by metric, (P, R) each; `thumbnails` are pictures [seed][prompt]."""

    style: str
    arm: str
    inference: str
    guidance: float
    cfg_scale: float
    values: dict[str, Tensor]
    kid: float
    thumbnails: list[list[Image.Image]] = field(default_factory=list)


def compare(cells: list[Cell], kinds: dict[str, str], draws: int, seed: int) -> dict[str, Any]:
    """styles, arms, inference, cells with 95% intervals, gains of the recovered arms over the base's arms, and a verdict.

    `kinds`: arm -> what it was made of (recovered, base or teacher). A gain is a paired difference on the inference base
    "base", signed so that more is better; style None is the mean over styles.
    """
    bootstrap = Bootstrap(cells[0].values["prompt_fidelity"].shape, draws, seed)
    gains = [
        {"style": style, "arm": arm, "rival": rival, "inference": "base", "metric": metric, **bootstrap.interval(difference)}
        for arm in (a for a, kind in kinds.items() if kind == "recovered")
        for rival in (a for a, kind in kinds.items() if kind == "base")
        for metric in _metrics(cells)
        for style, difference in _differences(cells, arm, rival, metric).items()
    ]
    return {
        "styles": list(dict.fromkeys(c.style for c in cells)),
        "arms": list(kinds),
        "inference": list(dict.fromkeys(c.inference for c in cells if c.inference != "teacher")),
        "cells": [_row(c, bootstrap) for c in cells],
        "gains": gains,
        "verdict": verdict(gains),
    }


def write_pictures(path: Path, cells: Sequence[Cell], meaning: Sequence[int]) -> None:
    """Every number of every picture as CSV, a row each; `meaning` numbers what each prompt means, as the same in other words has one number."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["style", "arm", "inference", "guidance", "cfg_scale", "prompt", "meaning", "seed", *_metrics(cells)])
        for c in cells:
            settings = [c.style, c.arm, c.inference, c.guidance, c.cfg_scale]
            for prompt, means in enumerate(meaning):
                for seed in range(c.values["prompt_fidelity"].shape[1]):
                    numbers = [f"{c.values[name][prompt, seed].item():.6g}" if name in c.values else "" for name in _metrics(cells)]
                    rows.writerow([*settings, prompt, means, seed, *numbers])


def _metrics(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(name for c in cells for name in c.values))


def _row(cell: Cell, bootstrap: Bootstrap) -> dict[str, Any]:
    settings = {"style": cell.style, "arm": cell.arm, "inference": cell.inference, "guidance": cell.guidance, "cfg_scale": cell.cfg_scale}
    return {**settings, **{name: bootstrap.interval(v) for name, v in cell.values.items()}, "kid": {"mean": cell.kid}}


def _differences(cells: list[Cell], arm: str, rival: str, metric: str) -> dict[str | None, Tensor]:
    """style -> paired differences (P, R), for the styles that have both arms; None -> their mean."""
    on_base = {(c.style, c.arm): c.values[metric] for c in cells if c.inference == "base" and metric in c.values}
    styles = [style for style, a in on_base if a == arm and (style, rival) in on_base]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    differences: dict[str | None, Tensor] = {style: sign * (on_base[style, arm] - on_base[style, rival]) for style in styles}
    return differences | {None: torch.stack(list(differences.values())).mean(0)} if differences else {}


def verdict(gains: list[dict[str, Any]]) -> str:
    """One sentence on prompt fidelity: the best arm's gain over its nearest rival, and in which styles it is clear."""
    fidelity = [g for g in gains if g["metric"] == "prompt_fidelity"]
    if not fidelity:
        return "Nothing to compare: this needs a LoRA trained on the recovered model and one trained on the base, in the same style."
    arms = list(dict.fromkeys(g["arm"] for g in fidelity))
    nearest = {arm: min((g for g in fidelity if g["style"] is None and g["arm"] == arm), key=lambda g: g["mean"]) for arm in arms}
    overall = max(nearest.values(), key=lambda g: g["mean"])
    fidelity = [g for g in fidelity if g["arm"] == overall["arm"]]
    by_style: dict[str, list[dict[str, Any]]] = {}
    for gain in fidelity:
        if gain["style"] is not None:
            by_style.setdefault(gain["style"], []).append(gain)
    better = [s for s, style_gains in by_style.items() if all(g["low"] > 0 for g in style_gains)]
    worse = [s for s, style_gains in by_style.items() if any(g["high"] < 0 for g in style_gains)]
    word, points = "more" if overall["mean"] >= 0 else "less", f"{abs(100 * overall['mean']):.0f}"
    subject = f"the LoRA {overall['arm']}, the best of {len(arms)} that need the recovered model," if len(arms) > 1 else TRAINED_ON_RECOVERED
    return (
        f"Applied to the base, {subject} obeys the prompt {points} point{'s' * (points != '1')} {word} often than "
        f"{overall['rival']}, its nearest rival (95% interval {100 * overall['low']:.0f} to {100 * overall['high']:.0f}, mean over styles): "
        f"clearly better in {_names(better, by_style)}, clearly worse in {_names(worse, by_style)}."
    )


def _names(styles: list[str], by_style: dict[str, Any]) -> str:
    return f"{len(styles)} of {len(by_style)} styles" + (f" ({', '.join(styles)})" if styles else "")
