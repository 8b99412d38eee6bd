"""FSDP2: weights, gradients and optimizer state spread over the ranks, and weights that are read and written in that form.

Torch's own `fully_shard`, because accelerate's wrapper runs on GPUs only, reduces gradients in the computing precision and keeps the root's weights
gathered after a measurement. Zhao et al. 2023 (https://arxiv.org/abs/2304.11277).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dev2pro.models import flux1


def mesh(device: torch.device, ranks: int, replicas: int) -> DeviceMesh:
    """The ranks in one row, or in `replicas` rows that each hold the whole model (HSDP): neighbouring ranks, those of one machine, shard it."""
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shards each block, and the rest as one more group, in place. Gathers in `compute`, reduces gradients in float32.

    Every group is released after each forward, the last one too: what measures or saves between two steps meets sharded weights. Only the root
    casts what comes in, once; position embeddings stay as the model computes them.
    """
    for block in flux1.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False), reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, torch.float32), reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def load(model: nn.Module, files: dict[str, Path], device: torch.device) -> None:
    """Fills a sharded model that is on the meta device; each rank reads its own rows of the weights in `files`, name -> safetensors file."""
    model.to_empty(device=device)
    opened = {file: safe_open(file, framework="pt") for file in set(files.values())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = local_tensor(parameter)
            if local.numel():
                local.copy_(opened[files[name]].get_slice(name)[_own(parameter)])


def _own(parameter: Any) -> tuple[slice, ...]:
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


def local_tensor(value: Tensor) -> Tensor:
    """This rank's part of a tensor, or the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_tensors(named: Iterator[tuple[str, Tensor]], dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """Gathers tensors one at a time and returns them in `dtype` on the CPU where `keep`; every rank must call it."""
    whole = {}
    for name, value in named:
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = gathered.detach().to("cpu", dtype)
    return whole
