"""The size of a training state, parameter by parameter, and the check that the disk holds every checkpoint a run keeps at one time."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import torch
from torch import Tensor, nn

from dev2pro.artifacts.record import STEPS
from dev2pro.errors import SpaceError
from dev2pro.training.checkpoint_files import MARGIN
from dev2pro.training.optim import OptimConfig, chosen

AVERAGE = 4  # bytes of an averaged weight: float32
STEP = 4  # bytes of an optimizer's step counter, one a parameter
BLOCK, SMALLEST = 256, 4096  # torchao's 8-bit moments: values that share a float32 scale, and the smallest parameter that has them
CODES = 256 * 4  # bytes of the table that 8-bit values look up, one a moment


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and how long a stop may take."""

    every: int  # steps; a run killed in between resumes from the last checkpoint with the same result
    keep: int = 2  # the newest ones; the one with the lowest held-out loss is kept as well
    grace: float | None = None  # seconds from SIGTERM or SIGINT until the checkpoint must be written; None: by size and measured speed


@dataclass(slots=True, kw_only=True)
class LoraCheckpointConfig(CheckpointConfig):
    """The checkpoints of a LoRA, and which of its steps are kept as LoRAs besides, for `stages.tune` to choose among."""

    loras: int = 0  # steps from one to the next; 0 keeps none

    def count(self, steps: int) -> int:
        """How many LoRAs of steps a run of so many has."""
        return steps // self.loras if self.loras else 0


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that a checkpoint of the model holds."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_bytes(parameters: Iterable[Tensor], optim: OptimConfig, average: bool) -> int:
    """Bytes of a checkpoint's tensors: weights, their average if there is one, two moments. The parameters may lie on the meta device."""
    total = 0
    for parameter in parameters:
        values, width = parameter.numel(), parameter.element_size()
        total += values * (width + average * AVERAGE) + 2 * _moment(values, width, chosen(optim, parameter.dtype)) + STEP
    return total


def _moment(values: int, width: int, optimizer: str) -> int:
    in_8_bits = optimizer == "adamw_8bit" and values >= SMALLEST and values % BLOCK == 0
    return values + values // BLOCK * 4 + CODES if in_8_bits else values * width


def check(
    out: str, model: nn.Module, optim: OptimConfig, config: CheckpointConfig, steps: int, ema: float, result: torch.dtype, intermediate: int = 0, *,
    whole: bool = True,
) -> None:  # fmt: skip
    """Raises SpaceError if what the run holds at one time does not fit into `out`. The model may be on the meta device.

    It is saved as `result`, with its frozen weights if `whole`. While a checkpoint is written there are the `keep` newest, the best and it; when
    the result is written, one less. `intermediate` results of earlier steps are there besides. What is there counts.
    """
    state = state_bytes(trained(model), optim, bool(ema))
    weights = sum(parameter.numel() for parameter in (model.parameters() if whole else trained(model))) * result.itemsize
    written = max(1, -(-steps // config.every))
    most, last = min(config.keep + 2, written), min(config.keep + 1, written)
    need = MARGIN * (max(most * state, last * state + weights) + intermediate * weights)
    kept = [folder for pattern in ("checkpoint-*", f"{STEPS}/*") for folder in Path(out).glob(pattern)]
    there = sum(file.stat().st_size for folder in kept for file in folder.iterdir())
    free = disk_usage(next(place for place in (Path(out), *Path(out).absolute().parents) if place.exists())).free
    if need - there <= free:
        return
    besides = f", besides {intermediate} LoRAs of intermediate steps" if intermediate else ""
    less = f"Set checkpoint.keep=1 for {MARGIN * state * (most - 3) / 1e9:.3g} GB less, make" if most > 3 else "Make"
    raise SpaceError(
        f"This run needs {need / 1e9:.3g} GB in {out}: up to {most} checkpoints of {state / 1e9:.3g} GB (the {config.keep} newest, the best and the "
        f"one being written), and in the end the result of {weights / 1e9:.3g} GB beside {last} of them{besides}. "
        f"Of that {there / 1e9:.3g} GB are there, and {free / 1e9:.3g} GB are free. {less} room, or choose another out=."
    )
