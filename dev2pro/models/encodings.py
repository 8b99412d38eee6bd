"""Encodings of samples by the frozen VAE and text encoders, and the random noise, time and caption dropout added for training."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from dev2pro import draws
from dev2pro.models import flow_matching
from dev2pro.models.flux1 import TEXT_BATCH, Conditioning, Encoders, ModelConfig, build_conditioning
from dev2pro.models.transfer import to_device

TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class EncodedBatch:
    """Samples of one size: latent means and deviations (B, S, C) float32, prompts (B, L, D), pooled prompts (B, P).

    `grid`: tokens down and across, S in all. `captions`: the prompts as text.
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
    """Encodes captions and caches the result in host memory.

    The cache holds up to `limit` bytes and evicts the least recently used first. `empty`: the prompt (L, D) and pooled prompt (P) of "".
    """

    def __init__(self, model: ModelConfig, encoders: Encoders, limit: float) -> None:
        self.model, self.limit = model, limit
        self.device, self.dtype = encoders.device, encoders.dtype
        self._encoders, self._freed = encoders, False
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = encoders.text_bytes()
        prompt, pooled = self.encode([""])
        self.empty = prompt[0], pooled[0]

    def precompute(self, captions: Iterable[str], accelerator: Accelerator | None = None) -> None:
        """Encodes all captions in advance, then frees the encoders. The ranks of an accelerator share the work; all get all of it."""
        rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        fresh = (caption for caption in dict.fromkeys(captions) if caption not in self._cache)
        while some := list(itertools.islice(fresh, ranks * TEXT_BATCH)):
            mine = some[rank * TEXT_BATCH : (rank + 1) * TEXT_BATCH]
            states = self._encoders.encode_text(mine + [""] * (TEXT_BATCH - len(mine)))  # every rank sends as much
            self._keep(some, *(accelerator.gather(states) if accelerator else states))
        self._encoders.free(*TEXT_PARTS)
        self._freed = True

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts (B, L, D) and pooled prompts (B, P)."""
        known = {caption: self._cache[caption] for caption in captions if caption in self._cache}
        if fresh := [caption for caption in dict.fromkeys(captions) if caption not in known]:
            if self._freed:  # two captions share a checksum, so this one was not precomputed
                self._encoders, self._freed = Encoders(self.model, self.dtype, self.device, int8=self._encoders.int8), False
            known |= self._keep(fresh, *self._encoders.encode_text(fresh))
        for caption in captions:
            if caption in self._cache:
                self._cache.move_to_end(caption)
        prompts, pooled = zip(*(known[caption] for caption in captions), strict=True)
        return to_device(torch.stack(prompts), self.device), to_device(torch.stack(pooled), self.device)

    def _keep(self, captions: Sequence[str], prompts: Tensor, pooled: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The states of each caption, which are the first ones of (K, L, D) and (K, P), in host memory; as many stay there as fit."""
        kept = {}
        for caption, *states in zip(captions, prompts, pooled, strict=False):
            prompt, pool = (state.to("cpu", self.dtype, copy=True) for state in states)  # a view would keep the memory of all
            kept[caption] = self._cache[caption] = prompt, pool
            while len(self._cache) * self._bytes > self.limit and len(self._cache) > 1:
                self._cache.popitem(last=False)
        return kept


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

    def null_conditioning(self, empty: tuple[Tensor, Tensor]) -> Conditioning:
        """The conditioning of the empty caption, whose prompt (L, D) and pooled prompt (P) are given, for every sample."""
        return self.conditioned_on(*(part.expand(len(self.t), *part.shape) for part in empty))

    def conditioned_on(self, prompt: Tensor, pooled: Tensor) -> Conditioning:
        """The conditioning of other captions, one for every sample: prompts (B, L, D) and pooled prompts (B, P)."""
        return replace(self.conditioning, prompt=prompt, pooled=pooled)


def noise_batch(
    batch: EncodedBatch, empty: tuple[Tensor, Tensor], scheduler: dict, dropout: float, seed: int, step: int, slots: Sequence[int], *,
    logit_mean: float = 0.0,
) -> NoisedBatch:  # fmt: skip
    """Draws all random values for the slots of one step: posterior, noise, logit-normal shifted time, caption dropout.

    `empty`: the embeddings that replace a dropped caption; `scheduler`: the settings with the resolution shift; `logit_mean`: that of the times.
    """
    shape = batch.mean.shape[1:]
    device = batch.mean.device
    x0 = batch.mean + batch.std * to_device(draws.normal(seed, "posterior", step, slots, shape), device)
    noise = to_device(draws.normal(seed, "noise", step, slots, shape), device)
    t = flow_matching.training_timesteps(logit_mean + draws.normal(seed, "time", step, slots), flow_matching.shift_mu(shape[0], scheduler))
    t = to_device(t, device)
    keep = to_device(draws.uniform(seed, "caption dropout", step, slots) >= dropout, device)
    prompt = torch.where(keep[:, None, None], batch.prompt, empty[0])
    conditioning = build_conditioning(prompt, torch.where(keep[:, None], batch.pooled, empty[1]), batch.grid)
    return NoisedBatch(flow_matching.interpolate(x0, noise, t), x0, noise, t, conditioning)
