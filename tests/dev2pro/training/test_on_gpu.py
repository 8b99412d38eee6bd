"""What only a GPU can show of a training step; `make gpu PIECE=tests`. Collected everywhere, skipped where there is no CUDA device."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from dev2pro.models import encodings, flux1, lora
from dev2pro.models.encodings import EncodedBatch, NoisedBatch
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

pytestmark = pytest.mark.gpu

BATCH, STEPS = 8, 20
SCHEDULER = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 4096}
ADAPTER = AdapterConfig(rank=8, alpha=8, targets="attention+mlp")
LORA = {"dtype": "bfloat16", "int8_base": True, "gradient_checkpointing": True, "micro_batch": 2}


def encoded(grid: tuple[int, int], device: str = "cuda") -> EncodedBatch:
    """Random encodings of the tiny pipeline's shapes."""
    draw = torch.Generator().manual_seed(0)
    mean, prompt, pooled = (torch.randn(BATCH, *shape, generator=draw).to(device) for shape in ((grid[0] * grid[1], 16), (8, 64), (64,)))
    return EncodedBatch(mean, torch.full_like(mean, 0.1), prompt, pooled, grid)


def noised(batch: EncodedBatch, slots: range = range(BATCH)) -> NoisedBatch:
    device = batch.mean.device
    chosen = EncodedBatch(batch.mean[slots], batch.std[slots], batch.prompt[slots], batch.pooled[slots], batch.grid)
    return encodings.noise_batch(chosen, (torch.zeros(8, 64, device=device), torch.zeros(64, device=device)), SCHEDULER, 0.0, 0, 0, slots)


class Run:
    """Trains the tiny transformer, or a LoRA on it, on the GPU, always on the same samples."""

    def __init__(self, tiny: Path, *, adapter: bool = False, lr: float = 1e-3, **hardware) -> None:
        config = HardwareConfig(**{"micro_batch": BATCH, **hardware})
        accelerator = distributed.accelerator(config)
        assert accelerator.device.type == "cuda"
        model = flux1.load_transformer(str(tiny), config.weights)
        if config.int8_base:
            lora.to_int8(model, accelerator.device)
        if adapter:
            lora.inject(model, ADAPTER, 0)
        self.training = Training(accelerator, model, OptimConfig(lr=lr, schedule="constant"), config, steps=100, batch=BATCH)

    def step(self, number: int, grid: tuple[int, int] = (4, 4)) -> float:
        batch = encoded(grid)
        return self.training.step(number, lambda slots: noised(batch, slots), lambda part: flow_matching_loss(self.training.model, part, 1.0))[0]


def test_bfloat16_on_the_gpu_predicts_as_float32_on_the_cpu(tiny):
    reference, batch = flux1.load_transformer(str(tiny)), noised(encoded((8, 4), "cpu"))
    expected = flux1.predict(reference, batch.x_t, batch.t, batch.conditioning, 1.0)
    there = noised(encoded((8, 4)))
    predicted = flux1.predict(flux1.load_transformer(str(tiny), torch.bfloat16).to("cuda"), there.x_t, there.t, there.conditioning, 1.0)
    assert (predicted.device.type, predicted.dtype) == ("cuda", torch.bfloat16)
    assert (predicted.float().cpu() - expected).norm() / expected.norm() < 0.03


def test_attention_is_flash(tiny):
    run = Run(tiny, mixed_precision="bf16")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step(0)
    kernels = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    flash = [name for name in kernels if "flash" in name or "cudnn" in name]
    assert flash, kernels
    assert not [name for name in kernels if "math" in name or "efficient" in name], kernels


def test_compiled_blocks_compile_once_for_every_bucket(tiny):
    run = Run(tiny, compile=True, mixed_precision="bf16", gradient_checkpointing=True, micro_batch=4)
    counters.clear()
    for number, grid in enumerate([(4, 4), (6, 4)]):  # the second size makes the lengths symbols
        run.step(number, grid)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2, "no block was compiled"
    for number, grid in enumerate([(4, 6), (8, 4), (4, 8), (6, 6), (4, 4)], 2):
        run.step(number, grid)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_lora_on_an_int8_base_trains(tiny):
    run = Run(tiny, adapter=True, **LORA)
    base = [p for p in run.training.model.parameters() if type(p.data).__name__ == "Int8Tensor" or type(p).__name__ == "Int8Tensor"]
    assert base
    assert all(p.device.type == "cuda" for p in base)
    assert {p.dtype for p in run.training.parameters} == {torch.float32}
    losses = [run.step(number) for number in range(STEPS)]
    assert losses[-1] < 0.98 * losses[0]


def test_8_bit_adamw_moves_bfloat16_weights(tiny):
    run = Run(tiny, dtype="bfloat16", lr=1e-4)
    before = [p.detach().clone() for p in run.training.parameters]
    losses = [run.step(number) for number in range(STEPS)]
    assert type(run.training.optimizer).__name__ == "AdamW8bit"
    kinds = {type(value).__name__ for state in run.training.optimizer.state.values() for value in state.values()}
    assert "OptimState8bit" in kinds, kinds
    moved = sum((p != old).sum().item() for p, old in zip(run.training.parameters, before, strict=True)) / sum(map(torch.numel, before))
    assert moved > 0.2
    assert losses[-1] < losses[0]


def test_the_timer_reports_the_gpus_memory(tiny):
    torch.cuda.reset_peak_memory_stats()
    run = Run(tiny)
    run.step(0)
    assert run.training.clock.metrics()["peak_memory_mb"] == round(torch.cuda.max_memory_allocated() / 2**20)
