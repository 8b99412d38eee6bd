"""Frozen weights that wait in host memory: the same gradients, and nothing forgotten on the way to the device."""

import pytest
import torch

from dev2pro.models import flux1, lora, offload
from dev2pro.models.lora import AdapterConfig
from dev2pro.models.offload import OffloadedLinear


def model(tiny, *, int8: bool = False) -> torch.nn.Module:
    transformer = flux1.load_transformer(str(tiny))
    if int8:
        lora.to_int8(transformer, torch.device("cpu"))
    lora.inject(transformer, AdapterConfig(rank=4, alpha=4, targets="attention+mlp"), 0)
    for module in transformer.modules():
        if isinstance(module, lora.MasterLinear):
            torch.nn.init.normal_(module.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return transformer


def loss(transformer: torch.nn.Module, device: str = "cpu") -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, prompt, pooled = (torch.randn(2, *shape, generator=draw).to(device) for shape in ((16, 16), (8, 64), (64,)))
    conditioning = flux1.build_conditioning(prompt, pooled, (4, 4))
    return flux1.predict(transformer, x, torch.tensor([0.3, 0.7]).to(device), conditioning, 1.0).square().mean()


def offloaded(transformer: torch.nn.Module) -> list[bool]:
    """Block by block, whether its linear layers wait in host memory."""
    return [any(isinstance(module, OffloadedLinear) for module in block.modules()) for block in flux1.blocks(transformer)]


@pytest.mark.parametrize("int8", [False, True])
def test_the_same_loss_and_gradients(tiny, int8):
    usual, saving = model(tiny, int8=int8), model(tiny, int8=int8)
    offload.place(saving, torch.device("cpu"), 99)
    assert all(offloaded(saving))
    saving.enable_gradient_checkpointing()
    losses = [loss(transformer) for transformer in (usual, saving)]
    assert losses[0] == losses[1]
    for value in losses:
        value.backward()
    gradients = [[p.grad for p in transformer.parameters() if p.requires_grad] for transformer in (usual, saving)]
    assert len(gradients[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_only_frozen_linear_layers_of_some_blocks_wait(tiny):
    transformer = model(tiny)
    blocks = len(flux1.blocks(transformer))
    offload.place(transformer, torch.device("meta"), 2)
    assert [i for i, waits in enumerate(offloaded(transformer)) if waits] == [0, blocks // 2]
    for name, module in transformer.named_modules():
        for parameter in module.parameters(recurse=False):
            assert (parameter.device.type == "cpu") == isinstance(module, OffloadedLinear), name
            assert not (parameter.requires_grad and parameter.device.type == "cpu"), name


def test_a_pass_on_another_device_meets_every_weight_there(tiny):
    transformer = model(tiny)
    offload.place(transformer, torch.device("meta"), 99)  # a device without numbers: what was left on the CPU would fail
    value = loss(transformer, "meta")
    value.backward()
    assert value.device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in transformer.parameters() if p.requires_grad)
