"""Where the work runs: device, precision, ranks. Placement, wrapping and launching are accelerate's; this names the choices."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

from dev2pro.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _changeable(value: Any) -> Any:
    """A field that may change when a run is resumed: it affects speed, memory and at most the last bits."""
    return field(default=value, metadata={"identity": False})


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """One machine's choices; see conf/hardware/."""

    device: str = _changeable("auto")  # auto takes a GPU when there is one; cpu forces the CPU
    dtype: str = "float32"  # of the weights
    mixed_precision: str = "no"  # bf16: computes in bfloat16 over float32 weights
    gradient_checkpointing: bool = _changeable(False)  # a third more compute for a fraction of the activation memory
    micro_batch: int = _changeable(64)  # samples per forward pass and rank; larger batches accumulate gradients
    int8_base: bool = False  # lora only: the frozen blocks in int8, half the memory of bfloat16
    shard: bool = _changeable(False)  # FSDP2: weights, gradients and optimizer state spread over the ranks
    encodings_gb: float = _changeable(4.0)  # of host memory per process for encoded captions and pictures; what fits is encoded once, in advance
    threads: int = _changeable(0)  # CPU threads of one process; 0 lets torch decide


def accelerator(hardware: HardwareConfig) -> Accelerator:
    """The accelerate object for this process. Raises ConfigError for choices this machine cannot fulfil."""
    check_dtype("hardware.dtype", hardware.dtype)
    if hardware.device not in ("auto", "cpu"):
        raise ConfigError(f"hardware.device={hardware.device} is unknown. Choose auto or cpu; which GPU is CUDA_VISIBLE_DEVICES' to say.")
    if hardware.mixed_precision not in ("no", "bf16"):
        raise ConfigError(f"hardware.mixed_precision={hardware.mixed_precision} is unknown. Choose no or bf16.")
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if hardware.shard and ranks == 1:
        raise ConfigError(
            "hardware.shard=true needs several processes. Start with `torchrun --nproc-per-node=N -m stages...`, or set hardware.shard=false."
        )
    plugin = None
    if hardware.shard:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["FluxTransformerBlock", "FluxSingleTransformerBlock"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
    return Accelerator(cpu=hardware.device == "cpu", mixed_precision=hardware.mixed_precision, fsdp_plugin=plugin)


def check_dtype(key: str, name: str) -> None:
    """Raises ConfigError for an unknown precision."""
    if name not in DTYPES:
        raise ConfigError(f"{key}={name} is unknown. Choose one of {', '.join(DTYPES)}.")


def rank_slots(batch: int, micro_batch: int, accelerator: Accelerator) -> list[range]:
    """This rank's slots of the global batch, cut into micro-batches. Raises ConfigError for a batch that does not divide."""
    ranks = accelerator.num_processes
    if batch % ranks:
        raise ConfigError(f"batch={batch} cannot be shared by {ranks} processes. Choose a multiple of {ranks}.")
    share = batch // ranks
    first = accelerator.process_index * share
    return [range(first + i, first + min(i + micro_batch, share)) for i in range(0, share, micro_batch)]
