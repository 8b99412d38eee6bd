"""Held-out losses at fixed noise and fixed timesteps, so that they differ between checkpoints only by the weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dev2pro import draws
from dev2pro.models import flow_matching
from dev2pro.models.encodings import EncodedBatch
from dev2pro.models.flux1 import Conditioning, build_conditioning, predict

PURPOSE = "probe"


@dataclass(slots=True, kw_only=True)
class ProbeConfig:
    """How often and how finely to measure; see conf/."""

    every: int  # steps
    samples: int  # held-out pictures
    bins: int  # timesteps for each of them


class HeldoutProbe:
    """Measures transformers on the first held-out pictures at fixed times, the quantiles of the training distribution.

    The mean over bins therefore estimates the training loss on held-out pictures; the bins show how it depends on the time.
    """

    def __init__(self, data: EncodedBatch, config: ProbeConfig, *, scheduler: dict, seed: int, batch: int) -> None:
        rows = range(min(config.samples, len(data)))
        self.data, self.batch, self.bins, self.count = data, batch, config.bins, len(rows)
        quantiles = torch.special.ndtri((torch.arange(config.bins) + 0.5) / config.bins)
        self.times = flow_matching.training_timesteps(quantiles, flow_matching.shift_mu(data.mean.shape[1], scheduler))
        self.x0 = data.mean[: self.count]
        self.noise = draws.normal(seed, PURPOSE, 0, rows, self.x0.shape[1:]).to(self.x0)
        self._teacher: list[Tensor] | None = None

    @torch.no_grad()
    def set_teacher(self, teacher: torch.nn.Module) -> None:
        """Stores the teacher's predictions at guidance 1; `measure` then also reports the distance to them."""
        self._teacher = [v for _, v in self._predictions(teacher, 1.0)]

    @torch.no_grad()
    def measure(self, transformer: torch.nn.Module, guidance: float, usual_guidance: float) -> dict[str, float | list[float]]:
        """Mean squared errors of the predicted velocity, over samples, tokens and channels.

        loss, loss_by_time: against the flow-matching target, at `guidance`. loss_usual: the same at `usual_guidance`.
        guidance_gap: between the predictions at the two guidances (0: the input has no effect).
        teacher_distance: between the predictions at `guidance` and the teacher's at 1, if a teacher is set.
        """
        target = flow_matching.velocity(self.x0, self.noise)
        by_time = torch.zeros(self.bins)
        usual, gap, teacher = 0.0, 0.0, 0.0
        for i, ((rows, v), (_, w)) in enumerate(
            zip(self._predictions(transformer, guidance), self._predictions(transformer, usual_guidance), strict=True)
        ):
            weight = len(v) / (self.count * self.bins)
            by_time[self._bin(i)] += _mse(v, target[rows]) * len(v) / self.count
            usual += _mse(w, target[rows]) * weight
            gap += _mse(v, w) * weight
            if self._teacher:
                teacher += _mse(v, self._teacher[i]) * weight
        metrics: dict[str, float | list[float]] = {
            "loss": by_time.mean().item(),
            "loss_by_time": [round(x, 6) for x in by_time.tolist()],
            "loss_usual": usual,
            "guidance_gap": gap,
        }
        return {**metrics, "teacher_distance": teacher} if self._teacher else metrics

    def _bin(self, chunk: int) -> int:
        return chunk // -(-self.count // self.batch)

    def _predictions(self, transformer: torch.nn.Module, guidance: float) -> Iterator[tuple[slice, Tensor]]:
        for t in self.times:
            for first in range(0, self.count, self.batch):
                rows = slice(first, min(first + self.batch, self.count))
                times = t.expand(rows.stop - rows.start).to(self.x0)
                x_t = flow_matching.interpolate(self.x0[rows], self.noise[rows], times)
                yield rows, predict(transformer, x_t, times, self._conditioning(rows), guidance)

    def _conditioning(self, rows: slice) -> Conditioning:
        return build_conditioning(self.data.prompt[rows], self.data.pooled[rows], self.data.grid)


def _mse(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).square().mean().item()
