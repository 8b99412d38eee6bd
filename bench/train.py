"""What a training step costs, on the code that the stages run: `python -m bench.train recover --size tiny hardware=cpu [key=value ...]`.

`--size`: miniature, tiny, small, 12b, or blocks and width such as 4+8x512; all but the miniature have random weights. Everything else is the stage's
own configuration (conf/), so that any key of it can be given: hardware=gpu24, hardware.micro_batch=4, optim.name=adamw_8bit, adapter.rank=32. Under
`python -m dev2pro.ranks --nproc-per-node=8 -m bench.train ...` it runs on several ranks.

First `--steps` steps are timed as a stage takes them. Then as many again with the device awaited at every border between their parts, for their
shares, and two under torch's profiler. Model FLOP utilisation is the FLOPs of forward and backward, as torch counts them on the model without
recomputation, against `--rate`, or against a large matrix multiplication measured on the device.
"""

import stages  # isort: skip  # noqa: F401  (first, because it quiets the libraries)

import argparse
import dataclasses
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from torchao.quantization import Int8Tensor

from bench import models, parts, report
from bench.parts import Parts
from data.sources import RunSnapshots
from dev2pro.artifacts.record import ROOT
from dev2pro.models import encodings, flux1, lora, model_folder
from dev2pro.models.encodings import NoisedBatch
from dev2pro.training import distributed, feed, sharding, wrapping
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.step import Training
from stages import frame

WARM = 2
PROFILED, SHOWN = 2, 12  # steps, operators
MINIATURE = "miniature"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured. `px`, `tokens`, `micro_batch`: None for the size's or the stage's own; `rate`: FLOP/s of the device, None to measure it."""

    stage: str
    size: str = "tiny"
    px: int | None = None
    tokens: int | None = None
    micro_batch: int | None = None
    steps: int = 10
    rate: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """The stage's configuration as overrides, the given ones last."""
        common = ["hardware=cpu", "out=unused", *(["trained_on=${model.path}"] if self.stage == "lora" else [])]
        if self.size == MINIATURE:
            given = ["experiment=miniature", *common]
        else:
            shape = models.size(self.size)
            px = self.px or shape.pixels[0]
            given = [
                *common, f"model.path={models.pipeline(self.size)}", f"model.max_sequence_length={self.tokens or shape.tokens}",
                f"data.train=[{models.pictures(px)}]", f"data.heldout=[{models.held_out(px)}]", f"data.resolution={px}", "data.aspect=1",
                "data.bucket_step=16", "probe.samples=1", f"data.read.cache={models.FOLDER}/cache",
            ]  # fmt: skip
        if self.micro_batch:
            ranks = int(os.environ.get("WORLD_SIZE", 1))
            given += [f"hardware.micro_batch={self.micro_batch}", f"batch={self.micro_batch * ranks}"]
        return [*given, *self.overrides]


def composed(stage: str, keys: list[str]) -> Any:
    """The stage's typed and checked configuration. Raises ConfigError as the stage would."""
    module = importlib.import_module(f"stages.{stage}")
    schema = getattr(module, f"{stage.title()}Config")
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = frame.typed(schema, hydra.compose(stage, keys))
    with mock.patch.object(model_folder, "check_models"):  # weights are looked for there, and a bench's are random
        module.check(config)
    return config


def random_transformer(shape: dict[str, Any], hardware: HardwareConfig, accelerator: Accelerator) -> FluxTransformer2DModel:
    """Random weights where `wrapping.load_transformer` would put a model's: in host memory, or sharded on the devices."""
    transformer = models.unfilled(shape, hardware.weights)
    if hardware.float8:
        wrapping.to_float8(transformer, accelerator.device)
    if hardware.shard:
        sharding.shard(transformer, sharding.mesh(accelerator.device, accelerator.num_processes, hardware.replicas), hardware.compute)
    models.fill(transformer, accelerator.device if hardware.shard else "cpu")
    return transformer


