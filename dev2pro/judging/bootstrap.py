"""Bootstrap confidence intervals of metrics and of paired differences."""

import numpy as np
from torch import Tensor

LEVEL = 0.95


class Bootstrap:
    """Resamples prompts and seeds with replacement, the same draws for every cell: intervals of cells and of their differences.

    Two-way bootstrap: Owen and Eckles 2012 (https://arxiv.org/abs/1106.2125).
    """

    def __init__(self, prompts: int, repetitions: int, draws: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.of_prompts, self.of_seeds = (rng.multinomial(n, [1 / n] * n, size=draws) / n for n in (prompts, repetitions))

    def interval(self, values: Tensor) -> dict[str, float]:
        """mean, low and high (95 %) of the mean of values (P, R), or of paired differences (P, R)."""
        table = values.double().numpy()
        means = np.einsum("bp,pr,br->b", self.of_prompts, table, self.of_seeds)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return {"mean": float(table.mean()), "low": float(low), "high": float(high)}
