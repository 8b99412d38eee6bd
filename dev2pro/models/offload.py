"""Frozen weights in host memory, copied to the device where they are used: for cards that are smaller than the model.

diffusers' group offloading exchanges a parameter's data under autograd, which the backward pass of a LoRA would then read from the host. Here the
copy is what autograd saves: with activation checkpointing the weights of one block at a time are on the device.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dev2pro.models import flux1


class OffloadedLinear(torch.nn.Linear):
    """A linear layer whose weights stay where they are, and that computes where its input is."""

    def forward(self, input: Tensor) -> Tensor:
        """As Linear's."""
        weight, bias = (None if value is None else value.to(input.device, non_blocking=True) for value in (self.weight, self.bias))
        return functional.linear(input, weight, bias)


def place(model: torch.nn.Module, device: torch.device, count: int) -> None:
    """Moves the model to `device`, but for the frozen linear layers of `count` blocks, evenly spread."""
    blocks = flux1.blocks(model)
    count = min(count, len(blocks))
    for i in range(count):
        for module in blocks[i * len(blocks) // count].modules():
            if type(module) is torch.nn.Linear and not module.weight.requires_grad:
                module.__class__ = OffloadedLinear
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, OffloadedLinear):
                setattr(module, name, torch.nn.Parameter(parameter.data.to(device), requires_grad=parameter.requires_grad))
            elif device.type == "cuda":
                setattr(module, name, torch.nn.Parameter(parameter.data.pin_memory(), requires_grad=False))
