"""Flow-matching and guidance maths: pure tensors, no models, no configuration.

t runs from 0 (picture) to 1 (noise), as in the transformer of FLUX.1: x_t = (1 - t) x_0 + t n, velocity n - x_0.
Sources: rectified flow, Liu et al. 2022 (https://arxiv.org/abs/2209.03003); logit-normal timesteps and the resolution shift,
Esser et al. 2024 (https://arxiv.org/abs/2403.03206); classifier-free guidance, Ho and Salimans 2022 (https://arxiv.org/abs/2207.12598).
"""

import math

import torch
from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The noised latents x_t: (B, S, C) each, t (B,) in [0, 1]."""
    t = t.view(-1, *[1] * (x0.ndim - 1)).to(x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The training target, the derivative of x_t by t."""
    return noise - x0


def shift(t: Tensor, mu: float) -> Tensor:
    """Moves timesteps in (0, 1] towards noise by exp(mu): the resolution shift in the form FLUX uses."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def shift_mu(tokens: int, scheduler: dict) -> float:
    """The shift for a picture of `tokens` packed latent tokens, on the line through the scheduler's two anchor points."""
    low, high = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (high - low)
    return scheduler["base_shift"] + slope * (tokens - low)


def training_timesteps(normal: Tensor, mu: float) -> Tensor:
    """Logit-normal timesteps, shifted for the resolution: standard normal (B,) -> t (B,) in (0, 1)."""
    return shift(torch.sigmoid(normal), mu)


def sampling_timesteps(steps: int, mu: float) -> Tensor:
    """`steps` + 1 falling times from 1 to 0 for the Euler sampler: those of diffusers' FluxPipeline."""
    return torch.cat([shift(torch.linspace(1, 1 / steps, steps), mu), torch.zeros(1)])


def apply_cfg(unconditional: Tensor, conditional: Tensor, cfg_scale: Tensor | float) -> Tensor:
    """True classifier-free guidance: v_uncond + s (v_cond - v_uncond); s a number or (B,)."""
    if isinstance(cfg_scale, Tensor):
        cfg_scale = cfg_scale.view(-1, *[1] * (conditional.ndim - 1))
    return unconditional + cfg_scale * (conditional - unconditional)
