"""`python -m tests.dev2pro.planning.measure <stage> <override>...` trains or samples for real and prints the memory it took.

Real weights, real steps of `Training`, in a process of its own: {"rss": bytes of the process's peak beyond what it had before the models,
"live": the peak of the tensors by the dispatch mode}.
"""

import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from dev2pro.models import lora, sampling
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import Encoders
from dev2pro.planning import account, fake_models
from dev2pro.planning.fake_runs import Shape
from dev2pro.planning.live_bytes import LiveBytes
from dev2pro.training import distributed, optim
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.step import Training
from tests.dev2pro.planning.configs import composed

CPU = torch.device("cpu")


def peak() -> int:
    """The most bytes that this process ever had, or has had since `forget_peak`."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def forget_peak(live: LiveBytes) -> None:
    gc.collect()
    live.peak = live.now
    Path("/proc/self/clear_refs").write_text("5")


def real(model: Any) -> Any:
    """A meta model with small random weights."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return model


def filled(batch: NoisedBatch) -> NoisedBatch:
    """The batch, with real numbers in it."""
    for tensor in (batch.x_t, batch.x0, batch.noise, batch.conditioning.prompt, batch.conditioning.pooled):
        tensor.normal_()
    batch.t.fill_(0.5)
    return batch


def transformer(path: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    return real(fake_models.transformer(path, dtype))


def train(config: Any, shape: Shape, live: LiveBytes) -> None:
    """Two optimizer steps, so that every moment is there in the second."""
    model = transformer(config.model.path, config.hardware.weights)
    if config.hardware.int8_base:
        lora.to_int8(model, CPU)
    if hasattr(config, "adapter"):
        lora.inject(model, config.adapter, 0)
    training = Training(
        distributed.accelerator(config.hardware), model, config.optim, config.hardware, steps=9, batch=config.batch, ema=getattr(config, "ema", 0)
    )
    forget_peak(live)
    for step in range(2):
        training.step(step, lambda slots: filled(shape.batch()), lambda batch: flow_matching_loss(training.model, batch, 1.0))


@torch.no_grad()
def evaluate(config: Any, shape: Shape, encoders: Encoders, live: LiveBytes) -> None:
    """Two sampler steps with true CFG, the decoding and the judging of a batch."""
    model, judge = transformer(config.model.path, config.hardware.inference).eval(), real(fake_models.judge(config.judge))
    real(encoders.pipeline.vae)
    forget_peak(live)
    batch = filled(shape.batch())
    latents = sampling.sample(model, batch.noise, batch.conditioning, batch.conditioning, guidance=1.0, cfg_scale=3.5, steps=2, mu=1.0)
    encoders.decode(latents, config.resolution, config.resolution)
    side = judge.config.vision_config.image_size
    judge.get_image_features(torch.rand(account.JUDGED, 3, side, side))


def main(stage: str, *overrides: str) -> None:
    config = composed(stage, *overrides)
    encoders = fake_models.encoders(config.model, config.hardware.encoders)
    resolution = config.resolution if stage == "evaluate" else config.data.resolution
    count = config.sampling.batch if stage == "evaluate" else config.hardware.micro_batch
    shape = account.batch_shape(encoders, (resolution, resolution), count)
    eight_bit = stage != "evaluate" and config.optim.name == "adamw_8bit"
    warm_up()
    if eight_bit:
        compile_optimizer(config)
    gc.collect()
    before = psutil.Process().memory_info().rss
    live = LiveBytes()
    with nullcontext() if eight_bit else live:  # the step of the 8-bit optimizer is compiled, which no dispatch mode may watch
        evaluate(config, shape, encoders, live) if stage == "evaluate" else train(config, shape, live)
    print(json.dumps({"rss": peak() - before, "live": None if eight_bit else live.peak}))


def compile_optimizer(config: Any) -> None:
    """The 8-bit step is compiled for every shape, which takes memory of its own."""
    shapes = {parameter.shape for parameter in fake_models.transformer(config.model.path, config.hardware.weights).parameters()}
    for shape in shapes:
        parameter = nn.Parameter(torch.zeros(shape, dtype=config.hardware.weights))
        parameter.grad = torch.zeros_like(parameter)
        optim.optimizer(config.optim, [parameter]).step()


def warm_up() -> None:
    """What libraries allocate once."""
    linear = nn.Linear(64, 64)
    torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 2, 64, 64, requires_grad=True) for _ in range(3))).sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        linear.to(dtype)(torch.randn(64, 64, dtype=dtype)).sum().backward()
    torch.optim.AdamW(linear.parameters(), fused=True).step()


if __name__ == "__main__":
    main(*sys.argv[1:])
