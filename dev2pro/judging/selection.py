"""Chooses how a LoRA is used, among measured points: one score, a guard against collapse, and a default that only a shown gain displaces."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dev2pro.judging.bootstrap import LEVEL, Bootstrap, holm

METRICS = ("prompt_fidelity", "style_similarity", "diversity", "clip_score")
Values = Mapping[str, Tensor]  # metric -> (P, R), as from `metrics.measure`


@dataclass(frozen=True)
class Point:
    """One way to use a LoRA: that of a step, at a strength, on the base at a guidance."""

    step: int
    strength: float
    guidance: float

    def __str__(self) -> str:
        return f"step {self.step} at strength {self.strength:g} and guidance {self.guidance:g}"

    def distance(self, other: "Point") -> float:
        """How far two points are apart: the differences of step and guidance are relative to the other's."""
        parts = (self.step - other.step) / max(other.step, 1), self.strength - other.strength, (self.guidance - other.guidance) / other.guidance
        return round(sum(map(abs, parts)), 9)


@dataclass(frozen=True)
class Reference:
    """Style similarity and diversity of the base without a LoRA, and the held-out pictures' similarity to each other."""

    style_similarity: float
    diversity: float
    heldout_similarity: float

    @property
    def sees_style(self) -> bool:
        """Whether the judge finds the held-out pictures more alike than the base's are to them, so that style can be measured."""
        return self.heldout_similarity > self.style_similarity


@dataclass(frozen=True)
class Choice:
    """The chosen point, or None if all have collapsed; a row of numbers for each point; the reasons in words."""

    point: Point | None
    rows: list[dict[str, Any]]
    words: list[str]


def score(values: Values, reference: Reference) -> Tensor:
    """How much of the style each picture has, where one that does not show what its prompt asks counts nothing: (P, R), 0 to 1.

    The style is 0 where a picture is as similar to the held-out ones as the base's without the LoRA are, and 1 where it is as similar as they
    are to each other: more would be no more style, but pictures that are all alike. A product, so that neither fidelity nor style makes up for a
    lack of the other; picture by picture, so that differences are paired. Where the judge does not see the style, it is the fidelity alone.
    """
    if not reference.sees_style:
        return values["prompt_fidelity"]
    style = (values["style_similarity"] - reference.style_similarity) / (reference.heldout_similarity - reference.style_similarity)
    return values["prompt_fidelity"] * style.clamp(0, 1)


def collapse(points: Mapping[Point, Values], reference: Reference, share: float) -> dict[Point, str]:
    """Why each collapsed point is one: less than `share` of the diversity of the base without a LoRA, or of the best point's fidelity."""
    best, found = max(_mean(values, "prompt_fidelity") for values in points.values()), dict[Point, str]()
    for point, values in points.items():
        fidelity, diversity = _mean(values, "prompt_fidelity"), _mean(values, "diversity")
        if fidelity < share * best:
            found[point] = f"its prompt fidelity of {fidelity:.1%} is less than {share:g} of the best point's {best:.1%}"
        if diversity < share * reference.diversity:
            found[point] = f"its diversity of {diversity:.3f} is less than {share:g} of the {reference.diversity:.3f} of the base without a LoRA"
    return found


def choose(points: Mapping[Point, Values], default: Point, reference: Reference, bootstrap: Bootstrap, share: float) -> Choice:
    """The default, unless another point is shown to be better; of those that are, the nearest to it that the best is not shown to surpass.

    Shown: the paired difference of scores has a p-value below 1 - LEVEL after Holm's adjustment for the number of points. Collapsed points are
    never chosen.
    """
    scores, collapsed = {point: score(values, reference) for point, values in points.items()}, collapse(points, reference, share)
    p_values = _p_values(scores, default, [point for point in points if point != default], bootstrap)
    rows = [_row(point, points[point], scores, default, bootstrap, p_values, collapsed.get(point, "")) for point in points]
    means = {point: scores[point].mean().item() for point in points if point not in collapsed}
    better = [point for point in means if default in collapsed or (point in p_values and means[point] > means[default] and _shown(p_values[point]))]
    chosen = _nearest(scores, means, better, default, bootstrap) if better else None if default in collapsed else default
    for row, point in zip(rows, points, strict=True):
        row["chosen"] = point == chosen
    return Choice(chosen, rows, _words(rows, chosen, default, means, collapsed))


def _nearest(scores: Mapping[Point, Tensor], means: Mapping[Point, float], among: Sequence[Point], default: Point, bootstrap: Bootstrap) -> Point:
    """Of the best point and those that it is not shown to surpass, the nearest to the default."""
    best = max(among, key=means.__getitem__)
    surpassed = _p_values(scores, best, [point for point in among if point != best], bootstrap)
    ties = [point for point in among if point == best or not _shown(surpassed[point])]
    return min(ties, key=lambda point: (point.distance(default), -means[point]))


def _p_values(scores: Mapping[Point, Tensor], against: Point, points: Sequence[Point], bootstrap: Bootstrap) -> dict[Point, float]:
    adjusted = holm([bootstrap.p_value(scores[point] - scores[against]) for point in points])
    return dict(zip(points, adjusted, strict=True))


def _shown(p_value: float) -> bool:
    return p_value < 1 - LEVEL


def _mean(values: Values, metric: str) -> float:
    return values[metric].mean().item()


def _row(
    point: Point, values: Values, scores: Mapping[Point, Tensor], default: Point, bootstrap: Bootstrap, p_values: Mapping[Point, float], why: str
) -> dict[str, Any]:
    gain = {} if point == default else {**bootstrap.interval(scores[point] - scores[default]), "p": p_values[point]}
    place = {"step": point.step, "strength": point.strength, "guidance": point.guidance}
    measured = {metric: bootstrap.interval(values[metric]) for metric in METRICS if metric in values}
    return {**place, "score": bootstrap.interval(scores[point]), "gain": gain, **measured, "collapsed": why}


def _words(
    rows: list[dict[str, Any]], chosen: Point | None, default: Point, means: Mapping[Point, float], collapsed: Mapping[Point, str]
) -> list[str]:
    of = {Point(row["step"], row["strength"], row["guidance"]): row for row in rows}
    told = [f"Collapsed, and not to be chosen: {'; '.join(f'{point}, {why}' for point, why in collapsed.items())}."] if collapsed else []
    if chosen is None:
        return [*told, f"All {len(rows)} points have collapsed."]
    score, best = f"a score of {means[chosen]:.3f}", max(means, key=means.__getitem__)
    others = f"of {len(rows)} points" if len(rows) > 1 else "the only point"
    if chosen != default:
        gain = "which has collapsed" if default in collapsed else f"which it surpasses by {_interval(of[chosen]['gain'])}"
        tie = f" The highest, {best}, with {means[best]:.3f}, is not shown to be better and is farther from the default."
        return [*told, f"Chosen {others}: {chosen}, with {score}, in place of the default, {default}, {gain}.{tie if best != chosen else ''}"]
    if best == default:
        return [*told, f"The default, {default}, stays, with {score}: {'the highest ' if len(rows) > 1 else ''}{others}."]
    return [*told, f"The default, {default}, stays, with {score}: no other {others} is shown to be better. The highest, {best}, surpasses it by "
                   f"{_interval(of[best]['gain'])}."]  # fmt: skip


def _interval(gain: Mapping[str, float]) -> str:
    p = f"{gain['p']:.2g}" if not math.isclose(gain["p"], 1) else "1"
    return f"{gain['mean']:.3f} (95% interval {gain['low']:.3f} to {gain['high']:.3f}; p {p} among so many)"
