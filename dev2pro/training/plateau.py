"""Whether more steps would still gain much: extrapolates the held-out loss from its curve so far. Pure functions of that curve.

A loss falls over the steps s like a + b s^-c (Hestness et al. 2017, https://arxiv.org/abs/1712.00409) or a + b exp(-s / d). Every such shape that
the curve does not rule out is asked what the remaining steps would gain, and the largest answer counts: a curve that is still falling, or too
noisy to tell, is no plateau.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 6  # points of a fit, which has three unknowns
TRANSIENT = 0.25  # of the steps so far that a fit leaves out, in which the loss falls first and the average follows
SURE = 3.0  # standard errors; not two, because the errors of neighbouring points are alike (docs/recovery.md)
POWERS = [0.02 * 1.35**n for n in range(18)]  # c from 0.02, next to a logarithm, to 3.3
DECAYS = [0.05 * 1.35**n for n in range(16)]  # d from 0.05 to 4.5 of the steps so far
SHAPES: list[Callable[[float], float]] = [  # of s / steps so far; 1 there
    *(lambda x, c=c: x**-c for c in POWERS),  # type: ignore[misc]
    *(lambda x, d=d: math.exp((1 - x) / d) for d in DECAYS),  # type: ignore[misc]
]


@dataclass(frozen=True)
class Outlook:
    """`gained`: by how much the held-out loss has fallen; `could_gain`: the most that the remaining steps promise."""

    gained: float
    could_gain: float


def outlook(curve: Sequence[dict[str, Any]], steps: int) -> Outlook | None:
    """What a run of `steps` has gained at the last point of its curve, and could gain; None while there are too few points to tell."""
    now = curve[-1]["step"]
    points = [(point["step"] / now, point["loss"]) for point in curve if point["step"] > TRANSIENT * now]
    if len(points) < LEAST:
        return None
    fits = [_fit(shape, points, steps / now) for shape in SHAPES]
    variance = min(fit[0] for fit in fits) / (len(points) - 3)
    plausible = [fit for fit in fits if fit[0] <= (len(points) - 3 + SURE**2) * variance]
    most = max(gain + SURE * math.sqrt(variance) * leverage for _, gain, leverage in plausible)
    return Outlook(curve[0]["loss"] - curve[-1]["loss"], max(0.0, most))


def _fit(shape: Callable[[float], float], points: Sequence[tuple[float, float]], end: float) -> tuple[float, float, float]:
    """Least squares of a + b shape(x): (sum of squared residuals, gain from x = 1 to `end`, its standard error for residuals of variance 1)."""
    values = [(shape(x), y) for x, y in points]
    mean_f, mean_y = (sum(column) / len(values) for column in zip(*values, strict=True))
    spread = sum((f - mean_f) ** 2 for f, _ in values)
    b = sum((f - mean_f) * (y - mean_y) for f, y in values) / spread
    residual = sum((y - mean_y - b * (f - mean_f)) ** 2 for f, y in values)
    ahead = shape(1.0) - shape(end)
    return residual, b * ahead, abs(ahead) / math.sqrt(spread)


def reached(curve: Sequence[dict[str, Any]], steps: int, share: float | None) -> bool:
    """Whether the last two points of the curve say that the remaining steps could gain less than `share` of what was gained; never if it is None.

    Two, because the errors of neighbouring points are alike, so that few of them can lie on a line by chance.
    """
    if share is None:
        return False
    found = [outlook(curve[:end], steps) for end in (len(curve) - 1, len(curve)) if end]
    return len(found) == 2 and all(one is not None and one.could_gain < share * one.gained for one in found)
