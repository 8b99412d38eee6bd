"""The plan before the bill: what `plan=true` prints, and the check at the start of every run on a GPU."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dev2pro.errors import ConfigError
from dev2pro.planning import inference_account, report, training_account
from dev2pro.planning.account import Account, Layout, Size
from dev2pro.training import distributed, optim


def check(stage: str, config: Any, sizes: Sequence[Size], prompts: int = 0) -> bool:
    """Plans a stage: true where that was all, because of `plan=true`. Raises ConfigError for what does not fit.

    `sizes`: of the pictures, the buckets of a training; `prompts`: how many are evaluated. A run without a GPU is planned only if the hardware
    file names a card (hardware.card_gb). One rank plans for all.
    """
    card = card_bytes(config)
    if not (config.plan or card) or os.environ.get("RANK", "0") != "0":
        return config.plan
    if stage in ("recover", "distill"):  # what the run would refuse is not reckoned
        distributed.check_full(config.hardware)
        distributed.check_batch(config.batch, config.hardware, Layout.of(config).ranks)
        optim.check(config.optim, config.hardware.weights, shard=config.hardware.shard)
    needed = estimate(stage, config, sizes, prompts)
    print(report.table(needed, config, card) if config.plan else "\n".join(report.summary(needed, config, card)), flush=True)
    if found := report.misfits(needed, config, card):
        raise ConfigError(" ".join(found))
    if config.plan and card:
        print(f"\nIt fits. {verdict(needed, card)}{fewer_recomputed(stage, config, sizes, needed, card)}", flush=True)
    return config.plan


def card_bytes(config: Any) -> float:
    """Bytes of one GPU: for a run those of the visible one, for a plan those that hardware.card_gb names; 0 where neither is known."""
    visible = torch.cuda.is_available() and config.hardware.device != "cpu"
    if visible and not (config.plan and config.hardware.card_gb):
        return torch.cuda.get_device_properties(0).total_memory
    return config.hardware.card_gb * 1e9


def estimate(stage: str, config: Any, sizes: Sequence[Size], prompts: int = 0) -> Account:
    """The account of a stage."""
    if stage == "encode":
        return inference_account.encoding(stage, config, sizes)
    if stage in ("evaluate", "tune"):
        return inference_account.evaluation(stage, config, sizes, prompts)
    return training_account.training(stage, config, sizes)


def spare(needed: Account, card: float) -> float:
    """The share of a card that the largest phase leaves free."""
    return 1 - needed.peak[1] / card


def fewer_recomputed(stage: str, config: Any, sizes: Sequence[Size], needed: Account, card: float) -> str:
    """How many blocks a training need recompute, if the card has room for the activations of the others; empty if it needs all."""
    hardware = config.hardware
    if not (needed.blocks and hardware.gradient_checkpointing):
        return ""
    now = needed.blocks if hardware.checkpointed_blocks is None else hardware.checkpointed_blocks
    kept = estimate(stage, replace(config, hardware=replace(hardware, gradient_checkpointing=False)), sizes)
    a_block = (_train(kept) - _train(needed)) / max(now, 1)
    fewest = max(0, now - int((card * (1 - report.SPARE) - _train(needed)) / a_block))
    return f" hardware.checkpointed_blocks={fewest} of {needed.blocks} would use it and save time." if 0 <= fewest < now else ""


def _train(needed: Account) -> float:
    return sum(needed.gpu["train"].values())


def verdict(needed: Account, card: float) -> str:
    """One sentence about what is left of the card."""
    left = spare(needed, card)
    close = "" if left >= report.SPARE else f" Less than {report.SPARE:.0%}: fragments between tensors may fill it."
    return f"{left:.0%} of the card stay free.{close}"
