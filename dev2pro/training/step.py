"""One optimizer step on any number of ranks, and its timer; the calling stage provides the loss."""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from dev2pro import signals
from dev2pro.training import distributed, optim
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import DivergenceGuard, GuardConfig
from dev2pro.training.optim import OptimConfig

B = TypeVar("B")


class Training:
    """Wraps a transformer and its trainable parameters for `steps` optimizer steps of `batch` slots each.

    `ema` is the decay of the averaged weights, 0 for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: FluxTransformer2DModel,
        config: OptimConfig,
        hardware: HardwareConfig,
        *,
        steps: int,
        batch: int,
        ema: float = 0.0,
        guard: GuardConfig | None = None,
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self.slots = distributed.rank_slots(batch, hardware.micro_batch, accelerator)
        self.batch = batch
        if hardware.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        optimizer = optim.optimizer(config, [p for p in model.parameters() if p.requires_grad])
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.schedule = optim.schedule(config, self.optimizer.optimizer, steps)
        self.ema = EMAModel(self.parameters, decay=ema) if ema else None
        self.clock, self.guard = StepTimer(), DivergenceGuard(guard or GuardConfig())
        self.stop_requested: Callable[[], bool] = signals.stop_requested  # of this rank; `stopping`: of any, on all ranks after the same step
        self.stopping = False

    def step(self, step: int, make_batch: Callable[[range], B], compute_loss: Callable[[B], Tensor]) -> tuple[float, float]:
        """One optimizer step: (mean loss, gradient norm before clipping), the same on every rank.

        `make_batch(slots)` makes the micro-batch for some slots of this step, `compute_loss` its mean loss. Raises DivergedError if the
        guard does; the weights are then those of the previous step.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for i, slots in enumerate(self.slots):
            last = i == len(self.slots) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                share = len(slots) * self.accelerator.num_processes / self.batch
                batch = make_batch(slots)
                with self.clock.compute():
                    loss = compute_loss(batch) * share
                    self.accelerator.backward(loss)
                total += loss.detach()
        with self.clock.compute():
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
            values = torch.stack([total, total.new_tensor(float(self.stop_requested()))])
            (mean, stop_share), size = self.accelerator.reduce(values, "mean").tolist(), _to_float(norm)
            self.stopping = stop_share > 0
            self.guard.check_step(step, mean, size)
            torch.manual_seed(step)  # for stochastic rounding, which must be the same after a resume
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.step(self.parameters)
        self.clock.steps += 1
        return mean, size

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def save(self, out: str, dtype: torch.dtype) -> None:
        """Writes the model, with the averaged weights if there are any, as `out`/transformer in diffusers layout."""
        with self.ema_weights() as model:
            state = self.accelerator.get_state_dict(model)
            if self.accelerator.is_main_process:
                with torch.device("meta"):
                    copy = FluxTransformer2DModel.from_config(self.accelerator.unwrap_model(model).config)
                copy.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
                whole, partial = Path(out) / "transformer", Path(out) / "transformer.partial"
                shutil.rmtree(partial, ignore_errors=True)
                copy.save_pretrained(partial)
                for file in partial.iterdir():  # safetensors creates files that only their owner may read
                    file.chmod((partial / "config.json").stat().st_mode)
                shutil.rmtree(whole, ignore_errors=True)
                partial.rename(whole)

    @contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """The model in evaluation mode, with the averaged weights if there are any."""
        self.model.eval()
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            with torch.no_grad(), self.clock.paused():
                yield self.model
        finally:
            if self.ema:
                self.ema.restore(self.parameters)
            self.model.train()


class StepTimer:
    """Measures steps per second and the share of time outside forward, backward and optimizer."""

    def __init__(self) -> None:
        self.steps, self.computing, self.pause, self.start = 0, 0.0, 0.0, time.perf_counter()

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Times forward, backward and optimizer."""
        before = time.perf_counter()
        yield
        self.computing += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes time that is not training: measuring on held-out data."""
        before = time.perf_counter()
        yield
        self.pause += time.perf_counter() - before

    def metrics(self) -> dict[str, Any]:
        """steps_per_second, share_outside (of the training time), peak_memory_mb (of the process, or of the GPU if there is one)."""
        seconds = time.perf_counter() - self.start - self.pause
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {
            "steps_per_second": round(self.steps / seconds, 3),
            "share_outside": round(max(0.0, 1 - self.computing / seconds), 4),
            "peak_memory_mb": round(peak),
        }


def _to_float(norm: Any) -> float:
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
