"""Random numbers as pure functions of (seed, purpose, step, slot), so that runs are deterministic.

Nothing here has state, so a draw does not depend on the world size, on the number of workers, or on earlier draws.
Counter-based randomness: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
from collections.abc import Sequence

import torch

VERSION = 1  # of the scheme; another version gives other numbers, and a run cannot be resumed under another version


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A fresh CPU generator for one draw; equal arguments give equal streams."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(seed: int, purpose: str, step: int, slots: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
    """Standard normal numbers, one draw of `shape` per slot: (slots, *shape) float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, purpose, step, s)) for s in slots])


def uniform(seed: int, purpose: str, step: int, slots: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per slot: (slots,) float32 on the CPU."""
    return torch.stack([torch.rand((), generator=generator(seed, purpose, step, s)) for s in slots])