class Bench:
    """A stage's training, built of the stage's own parts up to its first step."""

    def __init__(self, asked: Asked, config: Any, out: str) -> None:
        self.asked, self.config, self.hardware = asked, config, config.hardware
        if asked.stage == "lora":
            self.hardware = dataclasses.replace(config.hardware, step_in_backward=False)  # as the stage does
        self.accelerator = distributed.accelerator(config.hardware)
        self.device = self.accelerator.device
        self.parts = Parts(self.device)
        with self.accelerator.main_process_first():
            snapshots = RunSnapshots(config.data, out, resuming=False, is_main_process=self.accelerator.is_main_process)
            snapshots.write_and_verify()
        stream = parts.Watched(snapshots.stream(config.seed, config.batch, self.accelerator.process_index), self.parts)
        held_out = snapshots.reference(config.probe.samples)
        self.feed, self.prompt_encoder, self.held_out = feed.prepare(config.model, stream, held_out, config.hardware, self.accelerator)
        self.shape = model_folder.transformer_config(config.model.path)
        if asked.size == MINIATURE:
            transformer = wrapping.load_transformer(config.model.path, self.hardware, self.accelerator)
        else:
            transformer = random_transformer(self.shape, self.hardware, self.accelerator)
        self.parameters, self.int8_layers = sum(p.numel() for p in transformer.parameters()), 0
        if asked.stage == "lora":
            if self.hardware.int8_base:
                lora.to_int8(transformer, self.device)
                self.int8_layers = sum(isinstance(p.data, Int8Tensor) for p in transformer.parameters())
            lora.inject(transformer, config.adapter, config.seed)
        self.total = WARM + 2 * asked.steps + PROFILED
        ema = getattr(config, "ema", 0.0)
        self.training = Training(
            self.accelerator, transformer, config.optim, self.hardware, steps=self.total, batch=config.batch, ema=ema, guard=config.guard
        )
        self.scheduler = flux1.scheduler_settings(config.model.path)
        self.feed.begin(0, self.total, self.training.slots)
        self.done = 0

    def make_batch(self, slots: range) -> NoisedBatch:
        """The stage's, with its parts timed."""
        config = self.config
        with self.parts.within("encoding"):
            encoded = self.feed.get_batch(self.done, slots)
        with self.parts.within("noise"):
            dropout = config.caption_dropout
            return encodings.noise_batch(encoded, self.prompt_encoder.empty, self.scheduler, dropout, config.seed, self.done, slots)

    def compute_loss(self, batch: NoisedBatch) -> torch.Tensor:
        """The stage's. What follows it until the next batch or the optimizer is backward."""
        with self.parts.within("forward"):
            loss = flow_matching_loss(self.training.model, batch, self.config.guidance)
        self.parts.enter("backward")
        return loss

    def step(self) -> None:
        self.training.step(self.done, self.make_batch, self.compute_loss)
        self.parts.enter("rest")
        self.done += 1

    def timed(self, steps: int) -> tuple[float, float]:
        """Wall and CPU seconds of a step, the device awaited at the end only."""
        parts.wait(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        parts.wait(self.device)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps

    def profiled(self) -> list[dict[str, Any]]:
        """The operators that cost most: name, calls and milliseconds a step, share. On a GPU its kernels' time, else the CPU's."""
        cuda = self.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=activities) as profile:
            self.timed(PROFILED)
        spent: dict[str, tuple[float, int]] = {}
        for event in profile.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[event.key] = us, event.count
        whole = sum(us for us, _ in spent.values()) or 1.0
        most = sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]
        return [
            {"operator": name, "calls": calls // PROFILED, "ms": round(us / PROFILED / 1000, 3), "share": round(us / whole, 4)}
            for name, (us, calls) in most
        ]

    def flops(self) -> dict[str, float]:
        """FLOPs of one sample, forward alone and forward with backward: torch's count on the stage's model and loss, on the meta device."""
        with torch.device("meta"):
            model = FluxTransformer2DModel.from_config(self.shape)
            if self.asked.stage == "lora":
                lora.inject(model, self.config.adapter, 0)
        tokens, text = self.held_out.mean.shape[1], self.held_out.prompt.shape[1]
        x, prompt, pooled, t = (
            torch.empty(1, *shape, device="meta")
            for shape in (
                (tokens, self.shape["in_channels"]), (text, self.shape["joint_attention_dim"]), (self.shape["pooled_projection_dim"],), (),
            )
        )  # fmt: skip
        conditioning = flux1.build_conditioning(prompt, pooled, self.held_out.grid)
        return parts.counted(lambda: flow_matching_loss(model, NoisedBatch(x, x, x, t, conditioning), 1.0))


def measure(asked: Asked) -> dict[str, Any]:
    """Everything about one configuration, as values for JSON; the same on every rank but for memory and times of its own."""
    config = composed(asked.stage, asked.keys)
    with tempfile.TemporaryDirectory() as out:
        bench = Bench(asked, config, out)
        bench.timed(WARM)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = bench.timed(asked.steps)
        peak = bench.training.clock.metrics()["peak_memory_mb"]
        with bench.parts.awaited():
            bench.timed(asked.steps)
        operators = bench.profiled()
    hardware, ranks, flops = bench.hardware, bench.accelerator.num_processes, bench.flops()
    rate = asked.rate or parts.matmul_rate(bench.device, hardware.compute)
    return {
        **report.environment(bench.device), "stage": asked.stage, "size": asked.size, "parameters": bench.parameters,
        "overrides": list(asked.overrides), "hardware": dataclasses.asdict(hardware), "optimizer": type(bench.training.optimizer).__name__,
        "sharded": sharding.is_sharded(bench.training.model), "int8_layers": bench.int8_layers, "pixels": config.data.resolution,
        "tokens": [bench.held_out.mean.shape[1], bench.held_out.prompt.shape[1]], "batch": config.batch, "ranks": ranks, "steps": asked.steps,
        "seconds": wall, "cpu_seconds": cpu, "samples_per_second": config.batch / wall, "flops": flops, "rate": rate,
        "rate_measured": asked.rate is None, "utilisation": flops["step"] * config.batch / wall / ranks / rate, "peak_mb": peak,
        "shares": bench.parts.shares(), "operators": operators,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """A result for people."""
    flops, shares = result["flops"], result["shares"]
    source = "measured on a matrix product" if result["rate_measured"] else "as given"
    lines = [
        f"{result['stage']} {result['size']}: {result['parameters'] / 1e6:,.1f} M parameters, {result['pixels']} px ({result['tokens'][0]} + "
        f"{result['tokens'][1]} tokens), batch {result['batch']} in micro-batches of {result['hardware']['micro_batch']}, {result['optimizer']}",
        f"on {result['ranks']} x {result['device']}, torch {result['versions']['torch']}, {result['date']}",
        f"  a step              {result['seconds']:10.4f} s, {result['cpu_seconds']:.4f} s of CPU; {result['samples_per_second']:.3f} samples/s",
        f"  FLOPs a sample      {flops['step'] / 1e9:10,.2f} G, of them forward {flops['forward'] / 1e9:,.2f} G",
        f"  utilisation         {result['utilisation']:10.1%} of {result['rate'] / 1e9:,.1f} GFLOP/s, {source}",
        f"  peak memory         {result['peak_mb']:10,} MiB",
        f"  shares              {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}",
    ]
    lines += [f"  {row['operator'][:60]:60} {row['calls']:6} calls {row['ms']:10.2f} ms {row['share']:6.1%}" for row in result["operators"]]
    return "\n".join(lines)


def main(asked: Asked, out: Path, show: Callable[[str], None] = print) -> None:
    result = measure(asked)
    if os.environ.get("RANK", "0") == "0":
        show(table(result))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def parsed() -> tuple[Asked, Path]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("recover", "lora"))
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--px", type=int)
    parser.add_argument("--tokens", type=int, help="of a prompt")
    parser.add_argument("--micro-batch", type=int, help="and batch: one micro-batch a rank")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, help="FLOP/s of the device, such as 790e12")
    parser.add_argument("--out", type=Path, default=models.FOLDER / "train.json")
    given, overrides = parser.parse_known_args()
    values = vars(given)
    out = values.pop("out")
    return Asked(**values, overrides=tuple(overrides)), out


if __name__ == "__main__":
    main(*parsed())
