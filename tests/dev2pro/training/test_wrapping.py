"""Which blocks are recomputed and compiled, and that neither changes the training."""

import re
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import distributed, wrapping
from dev2pro.training.distributed import HardwareConfig

GRIDS = ((4, 4), (4, 8), (8, 4), (6, 6), (2, 10))


def loss(model: torch.nn.Module, grid: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, prompt, pooled = (torch.randn(2, *shape, generator=draw).to(dtype) for shape in ((grid[0] * grid[1], 16), (8, 64), (64,)))
    return flux1.predict(model, x, torch.tensor([0.3, 0.7]), flux1.build_conditioning(prompt, pooled, grid), 1.0).float().square().mean()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def prepared(tiny, dtype: torch.dtype = torch.float32, adapter: bool = False, **values) -> torch.nn.Module:
    hardware = HardwareConfig(device="cpu", threads=1, **values)
    model = flux1.load_transformer(str(tiny), dtype)
    if hardware.int8_base:
        lora.to_int8(model, torch.device("cpu"))
    if adapter:
        lora.inject(model, AdapterConfig(rank=4, alpha=4, targets="attention+mlp"), 0)
    return wrapping.prepare(model, hardware, distributed.accelerator(hardware))


@pytest.mark.parametrize(("count", "recomputed"), [(None, 4), (0, 0), (1, 1), (3, 3), (99, 4)])
def test_so_many_blocks_are_recomputed(tiny, count, recomputed):
    model = prepared(tiny, gradient_checkpointing=True, checkpointed_blocks=count)
    blocks, calls = flux1.blocks(model), []
    assert len(blocks) == 4
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    plain = prepared(tiny)
    for one in (model, plain):
        loss(one).backward()
    assert len(calls) == len(blocks) + recomputed
    assert torch.equal(gradients(model), gradients(plain))


class MatrixProducts(TorchDispatchMode):
    """The precisions in which matrices with a side of `rank` are multiplied."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.dtypes = rank, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            operands = [a for a in args if isinstance(a, torch.Tensor)]
            if any(self.rank in a.shape for a in operands):
                self.dtypes |= {a.dtype for a in operands}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("int8", [False, True])
def test_a_lora_keeps_float32_weights_and_computes_in_the_bases_precision(tiny, int8):
    model = prepared(tiny, torch.bfloat16, adapter=True, int8_base=int8, gradient_checkpointing=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with MatrixProducts(rank=4) as products:
        loss(model, dtype=torch.bfloat16).backward()
    assert products.dtypes == {torch.bfloat16}
    assert {p.grad.dtype for p in trained} == {torch.float32}


def test_int8_leaves_the_modulation_alone(tiny):
    model = prepared(tiny, torch.bfloat16, adapter=True, int8_base=True)
    kinds = {
        name: type(p.data).__name__ for name, p in model.named_parameters() if "blocks." in name and name.endswith("weight") and "lora" not in name
    }
    modulation = {name: kind for name, kind in kinds.items() if re.search(r"norm\d?(_context)?\.linear", name)}
    assert len(modulation) == 2 * 2 + 2
    assert set(modulation.values()) == {"Tensor"}
    linear = {kind for name, kind in kinds.items() if name not in modulation and "norm" not in name}
    assert linear == {"Int8Tensor"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float8_rounds_the_blocks_products_and_trains_the_same_weights(tiny, checkpointing):
    hardware = HardwareConfig(device="cpu", threads=1, float8=True, gradient_checkpointing=checkpointing)
    accelerator = distributed.accelerator(hardware)
    model = wrapping.prepare(wrapping.load_transformer(str(tiny), hardware, accelerator), hardware, accelerator)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    rounded = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert rounded == {name for name in kinds if "blocks." in name and not re.search(r"norm\d?(_context)?\.linear", name)}
    plain = prepared(tiny)
    values = [loss(one) for one in (model, plain)]
    for value in values:
        value.backward()
    assert values[0] != values[1]
    assert values[0].item() == pytest.approx(values[1].item(), rel=0.05)
    assert torch.cosine_similarity(gradients(model), gradients(plain), dim=0) > 0.95
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"dtype": torch.float32}, {"adapter": True, "int8_base": True, "dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.ci), "inductor"])
def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_for_a_third_size(tiny, values, backend, monkeypatch):
    """inductor, which the stages use, needs minutes on two cores; the graphs are the same for all."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    dtype, graphs = values["dtype"], []
    compiled, plain = (prepared(tiny, gradient_checkpointing=True, compile=on, **values) for on in (True, False))
    for grid in GRIDS:
        both = [loss(model, grid, dtype) for model in (compiled, plain)]
        for value in both:
            value.backward()
        assert both[0].item() == pytest.approx(both[1].item(), rel=1e-5 if dtype == torch.float32 else 0.02)
        graphs.append(counters["stats"]["unique_graphs"])
    assert torch.cosine_similarity(gradients(compiled), gradients(plain), dim=0) > 0.999
    assert 2 <= graphs[0] < graphs[1]  # two kinds of blocks, for one size and for all
    assert graphs[1:] == [graphs[1]] * (len(GRIDS) - 1)
    assert not counters["graph_break"]
