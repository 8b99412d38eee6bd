"""The losses: what a LoRA can be trained with, and the distillation that is guessed to have made the base."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dev2pro.errors import ConfigError
from dev2pro.models import flow_matching, flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import Conditioning

Guidance = Tensor | float
Loss = Callable[..., Tensor]  # of the model in training, a batch, the guidance, the empty caption's conditioning and a teacher or None


@dataclass(slots=True, kw_only=True)
class LossConfig:
    """What a LoRA is trained with; see conf/lora.yaml."""

    name: str = "flow_matching"
    guidance_range: list[float] | None = None
    teacher: str | None = None
    teacher_lora: str | None = None
    bypass_guidance: bool = False

    def guidances(self, fixed: float) -> list[float]:
        """The lowest and the highest guidance input of a training at `fixed`, unless a range is given."""
        return self.guidance_range or [fixed, fixed]

    def check(self, guidance: float) -> None:
        """Raises ConfigError for a loss that does not exist or values that mean nothing to it."""
        if self.name not in LOSSES:
            raise ConfigError(f"loss.name={self.name} is unknown. Choose {', '.join([*LOSSES][:-1])} or {[*LOSSES][-1]}.")
        if self.guidance_range is not None and (len(self.guidance_range) != 2 or not 0 <= self.guidance_range[0] <= self.guidance_range[1]):
            raise ConfigError(f"loss.guidance_range={self.guidance_range} is no range. Give the lowest and the highest guidance, such as [2,6].")
        if self.name == "flow_matching" and self.teacher:
            raise ConfigError(
                "loss.teacher is for the other losses: flow matching learns from the pictures alone. Set it to null, or choose loss.name."
            )
        if self.name in ("distillation", "model_guidance") and not self.teacher:
            raise ConfigError(f"loss.name={self.name} learns from an undistilled model. Set loss.teacher to a recovered one.")
        if self.teacher_lora and not self.teacher:
            raise ConfigError("loss.teacher_lora belongs to a teacher. Set loss.teacher to the model that it was trained on.")
        if self.name != "flow_matching" and self.guidances(guidance)[0] <= 0:
            raise ConfigError(f"loss.name={self.name} extrapolates by the guidance, which must be more than 0. Set guidance=3.5.")
        if self.bypass_guidance and self.guidance_range:
            raise ConfigError("loss.bypass_guidance=true ignores the guidance input, loss.guidance_range varies it. Set one of them.")


def flow_matching_loss(model: torch.nn.Module, batch: NoisedBatch, guidance: Guidance) -> Tensor:
    """Mean squared error of the predicted velocity, in float32; Lipman et al. 2022 (https://arxiv.org/abs/2210.02747).

    `guidance` is the guidance input, one number or (B,).
    """
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance)
    return mse_loss(predicted.float(), batch.velocity.float())


def guidance_loss(
    model: torch.nn.Module, batch: NoisedBatch, guidance: Guidance, null_conditioning: Conditioning, teacher: torch.nn.Module | None = None
) -> Tensor:
    """The prediction v at guidance g against the picture's velocity x, extrapolated as CFG does: u + g (x - u), in float32.

    u is the prediction of the empty caption, by the model in training at g or by a `teacher` at 1; no gradient flows through it. So v learns to be
    what sampling with CFG g would make of a model that has learnt x. Two forward passes a step, one backward. It is ai-toolkit's guidance loss
    (https://github.com/ostris/ai-toolkit, `do_guidance_loss`, 2025).
    """
    unconditional = empty_caption_velocity(model, teacher, batch, guidance, null_conditioning)
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance).float()
    return mse_loss(predicted, flow_matching.apply_cfg(unconditional, batch.velocity.float(), _each(guidance, batch)))


def cfg_augmented_loss(
    model: torch.nn.Module, batch: NoisedBatch, guidance: Guidance, null_conditioning: Conditioning, teacher: torch.nn.Module | None = None
) -> Tensor:
    """What the prediction v at guidance g says without guidance, (v + (g - 1) u) / g, against the picture's velocity, in float32.

    u and the cost are `guidance_loss`'s. Sample by sample it is that loss divided by g^2: the same direction at one g, other weights over a range.
    It is diffusion-pipe's CFG-augmented loss (https://github.com/tdrussell/diffusion-pipe/issues/533, 2026).
    """
    unconditional = empty_caption_velocity(model, teacher, batch, guidance, null_conditioning)
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance).float()
    return mse_loss(flow_matching.apply_cfg(unconditional, predicted, 1 / _each(guidance, batch)), batch.velocity.float())


@torch.no_grad()
def empty_caption_velocity(
    model: torch.nn.Module, teacher: torch.nn.Module | None, batch: NoisedBatch, guidance: Guidance, null_conditioning: Conditioning
) -> Tensor:
    """The velocity (B, S, C), float32, for the empty caption: the teacher's at guidance 1 if there is one, else the model's at `guidance`."""
    asked, at = (teacher, 1.0) if teacher else (model, guidance)
    return flux1.predict(asked, batch.x_t, batch.t, null_conditioning, at).float()


def _each(guidance: Guidance, batch: NoisedBatch) -> Tensor:
    return torch.as_tensor(guidance, dtype=torch.float32, device=batch.t.device).expand(len(batch.t))


def distillation_loss(
    model: torch.nn.Module, teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning, guidance: Tensor, flow_weight: float
) -> Tensor:
    """The student's prediction at `guidance` (B,) against the teacher's true-CFG prediction at the same scale, plus weighted flow matching.

    On Distillation of Guided Diffusion Models, Meng et al. 2022 (https://arxiv.org/abs/2210.03142); the flow-matching term is John Shi's (2024).
    """
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance).float()
    target = teacher_cfg_velocity(teacher, batch, null_conditioning, guidance)
    return mse_loss(predicted, target) + flow_weight * mse_loss(predicted, batch.velocity.float())


def pair_distillation_loss(
    model: torch.nn.Module, teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning, guidance: Tensor, flow_weight: float
) -> Tensor:
    """`distillation_loss` at two guidances a sample, (2, B), their mean, plus the error of the difference between the two predictions.

    The difference is small beside the predictions themselves, so that without a term of its own the student is slow to learn how guidance acts. Both
    share the teacher's two passes: four forward passes a step, two of them with gradient.
    """
    predicted = torch.stack([flux1.predict(model, batch.x_t, batch.t, batch.conditioning, one).float() for one in guidance])
    conditional, unconditional = teacher_velocities(teacher, batch, null_conditioning)
    target = torch.stack([flow_matching.apply_cfg(unconditional, conditional, one) for one in guidance])
    difference = mse_loss(predicted[1] - predicted[0], target[1] - target[0])
    return mse_loss(predicted, target) + difference + flow_weight * mse_loss(predicted, batch.velocity.float().expand_as(predicted))


def teacher_cfg_velocity(teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning, cfg_scale: Tensor) -> Tensor:
    """The teacher's velocity (B, S, C), float32, under true CFG of strength `cfg_scale` (B,), its own guidance input at 1."""
    conditional, unconditional = teacher_velocities(teacher, batch, null_conditioning)
    return flow_matching.apply_cfg(unconditional, conditional, cfg_scale)


@torch.no_grad()
def teacher_velocities(teacher: torch.nn.Module, batch: NoisedBatch, null_conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    """The teacher's velocities (B, S, C), float32, for the captions and for the empty caption, its guidance input at 1."""
    conditional = flux1.predict(teacher, batch.x_t, batch.t, batch.conditioning, 1.0)
    return conditional.float(), flux1.predict(teacher, batch.x_t, batch.t, null_conditioning, 1.0).float()


def redistillation_loss(
    model: torch.nn.Module, batch: NoisedBatch, guidance: Guidance, null_conditioning: Conditioning, teacher: torch.nn.Module
) -> Tensor:
    """`distillation_loss` without flow matching, of a LoRA on the base: its teacher is the recovered model with the style's own LoRA.

    So the base learns the style and its guidance together, which no flow matching teaches. Three forward passes a step, one backward.
    """
    return distillation_loss(model, teacher, batch, null_conditioning, _each(guidance, batch), 0.0)


def model_guidance_loss(
    model: torch.nn.Module, batch: NoisedBatch, guidance: Guidance, null_conditioning: Conditioning, teacher: torch.nn.Module
) -> Tensor:
    """The prediction at guidance g against x + (g - 1) (v - u): the picture's velocity, and the guidance of a teacher; in float32.

    v and u are the teacher's predictions for the caption and for the empty one. The teacher is the recovered model with the style's own LoRA, as in
    `redistillation_loss`, but the style is learnt from the pictures and only the guidance from the teacher, whose own faults in v cancel in the
    difference. The noise of x is not multiplied by g, as it is by `guidance_loss`. Three forward passes a step, one backward. The target is
    Model-guidance's, whose difference is the model's own (Tang et al. 2025, https://arxiv.org/abs/2502.12154).
    """
    conditional, unconditional = teacher_velocities(teacher, batch, null_conditioning)
    predicted = flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance).float()
    guided = flow_matching.apply_cfg(unconditional, conditional, _each(guidance, batch)) - conditional
    return mse_loss(predicted, batch.velocity.float() + guided)


LOSSES: dict[str, Loss] = {
    "flow_matching": lambda model, batch, guidance, *_: flow_matching_loss(model, batch, guidance),
    "guidance": guidance_loss,
    "cfg_augmented": cfg_augmented_loss,
    "distillation": redistillation_loss,
    "model_guidance": model_guidance_loss,
}
