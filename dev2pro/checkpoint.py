"""Writes a run down so that it goes on, on any number of ranks, as if nothing had happened: tensors and numbers, no pickle."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dev2pro.errors import ConfigError
from dev2pro.training import Training

NAME = re.compile(r"checkpoint-(\d+)")
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)  # on the first rank; the others get nothing


def save(out: str, training: Training, step: int, data: dict[str, Any], curve: list[dict[str, Any]]) -> None:
    """Writes `out`/checkpoint-<step>, which appears at once and whole, and removes older ones.

    `data` says which samples the run is on, `curve` what was measured so far.
    """
    tensors: dict[str, Any] = {f"model/{name}": value for name, value in get_model_state_dict(training.model, options=GATHERED).items()}
    if training.ema:
        with training.averaged() as model:
            averaged: dict[str, Any] = get_model_state_dict(model, options=GATHERED)
            tensors |= {f"ema/{name}": value.clone() for name, value in averaged.items()}
    moments: dict[str, Any] = get_optimizer_state_dict(training.model, training.optimizer.optimizer, options=GATHERED)
    tensors |= {f"optimizer/{what}/{name}": value for name, values in moments.get("state", {}).items() for what, value in values.items()}
    if training.place.is_main_process:
        state = {"step": step, "ema_steps": training.ema.optimization_step if training.ema else 0, "data": data, "curve": curve}
        _write(Path(out), step, {name: value.contiguous() for name, value in tensors.items()}, state)
    training.place.wait_for_everyone()


def _write(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    partial, whole = out / f"checkpoint-{step}.partial", out / f"checkpoint-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(tensors, partial / "tensors.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    for place in (*partial.iterdir(), partial):
        _to_disk(place)
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    _to_disk(out)
    for other, folder in found(str(out)).items():
        if other != step:
            shutil.rmtree(folder)


def _to_disk(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def found(out: str) -> dict[int, Path]:
    """step -> folder of every whole checkpoint."""
    return {int(name[1]): folder for folder in Path(out).glob("checkpoint-*") if (name := NAME.fullmatch(folder.name))}


def restore(out: str, training: Training, data: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Brings a run back to its last checkpoint: (steps done, curve), (0, []) where there is none.

    Raises ConfigError where the checkpoint is on other samples than `data` says, or is damaged.
    """
    there = found(out)
    if not there:
        return 0, []
    folder = there[max(there)]
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "tensors.safetensors") if training.place.is_main_process else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"The checkpoint {folder} is damaged ({error}). Remove it; the same command then goes on without it.") from error
    if state["data"] != data:
        raise ConfigError(f"The checkpoint {folder} is on other data or another order ({state['data']}, not {data}). Choose another out=.")
    _load(training, tensors, state)
    if training.place.is_main_process:
        print(f"going on after step {state['step']}", flush=True)
    return state["step"], state["curve"]


def _load(training: Training, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    spread = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=torch.distributed.is_initialized())
    if training.ema:
        set_model_state_dict(training.model, _named(tensors, "ema/"), options=spread)
        training.ema.shadow_params = [p.detach().clone() for p in training.parameters]
        training.ema.optimization_step = state["ema_steps"]
    set_model_state_dict(training.model, _named(tensors, "model/"), options=spread)
    optimizer = training.optimizer.optimizer
    fresh: dict[str, Any] = get_optimizer_state_dict(training.model, optimizer, options=GATHERED)
    for name, values in fresh.get("state", {}).items():
        fresh["state"][name] = {what: tensors[f"optimizer/{what}/{name}"] for what in values}
    set_optimizer_state_dict(training.model, optimizer, fresh, options=spread)
    training.schedule.load_state_dict({**training.schedule.state_dict(), "last_epoch": state["step"] - 1})
    training.schedule.step()


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
