"""What a checkpoint costs, in pairs with torch's own writer: host memory, how long training stands still, how long the writing takes.

`python -m bench.dev2pro.training.checkpoint [pairs]`. At the miniature's size and at about 1 GB of state. `before` is the way up to commit 1096444:
torch's BlockingAsyncStager and HuggingFaceStorageWriter, then each file is read again and hashed. Memory is the process's resident peak above what
it held before the checkpoint, in multiples of the state; of the first checkpoint, whose buffer is new, and of later ones.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed.checkpoint as dcp
from diffusers import FluxTransformer2DModel
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

import stages  # noqa: F401  (quiets the libraries)
from bench.pairs import machine, median, ratio, spread
from dev2pro.models import flux1
from dev2pro.training import checkpoint, checkpoint_files, distributed
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


class Before(Checkpoints):
    """Copies and writes as torch does."""

    class Stager:
        def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return BlockingAsyncStager().stage(tensors)  # type: ignore[return-value]

        def release(self) -> None: ...

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._staging = self.Stager()  # type: ignore[assignment]

    @staticmethod
    def save(tensors: dict[str, torch.Tensor], folder: Path, _group: Any) -> dict[str, list[Any]]:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
        return {file.name: checkpoint_files.read_and_hash(file) for file in folder.iterdir()}


def status(key: str) -> int:
    """Bytes, such as VmRSS and VmHWM of this process."""
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


class Costs:
    """Of the checkpoints of one way: ms that training stood still, ms until written, peak of memory in multiples of the state, ms of steps beside."""

    def __init__(self) -> None:
        self.stalls, self.written, self.peaks, self.beside = list[float](), list[float](), list[float](), list[float]()

    def take(self, checkpoints: Checkpoints, number: int, step: Any) -> None:
        with open("/proc/self/clear_refs", "w") as peak:  # VmHWM begins anew
            peak.write("5")
        held, begin = status("VmRSS"), time.perf_counter()
        checkpoints.on_step_end(number, [])
        self.stalls.append(since(begin))
        while checkpoints._writing and not checkpoints._writing.done():
            self.beside.append(step(number))
        checkpoints.wait()
        self.written.append(since(begin))
        self.peaks.append((status("VmHWM") - held) / checkpoints.stop.state_bytes)


def bench(name: str, model: FluxTransformer2DModel, pairs: int) -> None:
    hardware = HardwareConfig(device="cpu", threads=1)
    training = Training(distributed.accelerator(hardware), model, OptimConfig(lr=1e-5), hardware, steps=10_000, batch=BATCH, ema=0.99)
    x, prompt, pooled = torch.randn(BATCH, 16, 16), torch.randn(BATCH, 8, 64), torch.randn(BATCH, 64)

    def compute_loss(_: range) -> torch.Tensor:
        return flux1.predict(training.model, x, torch.full((BATCH,), 0.5), flux1.build_conditioning(prompt, pooled, (4, 4)), 1.0).square().mean()

    def step(number: int) -> float:
        begin = time.perf_counter()
        training.step(number, lambda slots: slots, compute_loss)
        return since(begin)

    costs, ours = {Before: Costs(), Checkpoints: Costs()}, checkpoint._save
    with tempfile.TemporaryDirectory(dir=".") as out:
        ways = {way: way(f"{out}/{way.__name__}", training, CheckpointConfig(every=1, keep=1), 10_000, {}) for way in costs}
        for way in ways.values():
            way.out.mkdir()
        for number in range(3):
            step(number)
        alone = [step(number) for number in range(5)]
        for number in range(1, pairs + 1):
            for way, checkpoints in ways.items():
                checkpoint._save = Before.save if way is Before else ours
                costs[way].take(checkpoints, number, step)
        state = ways[Checkpoints].stop.state_bytes
    print(f"\n{name}: {state / 1e6:,.1f} MB a checkpoint, {pairs} pairs; a step alone {spread(alone)} ms")
    for way, cost in costs.items():
        print(f"  {'before' if way is Before else 'now'}")
        print(f"    the training stands still for     {spread(cost.stalls)} ms, {median(cost.stalls) / median(alone):.2f} of a step")
        print(
            f"    it is written after               {spread(cost.written)} ms; a step meanwhile takes {median(cost.beside) / median(alone):.2f} times"
        )
        print(f"    host memory, the first and later  {cost.peaks[0]:.2f}, {median(cost.peaks[1:] or cost.peaks):.2f} times the state")
    print(f"  now / before: stands still {ratio(costs[Checkpoints].stalls, costs[Before].stalls)}, "
          f"written {ratio(costs[Checkpoints].written, costs[Before].written)}")  # fmt: skip


def since(begin: float) -> float:
    """Milliseconds."""
    return 1000 * (time.perf_counter() - begin)


def main(pairs: int) -> None:
    machine()
    bench("the miniature", flux1.load_transformer(BASE), pairs)
    bench("a larger one", large(), pairs)
    machine()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
