"""The losses: flow matching at a guidance, and the distillation that is guessed to have made the base."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dev2pro.models import flow_matching, flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import Conditioning


def flow_matching_loss(model: torch.nn.Module, batch: NoisedBatch, guidance: Tensor | float) -> Tensor:
    """Mean squared error of the predicted velocity, in float32; Lipman et al. 2022 (https://arxiv.org/abs/2210.02747).

    `guidance` is the guidance input, one number or (B,).
    """
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance)
    return mse_loss(predicted.float(), batch.velocity.float())


def distillation_loss(
    model: torch.nn.Module, teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning, guidance: Tensor, flow_weight: float
) -> Tensor:
    """The student's prediction at `guidance` (B,) against the teacher's true-CFG prediction at the same scale, plus weighted flow matching.

    On Distillation of Guided Diffusion Models, Meng et al. 2022 (https://arxiv.org/abs/2210.03142); the flow-matching term is John Shi's (2024).
    """
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance).float()
    target = teacher_cfg_velocity(teacher, batch, null_conditioning, guidance).float()
    return mse_loss(predicted, target) + flow_weight * mse_loss(predicted, batch.velocity.float())


@torch.no_grad()
def teacher_cfg_velocity(teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning, cfg_scale: Tensor) -> Tensor:
    """The teacher's velocity (B, S, C) under true CFG of strength `cfg_scale` (B,), its own guidance input at 1."""
    conditional = flux1.predict(teacher, batch.x_t, batch.t, batch.conditioning, 1.0)
    unconditional = flux1.predict(teacher, batch.x_t, batch.t, null_conditioning, 1.0)
    return flow_matching.apply_cfg(unconditional, conditional, cfg_scale)
