"""How long a checkpoint blocks training, and how long its background write takes: at the miniature's size and at about 1 GB of state.

`python -m bench.dev2pro.training.checkpoint [checkpoints]`. A checkpoint costs a copy of weights, averages and moments to host memory; the
rest is written by a thread while steps go on. Beside it the same bytes written while the training waits, which is what it would cost else.
"""

import os
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from diffusers import FluxTransformer2DModel

import stages  # noqa: F401  (quiets the libraries)
from bench.pairs import machine, median, spread
from dev2pro.models import flux1
from dev2pro.training import distributed
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

BASE = "data/miniature/pipeline"
BATCH = 8
LARGE = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "attention_head_dim": 64}


def large() -> FluxTransformer2DModel:
    """A transformer with the miniature's interface and about sixty times its size."""
    config = {**FluxTransformer2DModel.load_config(BASE, subfolder="transformer"), **LARGE, "axes_dims_rope": (16, 24, 24)}
    return FluxTransformer2DModel.from_config(config)


def bench(name: str, model: FluxTransformer2DModel, times: int) -> None:
    hardware = HardwareConfig(device="cpu", threads=1)
    training = Training(distributed.accelerator(hardware), model, OptimConfig(lr=1e-5), hardware, steps=10_000, batch=BATCH, ema=0.99)
    x, prompt, pooled = torch.randn(BATCH, 16, 16), torch.randn(BATCH, 8, 64), torch.randn(BATCH, 64)

    def compute_loss(_: range) -> torch.Tensor:
        return flux1.predict(training.model, x, torch.full((BATCH,), 0.5), flux1.build_conditioning(prompt, pooled, (4, 4)), 1.0).square().mean()

    def step(number: int) -> float:
        before = time.perf_counter()
        training.step(number, lambda slots: slots, compute_loss)
        return since(before)

    with tempfile.TemporaryDirectory(dir=".") as out:
        checkpoints = Checkpoints(out, training, CheckpointConfig(every=1, keep=1), 10_000, {})
        for number in range(3):
            step(number)
        alone, beside, stalls, written, waiting = [step(number) for number in range(5)], list[float](), list[float](), list[float](), list[float]()
        for number in range(times):
            before = time.perf_counter()
            checkpoints.on_step_end(2 * number + 1, [])
            stalls.append(since(before))
            while checkpoints._writing and not checkpoints._writing.done():
                beside.append(step(number))
            written.append(since(before))
            checkpoints.wait()
            before = time.perf_counter()
            checkpoints.on_step_end(2 * number + 2, [])
            checkpoints.wait()
            waiting.append(since(before))
        size = sum(file.stat().st_size for folder in os.scandir(out) for file in os.scandir(folder.path))
    usual, stall = median(alone), median(stalls)
    print(f"\n{name}: {size / 1e6:,.1f} MB a checkpoint, {times} of them")
    print(f"  a step                                 {spread(alone)} ms")
    print(f"  the training stands still for one      {spread(stalls)} ms, {stall / usual:.2f} of a step")
    print(f"  ... if it waited for the writing       {spread(waiting)} ms, {median(waiting) / usual:.2f} of a step")
    print(f"  it is written after                    {spread(written)} ms; a step meanwhile takes {median(beside) / usual:.2f} times as long")


def since(before: float) -> float:
    """Milliseconds."""
    return 1000 * (time.perf_counter() - before)


def main(times: int) -> None:
    machine()
    bench("the miniature", flux1.load_transformer(BASE), times)
    bench("a larger one", large(), times)
    machine()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
