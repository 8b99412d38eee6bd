"""What the frozen VAE and text encoders say about samples, and what is drawn around it to train on."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dev2pro import draws
from dev2pro.models import flow_matching
from dev2pro.models.flux1 import Conditioning, Encoders, ModelConfig, build_conditioning

TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class EncodedBatch:
    """Samples of one size: latent means and deviations (B, S, C) float32, prompts (B, L, D), pooled prompts (B, P).

    `grid`: tokens down and across, S in all. `captions`: what the prompts say in words, where somebody is to read it.
    """

    mean: Tensor
    std: Tensor
    prompt: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)


def joined(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    """Batches of one size as one."""
    mean, std, prompt, pooled = (torch.cat([getattr(one, name) for one in batches]) for name in ("mean", "std", "prompt", "pooled"))
    return EncodedBatch(mean, std, prompt, pooled, batches[0].grid, tuple(caption for one in batches for caption in one.captions))


class PromptEncoder:
    """Captions as the text encoders see them. Each is encoded once, and alone: what is encoded beside it would change its last bits.

    Up to `limit` bytes are kept, the longest unused going first. `empty`: the prompt (L, D) and pooled prompt (P) of no caption.
    """

    def __init__(self, model: ModelConfig, encoders: Encoders, limit: float) -> None:
        self.model, self.limit = model, limit
        self.device, self.dtype = encoders.device, encoders.dtype
        self._encoders: Encoders | None = encoders
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = encoders.text_bytes()
        prompt, pooled = self._one("")
        self.empty = prompt.to(self.device), pooled.to(self.device)

    def precompute(self, captions: Iterable[str]) -> None:
        """Encodes what will be asked for, and lets go of the encoders."""
        for caption in captions:
            self._one(caption)
        assert self._encoders is not None
        self._encoders.free(*TEXT_PARTS)
        self._encoders = None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts (B, L, D) and pooled prompts (B, P)."""
        prompts, pooled = zip(*map(self._one, captions), strict=True)
        return torch.stack(prompts).to(self.device), torch.stack(pooled).to(self.device)

    def _one(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self._kept:
            if self._encoders is None:  # two captions shared a checksum, so this one was not encoded ahead
                self._encoders = Encoders(self.model, self.dtype, self.device)
            prompt, pooled = self._encoders.encode_text([caption])
            self._kept[caption] = prompt[0].to("cpu", self.dtype), pooled[0].to("cpu", self.dtype)
            while len(self._kept) * self._bytes > self.limit and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(caption)
        return self._kept[caption]


@dataclass(frozen=True)
class NoisedBatch:
    """One micro-batch ready for the transformer: x_t, noise and x_0 (B, S, C), t (B,), and what is said about them."""

    x_t: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    conditioning: Conditioning

    @property
    def velocity(self) -> Tensor:
        """The flow-matching target."""
        return flow_matching.velocity(self.x0, self.noise)


def noise_batch(
    batch: EncodedBatch, empty: tuple[Tensor, Tensor], scheduler: dict, dropout: float, seed: int, step: int, slots: Sequence[int]
) -> NoisedBatch:
    """Draws everything random about the slots of one step: posterior, noise, logit-normal shifted time, caption dropout.

    `empty`: what is said in the place of a dropped caption; `scheduler`: the settings that hold the resolution shift.
    """
    shape = batch.mean.shape[1:]
    x0 = batch.mean + batch.std * draws.normal(seed, "posterior", step, slots, shape).to(batch.mean)
    noise = draws.normal(seed, "noise", step, slots, shape).to(x0)
    t = flow_matching.training_timesteps(draws.normal(seed, "time", step, slots), flow_matching.shift_mu(shape[0], scheduler)).to(x0)
    keep = (draws.uniform(seed, "caption dropout", step, slots) >= dropout).to(x0.device)
    prompt = torch.where(keep[:, None, None], batch.prompt, empty[0])
    conditioning = build_conditioning(prompt, torch.where(keep[:, None], batch.pooled, empty[1]), batch.grid)
    return NoisedBatch(flow_matching.interpolate(x0, noise, t), x0, noise, t, conditioning)
