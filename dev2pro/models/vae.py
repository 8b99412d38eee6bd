"""The VAE's calls, cut by pixels, and the packing of its latents into tokens."""

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

PIXELS = 1 << 20  # per call of the VAE: 1 picture of 1024 x 1024 (1.35 GB of activations in bfloat16), 4 of 512 x 512, 16 of 256 x 256


def pictures_per_call(height: int, width: int) -> int:
    """How many pictures of a size the VAE takes at once. A function of nothing else, because a picture's last bits depend on the others."""
    return max(1, PIXELS // (height * width))


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the packed, normalised latents, (B, S, C) each, for pixels (B, 3, H, W) in [-1, 1]."""
    means, stds = [], []
    for chunk in pixels.split(pictures_per_call(*pixels.shape[2:])):
        posterior = vae.encode(chunk.to(vae.dtype)).latent_dist
        means.append(pack((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor))
        stds.append(pack(posterior.std * vae.config.scaling_factor))
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode(vae: AutoencoderKL, packed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] of packed latents (B, S, C) of `grid` (down, across) tokens."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = FluxPipeline._unpack_latents(packed, *(2 * factor * tokens for tokens in grid), factor)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    chunks = latents.to(vae.dtype).split(pictures_per_call(*(2 * factor * tokens for tokens in grid)))
    return torch.cat([(vae.decode(chunk, return_dict=False)[0] / 2 + 0.5).clamp(0, 1) for chunk in chunks])


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C): 2x2 patches as tokens."""
    return FluxPipeline._pack_latents(latents, *latents.shape)
