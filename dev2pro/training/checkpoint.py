"""Saves checkpoints asynchronously during training and restores them on any number of ranks, bit for bit. Tensors and JSON, no pickle.

A checkpoint is a folder `checkpoint-<step>`: safetensors files from each rank that has something to write (in torch.distributed.checkpoint's
layout, which any number of ranks can read), and checkpoint.json with the numbers and the SHA-256 of every file.
"""

import json
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dev2pro import draws, schedulers, signals
from dev2pro.artifacts.record import digest
from dev2pro.errors import ConfigError, InterruptedRun, SpaceError, out_of_space
from dev2pro.escape import printable
from dev2pro.training import checkpoint_files, checkpoint_space, checkpoint_writer, distributed
from dev2pro.training.checkpoint_space import CheckpointConfig
from dev2pro.training.step import Training
from dev2pro.training.stop_time import StopTime

VERSION = 1


class Checkpoints:
    """The checkpoints of a run in `out` over `steps` steps. `data` identifies the samples of the run.

    Within `with`, signals wait for the end of the step. `stalled`: seconds that training was blocked while writing `written` checkpoints.
    """

    def __init__(self, out: str, training: Training, config: CheckpointConfig, steps: int, data: dict[str, Any]) -> None:
        self.out, self.training, self.config, self.steps, self.data = Path(out), training, config, steps, data
        self.stalled, self.written = 0.0, 0
        self._ranks, self._rank, self._main = (
            training.accelerator.num_processes,
            training.accelerator.process_index,
            training.accelerator.is_main_process,
        )
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None  # separate process group for the writer thread
        self._executor, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        self._exit_stack, self._staging = ExitStack(), checkpoint_writer.Staging()
        trained = checkpoint_space.trained(training.accelerator.unwrap_model(training.model))
        self.stop = StopTime(checkpoint_space.state_bytes(trained, training.config, training.ema is not None), config.grace)
        self._limits = schedulers.limits(config.grace)  # those that no warning has named yet
        training.stop_requested = lambda: signals.stop_requested() or self._failed()

    _writing: Future | None

    def __enter__(self) -> Self:
        self._exit_stack.enter_context(signals.grace_period(self.stop.grace))
        self._exit_stack.callback(self._staging.release)
        self.training.accelerator.print(self.stop.describe(), flush=True)
        self._warn()
        self.stop.resume()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if error and distributed.lost_another_rank(error):
            return  # the writers wait for each other, and the one of a rank that still waits for this one would wait for ever
        with self._exit_stack, suppress(Exception) if kind else ExitStack():
            self.wait()

    def on_step_end(self, step: int, curve: list[dict[str, Any]], *, last: bool = False) -> None:
        """Call after every step. Writes a checkpoint if one is due, or if any rank received a stop signal; then raises InterruptedRun.

        `last`: the run ends here, before its steps are done.

        Raises DivergedError if the new held-out loss diverged.
        """
        self.stop.end_step()
        new = bool(curve) and curve[-1]["step"] == step
        if new:
            self.training.guard.held_out(curve)
        if step % self.config.every and step != self.steps and not (last or self.training.stopping):
            return
        self.wait()
        before = time.perf_counter()
        self.stop.begin_checkpoint()
        training, held_out = self.training, curve[-1]["loss"] if new else None
        numbers = {
            "version": VERSION, "draws": draws.VERSION, "step": step, "data": self.data, "curve": curve, "held_out": held_out,
            "recent": training.guard.recent, "ema_steps": training.ema.steps if training.ema else 0,
        }  # fmt: skip
        tensors = _tensors(training)
        self.stop.state_bytes = sum(map(checkpoint_writer.size, tensors.values()))
        copied = self._staging.copy(checkpoint_writer.share(tensors, self._rank, self._ranks))
        self._writing = self._executor.submit(self._write, step, copied, json.loads(json.dumps(numbers)))
        self.stalled, self.written = self.stalled + time.perf_counter() - before, self.written + 1
        self.stop.resume()
        if training.stopping:
            self.wait()
            raise InterruptedRun(f"interrupted after step {step} of {self.steps}. The same command goes on from there.")

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises SpaceError if the disk is full."""
        writing, self._writing, before = self._writing, None, time.perf_counter()
        if writing:
            writing.result()
            self.stalled += time.perf_counter() - before
            self._warn()

    def metrics(self) -> dict[str, Any]:
        """Speed, memory and checkpoint timings, for the run's record."""
        return {**self.training.clock.metrics(), "checkpoints": self.written, "stalled_seconds": round(self.stalled, 3)}

    def _warn(self) -> None:
        """Says once of each limit that it is too short for a stop."""
        for limit in [limit for limit in self._limits if self.stop.warning(limit)]:
            self._limits.remove(limit)
            self.training.accelerator.print(printable(self.stop.warning(limit)), flush=True)

    def _failed(self) -> bool:
        return bool(self._writing and self._writing.done() and self._writing.exception())

    # ---- writing, in a thread of every rank ----

    def _write(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        partial = self.out / f"checkpoint-{step}.partial"
        try:
            self._on_all_ranks(lambda: self._prepare_folder(partial))
            mine = self._on_all_ranks(lambda: _save(tensors, partial, self._group))
            numbers["files"] = {name: entry for files in self._all_gather(mine) for name, entry in files.items()}
            self._on_all_ranks(lambda: self._publish(partial, step, numbers))
            self.stop.end_checkpoint()
        except BaseException:
            if self._main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prepare_folder(self, partial: Path) -> None:
        if self._main:
            if not checkpoint_files.has_space(self.out, self.stop.state_bytes):
                checkpoint_files.prune(self.out, 1)
            checkpoint_files.check_space(self.out, self.stop.state_bytes)
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
        """Returns what `work` returns. If it fails on one rank, raises the same kind of error on all."""
        result, error = None, ""
        try:
            result = work()
        except (Exception, CheckpointException) as failure:  # sent to the other ranks, which would otherwise wait for ever
            error = ("space:" if out_of_space(failure) else "other:") + (str(failure).strip() or repr(failure)).splitlines()[-1]
        if errors := [text for text in self._all_gather(error) if text]:
            kind, _, message = errors[0].partition(":")
            message = f"A checkpoint could not be written into {self.out}; the one before it is whole. {message}"
            raise SpaceError(f"{message} Make room, then run the same command.") if kind == "space" else RuntimeError(message)
        return result

    def _all_gather(self, value: Any) -> list[Any]:
        if not self._group:
            return [value]
        gathered = [None] * self._ranks
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    # ---- reading ----

    def restore(self) -> tuple[int, list[dict[str, Any]]]:
        """Restores the last undamaged checkpoint: (steps done, curve), or (0, []) if there is none. Damaged ones are reported and skipped.

        Raises ConfigError if the checkpoint has other data than `data` or another version of the random draws, or if all are damaged.
        """
        if self._main:
            for leftover in self.out.glob("checkpoint-*.partial"):
                shutil.rmtree(leftover)
        self.training.accelerator.wait_for_everyone()
        checkpoints = checkpoint_files.list_checkpoints(self.out)
        for step in sorted(checkpoints, reverse=True):
            why = next((why for why in self._all_gather(checkpoint_files.find_damage(checkpoints[step], self._rank, self._ranks)) if why), "")
            if not why:
                return self._load(checkpoints[step])
            self.training.accelerator.print(printable(f"{checkpoints[step]} is damaged ({why}) and is left out"), flush=True)
        if checkpoints:
            raise ConfigError(f"Every checkpoint in {self.out} is damaged. Look at that disk; to start from the beginning, remove them.")
        return 0, []

    def _load(self, folder: Path) -> tuple[int, list[dict[str, Any]]]:
        numbers, training = json.loads((folder / checkpoint_files.NUMBERS).read_text()), self.training
        now = {"version": VERSION, "draws": draws.VERSION, "data": self.data}
        if other := {key: numbers[key] for key in now if numbers[key] != now[key]}:
            raise ConfigError(
                f"{folder} is on other data, or of another version ({other}, not { ({k: now[k] for k in other}) }). Choose another out=."
            )
        get_optimizer_state_dict(training.model, training.optimizer)  # allocates the optimizer's state, which is loaded next
        _read(_tensors(training), folder, self._group)
        if training.ema:
            training.ema.steps = numbers["ema_steps"]
        training.guard.recent = numbers["recent"]
        training.schedule.load_state_dict({**training.schedule.state_dict(), "last_epoch": numbers["step"] - 1})
        training.schedule.step()
        training.accelerator.print(f"going on after step {numbers['step']} of {self.steps}", flush=True)
        return numbers["step"], numbers["curve"]


def _tensors(training: Training) -> dict[str, Any]:
    """All tensors of the training state by name: weights, EMA, optimizer moments. They are the live tensors, not copies."""
    named = [(name, p) for name, p in training.accelerator.unwrap_model(training.model).named_parameters() if p.requires_grad]
    tensors = {f"model/{name}": p.detach() for name, p in named}
    if training.ema:
        tensors |= {f"ema/{name}": average for (name, _), average in zip(named, training.ema.average, strict=True)}
    moments = training.optimizer.state
    return tensors | {
        f"optimizer/{what}{part}/{name}": value for name, p in named for what, moment in moments[p].items() for part, value in _plain_tensors(moment)
    }


def _plain_tensors(value: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor, or the parts of an 8-bit one."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        return [("", value)]
    return [(f".{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0]]


def _read(tensors: dict[str, Any], folder: Path, group: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is only one process
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=not group)
    except CheckpointException as error:  # wraps every error raised inside, also KeyboardInterrupt
        raise KeyboardInterrupt if signals.stop_requested() else RuntimeError(f"{folder} cannot be read: {error}") from error


def _save(tensors: dict[str, Tensor], folder: Path, group: Any) -> dict[str, list[Any]]:
    """Writes this rank's tensors: name of every file -> [bytes, SHA-256]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is only one process
        writer = checkpoint_writer.StreamingWriter(folder)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not group)
    return writer.files
