"""Stops a diverging training before the optimizer step: non-finite loss or gradient, loss spikes, rising held-out loss."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from dev2pro.errors import DivergedError

WINDOW, MIN_LOSSES = 100, 20  # recent losses for the spike's median, and the least number of them
CURE = "Nothing was saved over the last checkpoint. Lower optim.lr, lengthen optim.warmup or look at the data, and choose another out=."


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    """Divergence thresholds; 0 disables a check."""

    spike: float = 0.0  # times the median loss of the last hundred steps
    collapse: float = 0.0  # times the lowest held-out loss so far


class DivergenceGuard:
    """`recent`: the last losses, oldest first; part of a checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config, self.recent = config, list[float]()

    def check_step(self, step: int, loss: float, norm: float) -> None:
        """Checks a step's loss and gradient norm before the optimizer step. Raises DivergedError."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"The loss ({loss}) or the gradient ({norm}) of step {step} is not finite. {CURE}")
        if self.config.spike and len(self.recent) >= MIN_LOSSES and loss > self.config.spike * (usual := statistics.median(self.recent)):
            raise DivergedError(
                f"The loss of step {step} leapt to {loss:.4g}, more than guard.spike={self.config.spike:g} times the usual {usual:.4g}. {CURE}"
            )
        self.recent = [*self.recent[1 - WINDOW :], loss]

    def held_out(self, curve: list[dict[str, Any]]) -> None:
        """Checks the newest point of the held-out curve. Raises DivergedError."""
        lowest, last = min(point["loss"] for point in curve), curve[-1]
        if not math.isfinite(last["loss"]):
            raise DivergedError(f"The held-out loss of step {last['step']} is not finite. {CURE}")
        if self.config.collapse and last["loss"] > self.config.collapse * lowest:
            raise DivergedError(
                f"The held-out loss rose to {last['loss']:.4g} at step {last['step']}, more than guard.collapse={self.config.collapse:g} times the "
                f"lowest, {lowest:.4g}. {CURE}"
            )
