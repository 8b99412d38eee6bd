"""Optimizer, learning-rate schedule and weight averaging, as the stages' configs name them."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from dev2pro.errors import ConfigError

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Optimizer settings; see the stages' yaml files."""

    name: str = "adamw"  # adamw (torch, fused) or adamw_8bit (torchao, stochastic rounding for bfloat16 weights)
    lr: float
    schedule: str = "cosine"  # a name diffusers' get_scheduler knows: cosine, linear, constant_with_warmup, ...
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of the whole gradient


def check(config: OptimConfig, *, shard: bool = False) -> None:
    """Raises ConfigError for an unknown or unusable optimizer or schedule, before any model is loaded."""
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={config.name} is unknown. Choose one of {', '.join(OPTIMIZERS)}.")
    if config.name == "adamw_8bit":
        need_torchao("optim.name=adamw_8bit")
        if shard:
            raise ConfigError(
                "optim.name=adamw_8bit has a state that no other number of ranks could go on with. Set optim.name=adamw, or hardware.shard=false."
            )
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule={config.schedule} is unknown. Choose one of {', '.join(SCHEDULES)}.")


def need_torchao(setting: str) -> None:
    """Raises ConfigError if a setting needs torchao and it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"{setting} needs torchao, which is not installed. Run `pip install torchao==0.18.0`.")


def optimizer(config: OptimConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a checked config."""
    betas = (0.9, config.beta2)
    if config.name == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, bf16_stochastic_round=True)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then the named schedule down over the rest of `steps`."""
    check(config)
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=steps)
