"""Runs a step, a prediction, an encoding or a decoding on fake tensors, and reports bytes and FLOPs beyond the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPModel, Dinov2Model

from dev2pro.models import flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import TEXT_BATCH, Encoders
from dev2pro.planning import fake_models
from dev2pro.planning.live_bytes import LiveBytes, plain_tensors
from dev2pro.training import optim, wrapping
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig


@dataclass(frozen=True)
class Usage:
    """`peak`: most bytes alive at one time beyond the weights; `flops`: of the whole run."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Shape:
    """A batch of pictures: how many, tokens down and across, channels, prompt tokens, widths of prompt and pooled prompt, encodings' dtype."""

    count: int
    grid: tuple[int, int]
    channels: int
    prompt: tuple[int, int]
    pooled: int
    dtype: torch.dtype

    def batch(self) -> NoisedBatch:
        """A batch of this shape; under FakeTensorMode it takes no memory."""
        x_t, x0, noise = (torch.empty(self.count, self.grid[0] * self.grid[1], self.channels) for _ in range(3))
        prompt, pooled = torch.empty(self.count, *self.prompt, dtype=self.dtype), torch.empty(self.count, self.pooled, dtype=self.dtype)
        return NoisedBatch(x_t, x0, noise, torch.empty(self.count), flux1.build_conditioning(prompt, pooled, self.grid))


def nbytes(module: nn.Module, *, trained: bool = False) -> int:
    """Bytes of a module's parameters and buffers; `trained`: of the parameters that are trained."""
    tensors = [p for p in module.parameters() if p.requires_grad] if trained else [*module.parameters(), *module.buffers()]
    return sum(plain.numel() * plain.element_size() for tensor in tensors for plain in plain_tensors(tensor.detach()))


def training_step(
    model: FluxTransformer2DModel, batch: Shape, loss: Callable[[nn.Module, NoisedBatch], Tensor], hardware: HardwareConfig, *,
    held: bool, freed: bool, frozen: nn.Module | None = None,
) -> Usage:  # fmt: skip
    """Forward and backward of one micro-batch. The gradients of earlier micro-batches are there if `held`; if `freed`, none outlives its block.

    `frozen`: another model that the loss calls; its weights are not counted either.
    """
    with FakeTensorMode():
        fake_models.fake(model, *([frozen] if frozen else []))
        if hardware.gradient_checkpointing:
            wrapping.checkpoint_blocks(model, hardware.checkpointed_blocks)
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad and held:
                parameter.grad = torch.empty_like(parameter)
            if parameter.requires_grad and freed:
                parameter.register_post_accumulate_grad_hook(_forget)
        if _autocast(hardware):
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return _measure(lambda: loss(model, batch.batch()).backward(), model, *([frozen] if frozen else []))


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _autocast(hardware: HardwareConfig) -> bool:
    """Whether accelerate computes in bfloat16 over float32 weights; FSDP2 has a policy of its own."""
    return hardware.mixed_precision == "bf16" and not hardware.shard


def prediction(model: FluxTransformer2DModel, batch: Shape, hardware: HardwareConfig | None = None) -> Usage:
    """One forward pass without gradients, as measuring on `hardware` makes it; without, as sampling in evaluate does."""
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=hardware is not None and _autocast(hardware)):
        fake_models.fake(model)
        noised = batch.batch()
        return _measure(lambda: flux1.predict(model.eval(), noised.x_t, noised.t, noised.conditioning, 1.0), model)


def picture_encoding(encoders: Encoders, count: int, size: tuple[int, int]) -> Usage:
    """`count` pictures of `size` (width, height) through the VAE at a time."""
    with FakeTensorMode():
        fake_models.fake(encoders.pipeline.vae)
        return _measure(lambda: encoders.encode_images(torch.empty(count, 3, size[1], size[0])), encoders.pipeline.vae)


def picture_decoding(encoders: Encoders, count: int, size: tuple[int, int]) -> Usage:
    """`count` pictures of `size` (width, height) out of the VAE at a time."""
    with FakeTensorMode():
        fake_models.fake(encoders.pipeline.vae)
        latents = torch.empty(count, *encoders.token_shape(size), dtype=encoders.dtype)
        return _measure(lambda: encoders.decode(latents, size[1], size[0]), encoders.pipeline.vae)


@torch.no_grad()
def text_encoding(encoders: Encoders) -> Usage:
    """A call of T5, TEXT_BATCH captions; CLIP's part is a thousandth of it."""
    with FakeTensorMode():
        fake_models.fake(t5 := encoders.pipeline.text_encoder_2)
        return _measure(lambda: t5(torch.zeros(TEXT_BATCH, encoders.max_sequence_length, dtype=torch.long)), t5)


@torch.no_grad()
def judging(judge: CLIPModel | Dinov2Model, count: int) -> Usage:
    """`count` pictures through a judge, in the size it was trained for: DINOv2's processor cuts them to less, so that is more than it needs."""
    is_clip = isinstance(judge, CLIPModel)
    side = judge.config.vision_config.image_size if is_clip else judge.config.image_size
    with FakeTensorMode():
        fake_models.fake(judge)
        pixels = torch.empty(count, 3, side, side)
        return _measure(lambda: judge.get_image_features(pixels) if is_clip else judge(pixels), judge)


def optimizer_state(config: OptimConfig, model: nn.Module) -> int:
    """Bytes of the moments that the real optimizer makes for a model's trained parameters."""
    eight_bit = optim.chosen(config, next(p for p in model.parameters() if p.requires_grad).dtype) == "adamw_8bit"
    if eight_bit:
        from torchao.optim import subclass_8bit

        subclass_8bit.get_qmap_signed(), subclass_8bit.get_qmap_unsigned()  # tables that it computes once, with real numbers
    with FakeTensorMode():
        fake_models.fake(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optim.optimizer(config, trained)
        if eight_bit:  # its step is compiled; these are the buffers that it allocates
            moments: Any = [optimizer._new_buffer(p, signed) for p in trained for signed in (True, False)]  # type: ignore[attr-defined]
        else:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        return sum(plain.untyped_storage().nbytes() for moment in moments for plain in plain_tensors(moment))


def _measure(run: Callable[[], Any], *modules: nn.Module) -> Usage:
    with LiveBytes() as live:
        for module in modules:
            live.note([*module.parameters(), *module.buffers()])
            live.note([p.grad for p in module.parameters()])
        weights = sum(nbytes(module) for module in modules)
        run()
    return Usage(live.peak - weights, live.flops)
