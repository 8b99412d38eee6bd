"""A transformer made ready to train on this hardware: activation checkpointing, compilation, data parallelism; and loaded as it will be trained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dev2pro.models import flux1, lora, offload
from dev2pro.training import sharding
from dev2pro.training.distributed import HardwareConfig


def load_transformer(path: str, hardware: HardwareConfig, accelerator: Accelerator, variant: str | None = None) -> FluxTransformer2DModel:
    """The transformer of `path` in the precision it is trained in, as `flux1.load_transformer`; sharded over the ranks if the hardware says so.

    Sharded, it is never whole anywhere: each rank reads its own rows.
    """
    if not hardware.shard:
        model = flux1.load_transformer(path, hardware.weights, variant)
        return to_float8(model, accelerator.device) if hardware.float8 else model
    model, files = flux1.skeleton(path, hardware.weights), flux1.weight_files(path, variant)
    flux1.check_complete(path, {name for name, _ in model.named_parameters()}, files)
    if hardware.float8:
        to_float8(model, accelerator.device)
    accelerator.wait_for_everyone()  # some may have encoded for long, and the groups of a mesh do not wait
    sharding.shard(model, sharding.mesh(accelerator.device, accelerator.num_processes, hardware.replicas), hardware.compute)
    sharding.load(model, files, accelerator.device)
    return model


def to_float8(model: FluxTransformer2DModel, device: torch.device) -> FluxTransformer2DModel:
    """The blocks' matrix products in float8 with a scale a tensor (torchao), over the same weights. CPUs compute the same roundings in float32."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig(emulate=device.type == "cpu"), module_filter_fn=lora.block_linear)


def prepare(model: FluxTransformer2DModel, hardware: HardwareConfig, accelerator: Accelerator) -> torch.nn.Module:
    """The model to call in training: on the device, in training mode, each rank's gradients averaged."""
    if hardware.gradient_checkpointing:
        checkpoint_blocks(model, hardware.checkpointed_blocks)
    if hardware.compile:
        # a block is compiled for a first size, for all, with and without gradients, as the first and as a later one
        torch._dynamo.config.recompile_limit = 64
        for block in flux1.blocks(model):  # only the forward: the hooks of sharding and of activation checkpointing stay outside
            block.forward = torch.compile(_without_aliases(block.forward), fullgraph=True)
    model.train()
    if sharding.is_sharded(model):
        return model
    if hardware.offloaded_blocks:
        offload.place(model, accelerator.device, hardware.offloaded_blocks)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # every rank read them; int8 ones could not be sent
    return accelerator.prepare(model, device_placement=[not hardware.offloaded_blocks])


def _without_aliases(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A block returns views of one tensor, which torch.compile refuses over int8 weights, and for whose strides it compiles the next block again."""

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(value.clone(memory_format=torch.contiguous_format) for value in forward(*args, **kwargs))

    return call


def checkpoint_blocks(model: FluxTransformer2DModel, count: int | None) -> None:
    """Recomputes the activations of `count` blocks, evenly spread, in the backward pass (None: of all); Chen et al. 2016 (https://arxiv.org/abs/1604.06174)."""
    blocks = flux1.blocks(model)
    count = len(blocks) if count is None else min(count, len(blocks))
    chosen = {id(blocks[i * len(blocks) // count]) for i in range(count)}

    def run(block: torch.nn.Module, *args: Any) -> Any:
        call = partial(checkpoint, block.__call__, use_reentrant=False) if id(block) in chosen else block
        return call(*args)

    model.enable_gradient_checkpointing(run)
