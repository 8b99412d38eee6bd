"""Optimizer, learning-rate schedule and weight averaging, as the stages' configs name them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from dev2pro.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """How the weights are moved; see the stages' yaml files."""

    name: str = "adamw"  # adamw (torch, fused) or adamw_8bit (torchao, stochastic rounding for bfloat16 weights)
    lr: float
    schedule: str = "cosine"  # a name diffusers' get_scheduler knows: cosine, linear, constant_with_warmup, ...
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of the whole gradient


def optimizer(config: OptimConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a config. Raises ConfigError for a name nobody knows."""
    settings = {"lr": config.lr, "betas": (0.9, config.beta2), "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if config.name == "adamw_8bit":
        from torchao.optim import _AdamW  # noqa: F401  (import early: the package is optional and heavy)
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, bf16_stochastic_round=True, **settings)
    raise ConfigError(f"optim.name={config.name} is unknown. Choose adamw or adamw_8bit.")


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then the named schedule down over the rest of `steps`."""
    names = [s.value for s in SchedulerType]
    if config.schedule not in names:
        raise ConfigError(f"optim.schedule={config.schedule} is unknown. Choose one of {', '.join(names)}.")
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=steps)
