"""The average of the weights over the training: in float32 whatever the weights are in, beside them or in host memory.

A bfloat16 average stands still: at a decay of 0.999 its steps are far below half of a bfloat16's last bit. The decay and its warm-up are those of
diffusers' EMAModel, which keeps the weights' own precision and place.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dev2pro.training.sharding import local_tensor

CHUNK = 1 << 26  # weights that are averaged at one time, to bound what is held besides


class Ema:
    """`average` (float32, one tensor a parameter, sharded as it is) follows the parameters with `decay` a step, in one move every `every` steps.

    `offload` keeps it in host memory. `steps`: optimizer steps so far, part of a checkpoint.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float, *, every: int = 1, offload: bool = False) -> None:
        self.parameters, self.decay, self.every, self.offload, self.steps = list(parameters), decay, every, offload, 0
        self.average = [p.detach().to("cpu" if offload else p.device, torch.float32, copy=True) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Call after every optimizer step."""
        self.steps += 1
        if self.steps % self.every:
            return
        keep = math.prod(self._decay(step) for step in range(self.steps - self.every + 1, self.steps + 1))
        for averages, weights in self._chunks():
            distance = torch._foreach_sub(averages, [w.to(a.device).float() for a, w in zip(averages, weights, strict=True)])
            torch._foreach_mul_(distance, 1 - keep)
            torch._foreach_sub_(averages, distance)

    def _decay(self, step: int) -> float:
        return min(step / (9 + step), self.decay) if step > 1 else 0.0

    def _chunks(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for average, parameter in zip(self.average, self.parameters, strict=True):
            averages.append(local_tensor(average))
            weights.append(local_tensor(parameter.detach()))
            if sum(map(torch.numel, averages)) >= CHUNK:
                yield averages, weights
                averages, weights = [], []
        if averages:
            yield averages, weights

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The parameters hold the average. Their own values wait beside the average; between two steps there is room, as no gradient is held."""
        own = [p.detach().to("cpu" if self.offload else p.device, copy=True) for p in self.parameters]
        _copy(self.average, self.parameters)
        try:
            yield
        finally:
            _copy(own, self.parameters)


def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        local_tensor(target.detach()).copy_(local_tensor(value))
