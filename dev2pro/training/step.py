"""One optimizer step on any number of ranks, and its timer; the calling stage provides the loss."""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from dev2pro import signals
from dev2pro.training import distributed, optim, sharding, wrapping
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.divergence_guard import DivergenceGuard, GuardConfig
from dev2pro.training.ema import Ema
from dev2pro.training.gradient_release import GradientRelease
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
        self.slots = distributed.rank_slots(batch, hardware, accelerator)
        self.batch = batch
        self.model = wrapping.prepare(model, hardware, accelerator)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optim.optimizer(config, self.parameters)
        self.schedule = optim.schedule(config, self.optimizer, steps)
        self.ema = Ema(self.parameters, ema, every=hardware.ema_every, offload=hardware.ema_offload) if ema else None
        self.release = GradientRelease(self.optimizer, self.parameters, config.clip) if hardware.step_in_backward else None
        self.clock, self.guard = StepTimer(), DivergenceGuard(guard or GuardConfig())
        self.stop_requested: Callable[[], bool] = signals.stop_requested  # of this rank; `stopping`: of any, on all ranks after the same step
        self.stopping = False

    def step(self, step: int, make_batch: Callable[[range], B], compute_loss: Callable[[B], Tensor]) -> tuple[float, float]:
        """One optimizer step: (mean loss, gradient norm before clipping), the same on every rank.

        `make_batch(slots)` makes the micro-batch for some slots of this step, `compute_loss` its mean loss. Raises DivergedError if the
        guard does; the weights are then those of the previous step, except where gradients are released: what came before was trained on, and
        the last checkpoint is what is left.
        """
        total = torch.zeros((), device=self.accelerator.device)
        torch.manual_seed(step)  # for stochastic rounding, which must be the same after a resume
        for i, slots in enumerate(self.slots):
            with self._gradients_stay_local() if i < len(self.slots) - 1 else nullcontext():
                share = len(slots) * self.accelerator.num_processes / self.batch
                batch = make_batch(slots)
                with self.clock.compute():
                    loss = compute_loss(batch) * share
                    self.accelerator.backward(loss)
                total += loss.detach()
        with self.clock.compute():
            norm = self.release.norm() if self.release else torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            values = torch.stack([total, total.new_tensor(float(self.stop_requested()))])
            size = norm.full_tensor() if isinstance(norm, DTensor) else norm
            mean, stop_share, size = torch.cat([self.accelerator.reduce(values, "mean"), size.float().view(1)]).tolist()  # the step's one host read
            self.stopping = stop_share > 0
            self.guard.check_step(step, mean, size)
            if not self.release:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.schedule.step()
            if self.ema:
                self.ema.step()
        self.clock.steps += 1
        return mean, size

    def _gradients_stay_local(self) -> AbstractContextManager:
        """Until the last micro-batch of a step; a sharded model would keep them whole, so it shares them out every time."""
        return nullcontext() if sharding.is_sharded(self.model) else self.accelerator.no_sync(self.model)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def save(self, out: str, dtype: torch.dtype) -> None:
        """Writes the whole model, of what is trained the averaged weights if there are any, as `out`/transformer in diffusers layout."""
        model, main = self.accelerator.unwrap_model(self.model), self.accelerator.is_main_process
        averages = dict(zip(self.parameters, self.ema.average, strict=True)) if self.ema else {}
        state = sharding.whole_tensors(((name, averages.get(p, p)) for name, p in model.named_parameters()), dtype, keep=main)
        if main:
            with torch.device("meta"):
                copy = FluxTransformer2DModel.from_config(model.config)
            copy.load_state_dict(state, assign=True)
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
        try:
            with self.ema.applied() if self.ema else nullcontext(), torch.no_grad(), self.clock.paused():
                yield self.model
        finally:
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
