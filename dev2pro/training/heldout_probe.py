"""Held-out losses at fixed noise and fixed timesteps, so that they differ between checkpoints only by the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dev2pro import draws
from dev2pro.models import flow_matching
from dev2pro.models.encodings import EncodedBatch
from dev2pro.models.flux1 import build_conditioning, predict

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

    A forward pass takes up to `batch` pictures at one time. The ranks take the passes in turn, as many on each, because a sharded model needs
    them all in every one: what is left over in the last round repeats the last pass. Their numbers are added in the order of the passes,
    so that the result does not depend on the number of ranks.
    """

    def __init__(self, data: EncodedBatch, config: ProbeConfig, accelerator: Accelerator, *, scheduler: dict, seed: int, batch: int) -> None:
        rows = range(min(config.samples, len(data)))
        self.data, self.bins, self.count, self.accelerator = data, config.bins, len(rows), accelerator
        quantiles = torch.special.ndtri((torch.arange(config.bins) + 0.5) / config.bins)
        self.times = flow_matching.training_timesteps(quantiles, flow_matching.shift_mu(data.mean.shape[1], scheduler))
        self.x0 = data.mean[: self.count]
        self.noise = draws.normal(seed, PURPOSE, 0, rows, self.x0.shape[1:]).to(self.x0)
        parts = [slice(first, min(first + batch, self.count)) for first in range(0, self.count, batch)]
        self.passes = [(number, part) for number in range(config.bins) for part in parts]  # (bin, rows)
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self._mine = [self.passes[min(first + rank, len(self.passes) - 1)] for first in range(0, len(self.passes), ranks)]
        self._teacher: list[Tensor] | None = None

    @torch.no_grad()
    def set_teacher(self, teacher: torch.nn.Module) -> None:
        """Stores the teacher's predictions at guidance 1; `measure` then also reports the distance to them."""
        self._teacher = list(self.predictions(teacher, 1.0))

    @torch.no_grad()
    def measure(self, transformer: torch.nn.Module, guidance: float, usual_guidance: float) -> dict[str, float | list[float]]:
        """Mean squared errors of the predicted velocity, over samples, tokens and channels.

        loss, loss_by_time: against the flow-matching target, at `guidance`. loss_usual: the same at `usual_guidance`.
        guidance_gap: between the predictions at the two guidances (0: the input has no effect).
        teacher_distance: between the predictions at `guidance` and the teacher's at 1, if a teacher is set.
        """
        by_time = torch.zeros(self.bins)
        usual, gap, teacher = 0.0, 0.0, 0.0
        for (number, rows), errors in zip(self.passes, self._errors(transformer, guidance, usual_guidance), strict=True):
            samples = rows.stop - rows.start
            weight = samples / (self.count * self.bins)
            by_time[number] += errors[0] * samples / self.count
            usual += errors[1] * weight
            gap += errors[2] * weight
            teacher += errors[3] * weight
        metrics: dict[str, float | list[float]] = {
            "loss": by_time.mean().item(),
            "loss_by_time": [round(x, 6) for x in by_time.tolist()],
            "loss_usual": usual,
            "guidance_gap": gap,
        }
        return {**metrics, "teacher_distance": teacher} if self._teacher else metrics

    def _errors(self, transformer: torch.nn.Module, guidance: float, usual_guidance: float) -> Sequence[list[float]]:
        """Of every pass of all ranks: the squared errors at the two guidances, between them, and to the teacher (0 without one)."""
        target, own = flow_matching.velocity(self.x0, self.noise), []
        predictions = zip(self.predictions(transformer, guidance), self.predictions(transformer, usual_guidance), strict=True)
        for i, ((_, rows), (v, w)) in enumerate(zip(self._mine, predictions, strict=True)):
            pairs = [(v, target[rows]), (w, target[rows]), (v, w), (v, self._teacher[i] if self._teacher else v)]
            own.append(torch.stack([_mse(*pair) for pair in pairs]))
        ranks = self.accelerator.num_processes
        found = self.accelerator.gather(torch.stack(own)).unflatten(0, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        return found[: len(self.passes)].tolist()  # the one read of the device

    def predictions(self, transformer: torch.nn.Module, guidance: float, prompt: tuple[Tensor, Tensor] | None = None) -> Iterator[Tensor]:
        """The velocities (B, S, C) of this rank's passes. `prompt`: the states (L, D) and (P,) of one that all pictures have instead of their own."""
        for number, rows in self._mine:
            times = self.times[number].expand(rows.stop - rows.start).to(self.x0)
            x_t = flow_matching.interpolate(self.x0[rows], self.noise[rows], times)
            states, pooled = (one.expand(len(times), *one.shape) for one in prompt) if prompt else (self.data.prompt[rows], self.data.pooled[rows])
            yield predict(transformer, x_t, times, build_conditioning(states, pooled, self.data.grid), guidance)


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().mean()
