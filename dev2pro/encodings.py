"""What the frozen VAE and text encoders say about a fixed set of pictures, computed once before training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dev2pro import draws, flow
from dev2pro.errors import ConfigError
from dev2pro.flux import Conditioning, Encoders, ModelConfig, image_ids

ENCODE_BATCH = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Texts:
    """Prompts (K, L, D) and pooled prompts (K, P) of different captions, row 0 the empty one, and the position ids beside them."""

    prompt: Tensor
    pooled: Tensor
    text_ids: Tensor
    image_ids: Tensor

    def conditioning(self, rows: Tensor) -> Conditioning:
        """What to tell the transformer for rows (B,) of the tables."""
        return Conditioning(self.prompt[rows], self.pooled[rows], self.text_ids, self.image_ids)

    def unconditional(self, count: int) -> Conditioning:
        """The empty caption, `count` times."""
        return self.conditioning(torch.zeros(count, dtype=torch.long))


@dataclass(frozen=True)
class Encodings:
    """Latent means and deviations (N, S, C) in float32, and the caption of each sample (N,) as a row of `texts`."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Texts

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, samples: Sequence[int] | np.ndarray, seed: int, step: int, slots: Sequence[int]) -> Tensor:
        """Clean latents x_0 (B, S, C), a draw from the VAE's posterior of each sample."""
        rows = torch.as_tensor(samples)
        noise = draws.normal(seed, "posterior", step, slots, self.mean.shape[1:]).to(self.mean)
        return self.mean[rows] + self.std[rows] * noise

    def dropped(self, samples: Sequence[int] | np.ndarray, dropout: float, seed: int, step: int, slots: Sequence[int]) -> Tensor:
        """The captions of samples (B,), replaced by the empty one with probability `dropout`."""
        keep = draws.uniform(seed, "caption dropout", step, slots) >= dropout
        return self.caption[torch.as_tensor(samples)] * keep


class Captioned(Protocol):
    """A picture with a caption, decoded on demand."""

    @property
    def caption(self) -> str:
        """What it shows."""

    def pixels(self, resolution: int) -> np.ndarray:
        """(3, H, W) float32 in [-1, 1]."""


def encode_sets(
    model: ModelConfig, sets: Sequence[Sequence[Captioned]], resolution: int, device: torch.device, dtype: torch.dtype
) -> list[Encodings]:
    """Loads the encoders, encodes every set, and lets go of the encoders again: only the transformer stays for the training."""
    encoders = Encoders(model, dtype, device)
    return [encode(encoders, (p.pixels(resolution) for p in s), [p.caption for p in s], device, dtype) for s in sets]


def encode(encoders: Encoders, pictures: Iterable[np.ndarray], captions: Sequence[str], device: torch.device, dtype: torch.dtype) -> Encodings:
    """Encodes square pictures (3, H, H) in [-1, 1], all of one size, and their captions; every different caption once."""
    texts, table = None, list(dict.fromkeys(captions))
    means, stds = [], []
    for batch in batched(pictures, ENCODE_BATCH):
        texts = texts or encode_texts(encoders, table, batch[0].shape[-1], device, dtype)
        mean, std = encoders.encode_images(torch.from_numpy(np.stack(batch)))
        means.append(mean.to(device, torch.float32))
        stds.append(std.to(device, torch.float32))
    assert texts is not None, "an empty set is refused when it is read"
    row = {caption: i for i, caption in enumerate(table, start=1)}
    return Encodings(torch.cat(means), torch.cat(stds), torch.tensor([row[c] for c in captions]), texts)


def encode_texts(encoders: Encoders, texts: Sequence[str], resolution: int, device: torch.device, dtype: torch.dtype) -> Texts:
    """Row 0 is the empty caption, row i + 1 is texts[i]. Raises ConfigError for a resolution (pixels) the VAE cannot cut into tokens."""
    side = encoders.pixels_per_token
    if resolution < 1 or resolution % side:
        raise ConfigError(
            f"A resolution of {resolution} pixels does not fit this model: its VAE needs a multiple of {side}. "
            f"Choose {max(1, resolution // side) * side}."
        )
    parts = [encoders.encode_text(list(some)) for some in batched(["", *texts], ENCODE_BATCH)]
    prompt, pooled = (torch.cat(p).to(device, dtype) for p in zip(*parts, strict=True))
    grid = resolution // side
    return Texts(prompt, pooled, torch.zeros(prompt.shape[1], 3, device=device, dtype=dtype), image_ids(grid, grid, device, dtype))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


@dataclass(frozen=True)
class Noised:
    """One micro-batch ready for the transformer: x_t, noise and x_0 (B, S, C), t (B,), caption rows (B,)."""

    x_t: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    captions: Tensor

    @property
    def velocity(self) -> Tensor:
        """The flow-matching target."""
        return flow.velocity(self.x0, self.noise)


def noised(data: Encodings, samples: np.ndarray, mu: float, dropout: float, seed: int, step: int, slots: Sequence[int]) -> Noised:
    """Draws everything random about the slots of one step: posterior, noise, logit-normal shifted time, caption dropout."""
    x0 = data.latents(samples, seed, step, slots)
    noise = draws.normal(seed, "noise", step, slots, x0.shape[1:]).to(x0)
    t = flow.training_timesteps(draws.normal(seed, "time", step, slots), mu).to(x0)
    return Noised(flow.interpolate(x0, noise, t), x0, noise, t, data.dropped(samples, dropout, seed, step, slots))
