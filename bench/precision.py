"""What each rung of precision keeps of a training whose updates are far below a bfloat16's last bit, as at lr 1e-5 on weights of FLUX's scale.

python -m bench.precision [steps]
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from dev2pro.models import flux1
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

LR = 2e-5  # a thirtieth of the last bit of a weight of .1 in bfloat16; FLUX: 1e-5 on weights of .02, a tenth
BATCH, TOKENS, EMA = 32, 16, 0.98
RUNGS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({}, "adamw"),
    "float32, computing in bfloat16 (gpu8, gpu64)": ({"mixed_precision": "bf16"}, "adamw"),
    "bfloat16, 8-bit AdamW (gpu141)": ({"dtype": "bfloat16"}, "adamw_8bit"),
    "bfloat16, 8-bit AdamW in the backward pass (gpu80)": (
        {"dtype": "bfloat16", "step_in_backward": True, "ema_every": 10, "ema_offload": True},
        "adamw_8bit",
    ),
    "bfloat16, AdamW rounding to nearest (refused)": ({"dtype": "bfloat16", "ema_offload": True}, "adamw"),
}


@dataclass(frozen=True)
class Kept:
    """`way`: of the float32 run's displacement, along it. `loss`: of the float32 run's fall. Both of the weights and of their average."""

    way: float
    loss: float
    average_way: float
    average_loss: float


def train(path: str, hardware: dict[str, Any], optimizer: str, steps: int) -> dict[str, Any]:
    """Weights before, after and averaged (float32), and the loss of each on all data in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
    config = HardwareConfig(device="cpu", threads=1, micro_batch=BATCH, **hardware)
    model = flux1.load_transformer(path, config.weights)
    data = _data(model, seed=1)
    training = Training(
        distributed.accelerator(config),
        model,
        OptimConfig(name=optimizer, lr=LR, schedule="constant", clip=1e9),
        config,
        steps=steps,
        batch=BATCH,
        ema=EMA,
    )
    start = _flat(training.parameters)
    for step in range(steps):
        x, t, conditioning, target = _data(model, seed=2 + step)
        training.step(
            step,
            lambda slots: slots,
            lambda _: (flux1.predict(training.model, x, t, conditioning, 1.0).float() - target).square().mean(),  # noqa: B023
        )
    found = {"start": start, "end": _flat(training.parameters), "average": _flat(training.ema.average)}
    judge = flux1.load_transformer(path)
    return found | {f"{name} loss": _loss(judge, weights, data) for name, weights in found.items()}


def compare(path: str, steps: int) -> dict[str, Kept]:
    """What each rung keeps."""
    torch.compiler.set_stance("force_eager")  # compiling 8-bit AdamW for every shape takes longer than the training
    runs = {name: train(path, hardware, optimizer, steps) for name, (hardware, optimizer) in RUNGS.items()}
    exact = runs["float32"]

    def way(run: dict[str, Any], what: str) -> float:
        reference = exact[what] - exact["start"]
        return ((run[what] - run["start"]) @ reference / (reference @ reference)).item()

    def fall(run: dict[str, Any], what: str) -> float:
        return (run["start loss"] - run[f"{what} loss"]) / (exact["start loss"] - exact[f"{what} loss"])

    return {name: Kept(way(run, "end"), fall(run, "end"), way(run, "average"), fall(run, "average")) for name, run in runs.items()}


def _data(model: Any, seed: int) -> tuple[Tensor, Tensor, flux1.Conditioning, Tensor]:
    """Inputs, and as target a fixed linear map of them, which the model does not know yet."""
    draw, config = torch.Generator().manual_seed(seed), model.config
    x, prompt, pooled = (
        torch.randn(BATCH, *shape, generator=draw)
        for shape in ((TOKENS, config.in_channels), (8, config.joint_attention_dim), (config.pooled_projection_dim,))
    )
    turn = torch.randn(config.in_channels, config.in_channels, generator=torch.Generator().manual_seed(0)) / config.in_channels**0.5
    return x, torch.rand(BATCH, generator=draw), flux1.build_conditioning(prompt, pooled, (4, 4)), x @ turn


def _flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])


@torch.no_grad()
def _loss(model: torch.nn.Module, weights: Tensor, data: tuple[Tensor, Tensor, flux1.Conditioning, Tensor]) -> float:
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    x, t, conditioning, target = data
    return (flux1.predict(model, x, t, conditioning, 1.0) - target).square().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=600)
    parser.add_argument("--model", default="data/miniature/pipeline")
    given = parser.parse_args()
    for name, kept in compare(given.model, given.steps).items():
        print(
            f"{name:55s} way {kept.way:6.3f}  loss {kept.loss:6.3f}  average: way {kept.average_way:6.3f}  loss {kept.average_loss:6.3f}", flush=True
        )
