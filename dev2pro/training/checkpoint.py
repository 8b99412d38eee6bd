"""Writes a run down while it goes on, and brings it back on any number of ranks as if nothing had happened: tensors and numbers, no pickle.

A checkpoint is a folder `checkpoint-<step>`: a safetensors file from each rank that has something to write (torch.distributed.checkpoint's
layout, which any number of ranks reads again), and checkpoint.json with the numbers and the SHA-256 of every file.
"""

import json
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dev2pro import draws, signals
from dev2pro.artifacts.record import digest
from dev2pro.errors import ConfigError, InterruptedRun, SpaceError, out_of_space
from dev2pro.escape import printable
from dev2pro.training import checkpoint_files
from dev2pro.training.step import Training

VERSION = 1


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When, how many, and how long a stop may take."""

    every: int  # steps; killed in between, a run goes on from there with the same result
    keep: int = 2  # the newest ones; the one with the lowest held-out loss is kept besides
    grace: float = 30.0  # seconds from SIGTERM or SIGINT until the checkpoint must be written


class Checkpoints:
    """The checkpoints of a run in `out` over `steps` steps. `data` says which samples the run is on.

    Within `with`, signals wait for the end of the step. `stalled`: seconds that the training stood still for `written` of them.
    """

    def __init__(self, out: str, training: Training, config: CheckpointConfig, steps: int, data: dict[str, Any]) -> None:
        self.out, self.training, self.config, self.steps, self.data = Path(out), training, config, steps, data
        self.stalled, self.written = 0.0, 0
        self._ranks, self._rank, self._main = (
            training.accelerator.num_processes,
            training.accelerator.process_index,
            training.accelerator.is_main_process,
        )
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None  # of its own, for the thread that writes
        self._hands, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        self._around = ExitStack()
        training.stop_requested = lambda: signals.stop_requested() or self._failed()

    _writing: Future | None

    def __enter__(self) -> Self:
        self._around.enter_context(signals.grace_period(self.config.grace))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._around, suppress(Exception) if kind else ExitStack():
            self.wait()

    def on_step_end(self, step: int, curve: list[dict[str, Any]]) -> None:
        """After every step: writes one when it is due, or when a rank was asked to stop, which ends in InterruptedRun.

        Raises DivergedError where the curve's new point is none to go on from.
        """
        new = bool(curve) and curve[-1]["step"] == step
        if new:
            self.training.guard.held_out(curve)
        if step % self.config.every and step != self.steps and not self.training.stopping:
            return
        self.wait()
        before = time.perf_counter()
        training, held_out = self.training, curve[-1]["loss"] if new else None
        numbers = {
            "version": VERSION, "draws": draws.VERSION, "step": step, "data": self.data, "curve": curve, "held_out": held_out,
            "recent": training.guard.recent, "ema_steps": training.ema.optimization_step if training.ema else 0,
        }  # fmt: skip
        copied = BlockingAsyncStager().stage(_tensors(self.training))
        self._writing = self._hands.submit(self._write, step, copied, json.loads(json.dumps(numbers)))
        self.stalled, self.written = self.stalled + time.perf_counter() - before, self.written + 1
        if self.training.stopping:
            self.wait()
            raise InterruptedRun(f"interrupted after step {step} of {self.steps}. The same command goes on from there.")

    def wait(self) -> None:
        """Until the last one is written. Raises SpaceError where it could not be."""
        writing, self._writing, before = self._writing, None, time.perf_counter()
        if writing:
            writing.result()
            self.stalled += time.perf_counter() - before

    def metrics(self) -> dict[str, Any]:
        """What the training was like, for the run's record."""
        return {**self.training.clock.metrics(), "checkpoints": self.written, "stalled_seconds": round(self.stalled, 3)}

    def _failed(self) -> bool:
        return bool(self._writing and self._writing.done() and self._writing.exception())

    # ---- writing, in a thread of every rank ----

    def _write(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        partial = self.out / f"checkpoint-{step}.partial"
        try:
            self._on_all_ranks(lambda: self._begin(partial, tensors))
            self._on_all_ranks(lambda: _save(tensors, partial, self._group))
            mine = self._on_all_ranks(
                lambda: {file.name: checkpoint_files.sealed(file) for file in sorted(partial.glob(f"shard-{self._rank + 1:05d}-*"))}
            )
            numbers["files"] = {name: entry for files in self._gathered(mine) for name, entry in files.items()}
            self._on_all_ranks(lambda: self._publish(partial, step, numbers))
        except BaseException:
            if self._main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _begin(self, partial: Path, tensors: dict[str, Tensor]) -> None:
        if self._main:
            need = sum(value.numel() * value.element_size() for value in tensors.values())
            if not checkpoint_files.has_space(self.out, need):
                checkpoint_files.prune(self.out, 1)
            checkpoint_files.check_space(self.out, need)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

    def _publish(self, partial: Path, step: int, numbers: dict[str, Any]) -> None:
        if self._main:
            file = partial / checkpoint_files.NUMBERS
            file.write_text(json.dumps({**numbers, "digest": digest(numbers)}, indent=1, sort_keys=True))
            checkpoint_files.fsync_paths(file, partial)
            whole = self.out / f"checkpoint-{step}"
            checkpoint_files.remove(whole)
            partial.rename(whole)
            checkpoint_files.fsync_paths(self.out)
            checkpoint_files.prune(self.out, self.config.keep)

    def _on_all_ranks(self, work: Any) -> Any:
        """What `work` returns. If it fails on one rank it fails on all, with the same kind of error."""
        found, error = None, ""
        try:
            found = work()
        except (Exception, CheckpointException) as failure:  # told to the other ranks, who would wait for this one for ever
            error = ("space:" if out_of_space(failure) else "other:") + (str(failure).strip() or repr(failure)).splitlines()[-1]
        if errors := [one for one in self._gathered(error) if one]:
            kind, _, said = errors[0].partition(":")
            said = f"A checkpoint could not be written into {self.out}; the one before it is whole. {said}"
            raise SpaceError(f"{said} Make room, then run the same command.") if kind == "space" else RuntimeError(said)
        return found

    def _gathered(self, one: Any) -> list[Any]:
        if not self._group:
            return [one]
        found = [None] * self._ranks
        dist.all_gather_object(found, one, group=self._group)
        return found

    # ---- reading ----

    def restore(self) -> tuple[int, list[dict[str, Any]]]:
        """Brings the run back to its last whole checkpoint: (steps done, curve), (0, []) where there is none. Damaged ones are told and skipped.

        Raises ConfigError where one is on other samples than `data` says or drawn by another law, or where all are damaged.
        """
        if self._main:
            for left in self.out.glob("checkpoint-*.partial"):
                shutil.rmtree(left)
        self.training.accelerator.wait_for_everyone()
        there = checkpoint_files.list_checkpoints(self.out)
        for step in sorted(there, reverse=True):
            why = next((why for why in self._gathered(checkpoint_files.damage(there[step], self._rank, self._ranks)) if why), "")
            if not why:
                return self._load(there[step])
            self.training.accelerator.print(printable(f"{there[step]} is damaged ({why}) and is left out"), flush=True)
        if there:
            raise ConfigError(f"Every checkpoint in {self.out} is damaged. Look at that disk; to start from the beginning, remove them.")
        return 0, []

    def _load(self, folder: Path) -> tuple[int, list[dict[str, Any]]]:
        numbers, training = json.loads((folder / checkpoint_files.NUMBERS).read_text()), self.training
        now = {"version": VERSION, "draws": draws.VERSION, "data": self.data}
        if other := {key: numbers[key] for key in now if numbers[key] != now[key]}:
            raise ConfigError(
                f"{folder} is on other data, or of another version ({other}, not { ({k: now[k] for k in other}) }). Choose another out=."
            )
        get_optimizer_state_dict(training.model, training.optimizer.optimizer)  # gives a fresh optimizer its state, to be filled
        _read(_tensors(training), folder, self._group)
        if training.ema:
            training.ema.optimization_step = numbers["ema_steps"]
        training.guard.recent = numbers["recent"]
        training.schedule.load_state_dict({**training.schedule.state_dict(), "last_epoch": numbers["step"] - 1})
        training.schedule.step()
        training.accelerator.print(f"going on after step {numbers['step']} of {self.steps}", flush=True)
        return numbers["step"], numbers["curve"]


def _tensors(training: Training) -> dict[str, Any]:
    """Every tensor that makes the run what it is, by name; the live ones."""
    named = [(name, p) for name, p in training.accelerator.unwrap_model(training.model).named_parameters() if p.requires_grad]
    found = {f"model/{name}": p.detach() for name, p in named}
    if training.ema:
        found |= {f"ema/{name}": average for (name, _), average in zip(named, training.ema.shadow_params, strict=True)}
    moments = training.optimizer.optimizer.state
    return found | {f"optimizer/{what}{part}/{name}": value for name, p in named for what, one in moments[p].items() for part, value in _plain(one)}


def _plain(value: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor, or the parts that one in 8 bits is made of."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        return [("", value)]
    return [(f".{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0]]


def _read(tensors: dict[str, Any], folder: Path, group: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is only one process
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=not group)
    except CheckpointException as error:  # what came up within, an interruption too
        raise KeyboardInterrupt if signals.stop_requested() else RuntimeError(f"{folder} cannot be read: {error}") from error


def _save(tensors: dict[str, Any], folder: Path, group: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is only one process
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not group)
