"""Bootstrap confidence intervals of metrics and of paired differences, and what is left of them after many comparisons."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from torch import Tensor

LEVEL = 0.95


class Bootstrap:
    """Resamples, with replacement, each of the things that results vary over: prompts, seeds and styles; the same draws for every cell.

    Intervals of cells, and of their paired differences, for prompts, seeds and styles like these, not for these alone: Owen and Eckles 2012
    (https://arxiv.org/abs/1106.2125). Of n, n - 1 are drawn, which makes the variance right where n is small: Rao and Wu 1988.
    """

    def __init__(self, sizes: Sequence[int], draws: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [rng.multinomial(m := max(n - 1, 1), [1 / n] * n, size=draws) / m for n in sizes]

    def interval(self, values: Tensor) -> dict[str, float]:
        """mean, low and high (95 %) of the mean of values (*sizes), or of paired differences."""
        table, means = values.double().numpy(), self._means(values)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return {"mean": float(table.mean()), "low": float(low), "high": float(high)}

    def p_value(self, values: Tensor) -> float:
        """The two-sided p-value of a mean paired difference of 0, at least one by the number of draws."""
        means = self._means(values)
        return float(max(min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean())), 1 / len(means)))

    def _means(self, values: Tensor) -> np.ndarray:
        means = np.tensordot(self.weights[0], values.double().numpy(), 1)  # (draws, *sizes[1:])
        for weights in self.weights[1:]:
            means = np.einsum("bn,bn...->b...", weights, means)
        return means


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of many: their chance of any false finding is what one alone would have; Holm 1979."""
    adjusted, highest = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def repetitions_needed(interval: dict[str, float], repetitions: int, comparisons: int = 1) -> int:
    """About how many repetitions would keep 0 out of an interval of this mean that is as wide as the first of so many comparisons needs it.

    The width falls with the square root of the repetitions.
    """
    wider = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / comparisons) / NormalDist().inv_cdf(1 - (1 - LEVEL) / 2)
    half = wider * (interval["high"] - interval["low"]) / 2
    return max(repetitions + 1, math.ceil(repetitions * (half / interval["mean"]) ** 2)) if interval["mean"] else 0
