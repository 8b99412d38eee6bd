"""Overhead of a training step over the transformer: our recover step against a bare loop on the same tensors, in pairs.

`make bench`, or `python -m bench.dev2pro.training.step [pairs]`. Prints milliseconds per step, medians over the pairs.
"""

import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import stages  # noqa: F401  (quiets the libraries)
from dev2pro.models import encodings, flow_matching, flux1
from dev2pro.models.encodings import EncodedBatch
from dev2pro.training import distributed, optim
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

BASE = "data/miniature/pipeline"
STEPS, BATCH, TOKENS, CHANNELS = 20, 32, 16, 16
OPTIM = OptimConfig(lr=1e-4)


def data() -> EncodedBatch:
    """Random encodings of the miniature's shapes."""
    mean = torch.randn(BATCH, TOKENS, CHANNELS)
    return EncodedBatch(mean, torch.full_like(mean, 0.1), torch.randn(BATCH, 8, 64), torch.randn(BATCH, 64), (4, 4))


def ours(encoded: EncodedBatch) -> float:
    hardware = HardwareConfig(device="cpu", micro_batch=BATCH, threads=1)
    training = Training(distributed.accelerator(hardware), flux1.load_transformer(BASE), OPTIM, hardware, steps=STEPS + 2, batch=BATCH, ema=0.99)
    scheduler, empty = flux1.scheduler_settings(BASE), (torch.zeros(8, 64), torch.zeros(64))

    def compute_loss(batch: encodings.NoisedBatch) -> torch.Tensor:
        v = flux1.predict(training.model, batch.x_t, batch.t, batch.conditioning, 1.0)
        return torch.nn.functional.mse_loss(v, batch.velocity)

    def step(n: int) -> None:
        training.step(n, lambda slots: encodings.noise_batch(encoded, empty, scheduler, 0.1, 0, n, slots), compute_loss)

    return timed(step)


def bare(batch: EncodedBatch) -> float:
    model = flux1.load_transformer(BASE).train()
    optimizer = optim.optimizer(OPTIM, model.parameters())
    x0, noise, t = batch.mean, torch.randn(BATCH, TOKENS, CHANNELS), torch.rand(BATCH)
    x_t, target = flow_matching.interpolate(x0, noise, t), flow_matching.velocity(x0, noise)
    conditioning = flux1.build_conditioning(batch.prompt, batch.pooled, batch.grid)

    def step(_: int) -> None:
        torch.nn.functional.mse_loss(flux1.predict(model, x_t, t, conditioning, 1.0), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)


def timed(step) -> float:
    """Milliseconds a step, after two to warm up."""
    for n in range(2):
        step(n)
    start = time.perf_counter()
    for n in range(STEPS):
        step(n)
    return 1000 * (time.perf_counter() - start) / STEPS


def main(pairs: int) -> None:
    batch = data()
    rounds = [(ours(batch), bare(batch)) for _ in range(pairs)]
    ratio = statistics.median(a / b for a, b in rounds)
    own_time, floor = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"recover step, batch {BATCH}: ours {own_time:.1f} ms, bare loop {floor:.1f} ms")
    print(f"ratio {ratio:.3f} (median of {pairs} pairs, {min(a / b for a, b in rounds):.3f} to {max(a / b for a, b in rounds):.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
