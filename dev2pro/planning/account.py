"""The account of a stage: bytes on a GPU and in host memory by phase, disk, FLOPs; and what all stages' accounts share."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dev2pro.models.flux1 import TEXT_BATCH, Encoders
from dev2pro.models.offload import OffloadedLinear
from dev2pro.planning import fake_models, fake_runs
from dev2pro.planning.fake_runs import Shape, nbytes
from dev2pro.training import feed

Parts = dict[str, float]  # what -> bytes
Phases = dict[str, Parts]
Size = tuple[int, int]  # width, height in pixels

CONTEXT, COLLECTIVES = 1e9, 1e9  # on a GPU: CUDA's context and its libraries' workspaces; NCCL's buffers where there are several ranks
PROCESS = 4e9  # host memory of one process: Python, torch, CUDA's libraries
STAGED = 1.1  # host memory of a checkpoint that is being written, as a multiple of its tensors
MACHINE = 8  # GPUs of a machine, where nothing says how many
JUDGED = 64  # pictures that the judge sees at a time


@dataclass(frozen=True, kw_only=True)
class Account:
    """Of a stage. `gpu`: of one GPU; `host`: of one machine; `disk`: of all. `flops`: of what -> FLOPs a sample.

    `blocks`: of the transformer; `state`: bytes of a checkpoint; `captions`: how many can be kept encoded, so that T5 is freed before
    training; `staying`: its bytes, if not.
    """

    stage: str
    ranks: int
    machines: int
    gpu: Phases
    host: Phases
    disk: Parts
    flops: dict[str, float]
    blocks: int = 0
    state: float = 0
    captions: int = 0
    staying: float = 0

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs most of a GPU, and its bytes."""
        return _largest(self.gpu)

    @property
    def host_peak(self) -> tuple[str, float]:
        """The same of host memory."""
        return _largest(self.host)


def _largest(phases: Phases) -> tuple[str, float]:
    return max(((name, sum(parts.values())) for name, parts in phases.items()), key=lambda phase: phase[1])


@dataclass(frozen=True)
class Layout:
    """How many ranks, on how many machines, and over how many of them a sharded model is spread."""

    ranks: int
    machines: int
    shards: int

    @classmethod
    def of(cls, config: Any) -> "Layout":
        """That of this process's launcher; without one, hardware.ranks for a plan and one process for a run."""
        hardware = config.hardware
        ranks = int(os.environ.get("WORLD_SIZE", hardware.ranks if config.plan else 1))
        machines = -(-ranks // int(os.environ.get("LOCAL_WORLD_SIZE", min(ranks, MACHINE))))
        return cls(ranks, machines, ranks // hardware.replicas if hardware.shard else 1)

    @property
    def local(self) -> int:
        """Ranks on one machine."""
        return -(-self.ranks // self.machines)

    @property
    def overhead(self) -> Parts:
        """What every phase has on a GPU."""
        return {"CUDA": CONTEXT + (COLLECTIVES if self.ranks > 1 else 0)}


def load_encoders(config: Any) -> Encoders:
    """VAE, T5 and CLIP as the hardware has them, without weights."""
    hardware = config.hardware
    return fake_models.encoders(config.model, hardware.encoders, int8=hardware.int8_encoders)


def batch_shape(encoders: Encoders, size: Size, count: int) -> Shape:
    """A batch of `count` pictures of a size, as the transformer sees it."""
    parts = encoders.pipeline
    prompt = (encoders.max_sequence_length, parts.text_encoder_2.config.d_model)
    return Shape(count, encoders.grid(size), encoders.token_shape(size)[1], prompt, parts.text_encoder.config.hidden_size, encoders.dtype)


def text_encoder_bytes(encoders: Encoders) -> int:
    """Of T5 and CLIP."""
    return nbytes(encoders.pipeline.text_encoder) + nbytes(encoders.pipeline.text_encoder_2)


def encoding_parts(encoders: Encoders, size: Size) -> Phases:
    """Of latents and of text: the encoders, and what a call of them takes."""
    pictures, texts = fake_runs.picture_encoding(encoders, feed.PICTURES, size), fake_runs.text_encoding(encoders)
    return {
        "latents": {"VAE": nbytes(encoders.pipeline.vae), "activations": pictures.peak},
        "text": {"T5 and CLIP": text_encoder_bytes(encoders), "activations": texts.peak},
    }


def encoding_flops(encoders: Encoders, size: Size, parts: Sequence[str] = feed.STORABLE) -> float:
    """Of one sample."""
    flops: dict[str, Callable[[], float]] = {
        "latents": lambda: fake_runs.picture_encoding(encoders, 1, size).flops,
        "text": lambda: fake_runs.text_encoding(encoders).flops / TEXT_BATCH,
    }
    return sum(flops[part]() for part in parts)


def offloaded_bytes(model: nn.Module) -> int:
    """Of the weights that wait in host memory."""
    return sum(nbytes(module) for module in model.modules() if isinstance(module, OffloadedLinear))


def largest_parameter(model: nn.Module) -> int:
    """Bytes of the largest parameter, in the precision that it is computed in."""
    return max(p.numel() * p.element_size() for p in model.parameters())
