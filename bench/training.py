"""What a training step costs beyond the transformer: our recover step against a bare loop on the same tensors, in pairs.

`make bench`, or `PYTHONPATH=. python bench/training.py [pairs]`. Prints milliseconds per step, medians over the pairs.
"""

import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import stages  # noqa: F401  (quiets the libraries)
from dev2pro import distributed, encodings, flow, flux, optim
from dev2pro.distributed import HardwareConfig
from dev2pro.flux import Conditioning
from dev2pro.optim import OptimConfig
from dev2pro.training import Training

BASE = "data/miniature/pipeline"
STEPS, BATCH, TOKENS, CHANNELS, COUNT = 20, 32, 16, 16, 256
OPTIM = OptimConfig(lr=1e-4)


def data() -> encodings.Encodings:
    """Random encodings of the miniature's shapes."""
    texts = encodings.Texts(torch.randn(11, 8, 64), torch.randn(11, 64), torch.zeros(8, 3), flux.image_ids(4, 4, torch.device("cpu"), torch.float32))
    mean = torch.randn(COUNT, TOKENS, CHANNELS)
    return encodings.Encodings(mean, torch.full_like(mean, 0.1), torch.randint(11, (COUNT,)), texts)


def ours(known: encodings.Encodings) -> float:
    hardware = HardwareConfig(device="cpu", micro_batch=BATCH, threads=1)
    training = Training(distributed.accelerator(hardware), flux.load_transformer(BASE), OPTIM, hardware, steps=STEPS + 2, batch=BATCH, ema=0.99)
    rows = torch.arange(BATCH).numpy()

    def loss_of(batch: encodings.Noised) -> torch.Tensor:
        v = flux.predict(training.model, batch.x_t, batch.t, known.texts.conditioning(batch.captions), 1.0)
        return torch.nn.functional.mse_loss(v, batch.velocity)

    def step(n: int) -> None:
        training.step(n, lambda slots: encodings.noised(known, rows, 0.5, 0.1, 0, n, slots), loss_of)

    return timed(step)


def bare(known: encodings.Encodings) -> float:
    model = flux.load_transformer(BASE).train()
    optimizer = optim.optimizer(OPTIM, model.parameters())
    x0, noise, t = known.mean[:BATCH], torch.randn(BATCH, TOKENS, CHANNELS), torch.rand(BATCH)
    x_t, target = flow.interpolate(x0, noise, t), flow.velocity(x0, noise)
    said: Conditioning = known.texts.conditioning(known.caption[:BATCH])

    def step(_: int) -> None:
        torch.nn.functional.mse_loss(flux.predict(model, x_t, t, said, 1.0), target).backward()
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
    known = data()
    found = [(ours(known), bare(known)) for _ in range(pairs)]
    ratio = statistics.median(a / b for a, b in found)
    own, floor = (statistics.median(times) for times in zip(*found, strict=True))
    print(f"recover step, batch {BATCH}: ours {own:.1f} ms, bare loop {floor:.1f} ms")
    print(f"ratio {ratio:.3f} (median of {pairs} pairs, {min(a / b for a, b in found):.3f} to {max(a / b for a, b in found):.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
