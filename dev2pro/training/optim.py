"""Optimizer and learning-rate schedule, as the stages' configs name them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from dev2pro.errors import ConfigError

OPTIMIZERS = ("auto", "adamw", "adamw_8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Optimizer settings; see the stages' yaml files."""

    name: str = "auto"  # adamw (torch, fused), adamw_8bit (torchao, stochastic rounding for bfloat16 weights); auto: what fits the weights
    lr: float
    schedule: str = "cosine"  # a name diffusers' get_scheduler knows: cosine, linear, constant_with_warmup, ...
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of the whole gradient


def check(config: OptimConfig, weights: torch.dtype = torch.float32, *, shard: bool = False) -> None:
    """Raises ConfigError for an unknown optimizer or schedule, or one that cannot train `weights`, before any model is loaded."""
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={config.name} is unknown. Choose one of {', '.join(OPTIMIZERS)}.")
    if config.name == "adamw" and weights != torch.float32:
        raise ConfigError(
            "optim.name=adamw on bfloat16 weights loses most of the training: its updates are smaller than half of a weight's last bit and are "
            "rounded away. Set optim.name=adamw_8bit, which rounds them at random, or hardware.dtype=float32 with mixed_precision=bf16."
        )
    if config.name == "adamw_8bit" and shard:
        raise ConfigError(
            "optim.name=adamw_8bit has a state that no other number of ranks could go on with. Set optim.name=adamw, or hardware.shard=false."
        )
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule={config.schedule} is unknown. Choose one of {', '.join(SCHEDULES)}.")


def chosen(config: OptimConfig, weights: torch.dtype) -> str:
    """The optimizer that trains weights of this precision."""
    automatic = "adamw" if weights == torch.float32 else "adamw_8bit"
    return automatic if config.name == "auto" else config.name


def optimizer(config: OptimConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a checked config for parameters of one precision."""
    betas = (0.9, config.beta2)
    if chosen(config, parameters[0].dtype) == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, bf16_stochastic_round=True)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then the named schedule down over the rest of `steps`."""
    check(config)
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=steps)
