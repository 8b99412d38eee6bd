"""Encodings of samples by the frozen VAE and text encoders, and the random noise, time and caption dropout added for training."""

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

    `grid`: tokens down and across, S in all. `captions`: the prompts as text, where they are displayed.
    """

    mean: Tensor
    std: Tensor
    prompt: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)


def concatenate(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    """Concatenates batches of one size."""
    mean, std, prompt, pooled = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("mean", "std", "prompt", "pooled"))
    return EncodedBatch(mean, std, prompt, pooled, batches[0].grid, tuple(caption for batch in batches for caption in batch.captions))


class PromptEncoder:
    """Encodes captions and caches the result. Each is encoded once, in a batch of its own, because other captions would change the last bits.

    The cache holds up to `limit` bytes and evicts the least recently used first. `empty`: the prompt (L, D) and pooled prompt (P) of "".
    """

    def __init__(self, model: ModelConfig, encoders: Encoders, limit: float) -> None:
        self.model, self.limit = model, limit
        self.device, self.dtype = encoders.device, encoders.dtype
        self._encoders: Encoders | None = encoders
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = encoders.text_bytes()
        prompt, pooled = self._encode_one("")
        self.empty = prompt.to(self.device), pooled.to(self.device)

    def precompute(self, captions: Iterable[str]) -> None:
        """Encodes all captions in advance, then frees the encoders."""
        for caption in captions:
            self._encode_one(caption)
        assert self._encoders is not None
        self._encoders.free(*TEXT_PARTS)
        self._encoders = None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts (B, L, D) and pooled prompts (B, P)."""
        prompts, pooled = zip(*map(self._encode_one, captions), strict=True)
        return torch.stack(prompts).to(self.device), torch.stack(pooled).to(self.device)

    def _encode_one(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self._cache:
            if self._encoders is None:  # two captions share a checksum, so this one was not precomputed
                self._encoders = Encoders(self.model, self.dtype, self.device)
            prompt, pooled = self._encoders.encode_text([caption])
            self._cache[caption] = prompt[0].to("cpu", self.dtype), pooled[0].to("cpu", self.dtype)
            while len(self._cache) * self._bytes > self.limit and len(self._cache) > 1:
                self._cache.popitem(last=False)
        self._cache.move_to_end(caption)
        return self._cache[caption]


@dataclass(frozen=True)
class NoisedBatch:
    """One micro-batch ready for the transformer: x_t, noise and x_0 (B, S, C), t (B,), and their conditioning."""

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
    """Draws all random values for the slots of one step: posterior, noise, logit-normal shifted time, caption dropout.

    `empty`: the embeddings that replace a dropped caption; `scheduler`: the settings with the resolution shift.
    """
    shape = batch.mean.shape[1:]
    x0 = batch.mean + batch.std * draws.normal(seed, "posterior", step, slots, shape).to(batch.mean)
    noise = draws.normal(seed, "noise", step, slots, shape).to(x0)
    t = flow_matching.training_timesteps(draws.normal(seed, "time", step, slots), flow_matching.shift_mu(shape[0], scheduler)).to(x0)
    keep = (draws.uniform(seed, "caption dropout", step, slots) >= dropout).to(x0.device)
    prompt = torch.where(keep[:, None, None], batch.prompt, empty[0])
    conditioning = build_conditioning(prompt, torch.where(keep[:, None], batch.pooled, empty[1]), batch.grid)
    return NoisedBatch(flow_matching.interpolate(x0, noise, t), x0, noise, t, conditioning)
