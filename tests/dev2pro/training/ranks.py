"""One rank of a training, sharded or replicated, started by test_sharding.py; writes what it saw into <out>/rank-<N>.json, and the weights.

python ranks.py <model> <out> <HardwareConfig as JSON> <steps> [<globs over what is trained>]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import distributed, sharding, trainable, wrapping
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

BATCH, STEPS = 16, 4
COLLECTIVES = {"_reduce_scatter_base_", "_allgather_base_", "allreduce_"}


class Collectives(TorchDispatchMode):
    """The precisions in which ranks exchange tensors: operation -> dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := function.overloadpacket.__name__) in COLLECTIVES:
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            self.dtypes.setdefault(name, set()).add(str(tensor.dtype))
        return function(*args, **(kwargs or {}))


class Run:
    """Trains on inputs that depend only on the number of the step; measures with the averaged weights after each."""

    def __init__(self, model: str, out: str, hardware: HardwareConfig, globs: list[str] | None) -> None:
        self.accelerator = distributed.accelerator(hardware)
        transformer = wrapping.load_transformer(model, hardware, self.accelerator)
        if hardware.int8_base:
            lora.to_int8(transformer, self.accelerator.device)
            lora.inject(transformer, AdapterConfig(rank=4, alpha=4, targets="attention"), 0)
        trainable.select(transformer, globs, model)
        config = OptimConfig(lr=1e-3, schedule="constant")
        self.training = Training(self.accelerator, transformer, config, hardware, steps=STEPS, batch=BATCH, ema=0.5)
        self.checkpoints = Checkpoints(out, self.training, CheckpointConfig(every=1, keep=9), STEPS, {"snapshot": "abc"})
        self.seen: dict[str, Any] = {"losses": [], "norms": [], "measured": [], "leftovers": [], "in_block": None}

    def step(self, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        x, prompt, pooled = (torch.randn(BATCH, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
        t = torch.rand(BATCH, generator=draw)

        def predict(model: torch.nn.Module, slots: range) -> torch.Tensor:
            conditioning = flux1.build_conditioning(prompt[slots], pooled[slots], (4, 4))
            return flux1.predict(model, x[slots], t[slots], conditioning, 1.0).float().square().mean()

        def make_batch(slots: range) -> range:
            self._look_for_leftovers()
            return slots

        loss, norm = self.training.step(step, make_batch, lambda slots: predict(self.training.model, slots))
        with self.training.ema_weights() as model:
            measured = predict(model, range(2)).item()
        self._look_for_leftovers()
        self.seen["losses"].append(loss)
        self.seen["norms"].append(norm)
        self.seen["measured"].append(measured)
        self.checkpoints.on_step_end(step + 1, [{"step": step + 1, "loss": measured}])

    def _look_for_leftovers(self) -> None:
        """Weights and gradients that are whole, between two micro-batches or after a measurement."""
        for name, parameter in self.training.accelerator.unwrap_model(self.training.model).named_parameters():
            for value in (parameter, parameter.grad):
                if value is not None and not isinstance(value, DTensor):
                    self.seen["leftovers"].append(name)

    def watch_block(self) -> None:
        """Notes what a block computes with in the first forward pass."""
        block = self.accelerator.unwrap_model(self.training.model).transformer_blocks[0]

        def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self.seen["in_block"] = self.seen["in_block"] or {
                "weight": str(block.attn.to_q.weight.dtype), "whole": not isinstance(block.attn.to_q.weight, DTensor),
                "input": str(kwargs["hidden_states"].dtype if "hidden_states" in kwargs else args[0].dtype),
                "rope": str((kwargs.get("image_rotary_emb") or args[3])[0].dtype),
            }  # fmt: skip

        block.attn.register_forward_pre_hook(lambda module, args, kwargs: note(module, args, kwargs), with_kwargs=True)


def main(model: str, out: str, hardware: str, steps: str, *globs: str) -> None:
    torch.compiler.set_stance("force_eager")  # compiling the 8-bit optimizer takes a minute
    run = Run(model, out, HardwareConfig(**json.loads(hardware)), list(globs) or None)
    run.watch_block()
    start, _ = run.checkpoints.restore()
    with Collectives() as collectives, run.checkpoints:
        for step in range(start, int(steps)):
            run.step(step)
    whole = run.accelerator.unwrap_model(run.training.model)
    run.seen |= {
        "start": start, "collectives": {name: sorted(dtypes) for name, dtypes in collectives.dtypes.items()}, "sharded": sharding.is_sharded(whole),
        "types": sorted({type(p.data).__name__ for p in whole.parameters()}),
        "trained": sorted({type(p.data).__name__ for p in run.training.parameters}), "dtypes": sorted({str(p.dtype) for p in whole.parameters()}),
        "moments": sorted({type(m["exp_avg"]).__name__ for m in run.training.optimizer.state.values()}),
        "average": sorted({f"{type(a).__name__} {a.dtype}" for a in run.training.ema.average}) if run.training.ema else [],
        "wrapper": type(run.training.model).__name__, "optimizer": type(run.training.optimizer).__name__,
        "linear": sorted({type(m).__name__ for m in whole.modules() if isinstance(m, torch.nn.Linear)}),
        "share": sum(sharding.local_tensor(p).numel() for p in whole.parameters()) / sum(p.numel() for p in whole.parameters()),
        "checkpointing": whole.is_gradient_checkpointing,
    }  # fmt: skip
    (Path(out) / f"rank-{run.accelerator.process_index}.json").write_text(json.dumps(run.seen))
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    averages = sharding.whole_tensors(zip(trained, run.training.ema.average, strict=True), torch.float32, keep=run.accelerator.is_main_process)
    if averages:
        save_file(averages, f"{out}/averages.safetensors")
    if globs:
        run.training.save(out, torch.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
