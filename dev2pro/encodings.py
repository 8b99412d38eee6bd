"""What the frozen VAE and text encoders say about a fixed set of pictures, computed once before training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dev2pro import draws, flow
from dev2pro.errors import ConfigError
from dev2pro.flux import Conditioning, Encoders, ModelConfig, image_ids

ENCODE_BATCH = 16


@dataclass(frozen=True)
class Encodings:
    """Latent means and deviations (N, S, C), the caption of each sample (N,) as a row of the text tables (K, ...); row 0 is empty."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    prompt: Tensor
    pooled: Tensor
    text_ids: Tensor
    image_ids: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, samples: Sequence[int] | np.ndarray, seed: int, step: int, slots: Sequence[int]) -> Tensor:
        """Clean latents x_0 (B, S, C), a draw from the VAE's posterior of each sample."""
        rows = torch.as_tensor(samples)
        noise = draws.normal(seed, "posterior", step, slots, self.mean.shape[1:]).to(self.mean)
        return self.mean[rows] + self.std[rows] * noise

    def conditioning(self, captions: Tensor) -> Conditioning:
        """What to tell the transformer for rows of the text tables (B,)."""
        return Conditioning(self.prompt[captions], self.pooled[captions], self.text_ids, self.image_ids)

    def unconditional(self, count: int) -> Conditioning:
        """The empty caption, `count` times."""
        return self.conditioning(torch.zeros(count, dtype=torch.long))

    def dropped(self, samples: Sequence[int] | np.ndarray, dropout: float, seed: int, step: int, slots: Sequence[int]) -> Tensor:
        """The captions of samples (B,), replaced by the empty one with probability `dropout`."""
        keep = draws.uniform(seed, "caption dropout", step, slots) >= dropout
        return self.caption[torch.as_tensor(samples)] * keep


class Captioned(Protocol):
    """A picture with a caption, decoded on demand."""

    caption: str

    def pixels(self, resolution: int) -> np.ndarray:
        """(3, H, W) float32 in [-1, 1]."""


def encode_sets(model: ModelConfig, sets: Sequence[Sequence[Captioned]], resolution: int, device: torch.device, dtype: torch.dtype) -> list[Encodings]:
    """Loads the encoders, encodes every set, and lets go of the encoders again: only the transformer stays for the training."""
    encoders = Encoders(model, dtype, device)
    return [encode(encoders, (p.pixels(resolution) for p in s), [p.caption for p in s], device, dtype) for s in sets]


@torch.no_grad()
def encode(encoders: Encoders, pictures: Iterable[np.ndarray], captions: Sequence[str], device: torch.device, dtype: torch.dtype) -> Encodings:
    """Encodes pictures (3, H, W) in [-1, 1], all of one size, and their captions; every different caption once."""
    prompt, pooled, table = encode_captions(encoders, captions)
    means, stds, batch, grid = [], [], [], (0, 0)
    side = encoders.pixels_per_token

    def flush() -> None:
        mean, std = encoders.encode_images(torch.from_numpy(np.stack(batch)))
        means.append(mean.to(device, dtype))
        stds.append(std.to(device, dtype))
        batch.clear()

    for picture in pictures:
        grid = (picture.shape[1] // side, picture.shape[2] // side)
        if (grid[0] * side, grid[1] * side) != picture.shape[1:]:
            raise ConfigError(f"data.resolution is {picture.shape[1]} pixels, but this model's VAE needs a multiple of {side}. Choose the next one.")
        batch.append(picture)
        if len(batch) == ENCODE_BATCH:
            flush()
    if batch:
        flush()
    return Encodings(
        mean=torch.cat(means),
        std=torch.cat(stds),
        caption=torch.tensor([table[c] for c in captions]),
        prompt=prompt.to(device, dtype),
        pooled=pooled.to(device, dtype),
        text_ids=torch.zeros(prompt.shape[1], 3, device=device, dtype=dtype),
        image_ids=image_ids(*grid, device, dtype),
    )


def encode_captions(encoders: Encoders, captions: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(prompt (K, L, D), pooled (K, P), caption -> row); row 0 is the empty caption."""
    texts = list(dict.fromkeys(["", *captions]))
    parts = [encoders.encode_text(texts[i : i + ENCODE_BATCH]) for i in range(0, len(texts), ENCODE_BATCH)]
    return torch.cat([p for p, _ in parts]), torch.cat([p for _, p in parts]), {text: row for row, text in enumerate(texts)}


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
        return flow.velocity(self.x0, self.noise)


def noised(data: Encodings, samples: np.ndarray, mu: float, dropout: float, seed: int, step: int, slots: Sequence[int]) -> Noised:
    """Draws everything random about the slots of one step: posterior, noise, logit-normal shifted time, caption dropout."""
    x0 = data.latents(samples, seed, step, slots)
    noise = draws.normal(seed, "noise", step, slots, x0.shape[1:]).to(x0)
    t = flow.training_timesteps(draws.normal(seed, "time", step, slots), mu).to(x0)
    return Noised(flow.interpolate(x0, noise, t), x0, noise, t, data.dropped(samples, dropout, seed, step, slots))
