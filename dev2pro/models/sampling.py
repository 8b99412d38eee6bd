"""From noise to packed latents: the Euler sampler of FluxPipeline, with separate guidance input and true CFG."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dev2pro import draws
from dev2pro.errors import ConfigError
from dev2pro.models import flow_matching
from dev2pro.models.flux1 import Conditioning, predict


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """Sampling settings; see conf/evaluate.yaml."""

    steps: int
    cfg_scale: float  # true classifier-free guidance, for models that are not distilled: recovered and teacher
    batch: int  # pictures per forward pass

    def check(self) -> None:
        """Raises ConfigError for invalid values."""
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"sampling.steps={self.steps} and sampling.batch={self.batch} must be 1 or more.")


def initial_noise(seed: int, repetition: int, prompt: int, shape: tuple[int, int]) -> Tensor:
    """The noise (S, C) a picture starts from: the same in every cell for the same seed, repetition and prompt."""
    return draws.normal(seed, "picture", repetition, [prompt], shape)[0]


@torch.no_grad()
def sample(
    transformer: torch.nn.Module,
    noise: Tensor,
    conditioning: Conditioning,
    null_conditioning: Conditioning,
    *,
    guidance: float,
    cfg_scale: float,
    steps: int,
    mu: float,
) -> Tensor:
    """Packed latents (B, S, C) from noise (B, S, C).

    `guidance` is the guidance input; at `cfg_scale` 1 the model is called once a step, else twice, the second time with
    `null_conditioning`, that of the empty prompt.
    """
    x = noise
    times = flow_matching.sampling_timesteps(steps, mu)
    for t, t_next in pairwise(times):
        t_batch = t.expand(len(x)).to(x)
        v = predict(transformer, x, t_batch, conditioning, guidance)
        if cfg_scale != 1:
            v = flow_matching.apply_cfg(predict(transformer, x, t_batch, null_conditioning, guidance), v, cfg_scale)
        x = x + (t_next - t).to(x) * v
    return x
