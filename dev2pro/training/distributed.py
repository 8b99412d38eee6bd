"""Where the work runs: device, precision, ranks. Placement, wrapping and launching are accelerate's; this names the choices."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed import DistNetworkError, DistStoreError

from dev2pro.errors import ConfigError
from dev2pro.training import time_limits

GONE = ("closed by peer", "Connection reset by peer", "Timed out waiting", "ncclRemoteError")  # gloo's words, and NCCL's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _changeable(value: Any) -> Any:
    """A field that may change when a run is resumed: it affects speed, memory and at most the last bits."""
    return field(default=value, metadata={"identity": False})


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """One machine's choices; see conf/hardware/."""

    device: str = _changeable("auto")  # auto takes a GPU when there is one; cpu forces the CPU
    dtype: str = "float32"  # of the trained transformer's weights
    encoder_dtype: str | None = None  # of VAE and text encoders, and of what they encode; null is as dtype
    inference_dtype: str | None = None  # of a transformer that is only sampled from, in evaluate; null is as dtype
    mixed_precision: str = "no"  # bf16: computes in bfloat16 over float32 weights
    gradient_checkpointing: bool = _changeable(False)  # a third more compute for a fraction of the activation memory
    checkpointed_blocks: int | None = _changeable(None)  # so many of the blocks, the rest keeps its activations; null is all
    micro_batch: int = _changeable(64)  # samples per forward pass and rank; larger batches accumulate gradients
    compile: bool = _changeable(False)  # each kind of block by torch.compile: a minute at the start, then faster
    float8: bool = False  # recover and distill on GPUs from Ada and Hopper on: the blocks' matrix products in float8
    int8_base: bool = False  # lora and evaluate: the frozen blocks in int8, half the memory of bfloat16
    int8_encoders: bool = False  # T5's linear layers in int8, so that it fits a small card while captions are encoded
    offloaded_blocks: int = _changeable(0)  # lora and evaluate: so many of the blocks wait in host memory and are copied each time
    step_in_backward: bool = False  # recover and distill on one GPU: each weight is updated as its gradient comes, so that no gradient is held
    ema_every: int = 1  # steps between two moves of the averaged weights
    ema_offload: bool = _changeable(False)  # the averaged weights in host memory
    shard: bool = _changeable(False)  # FSDP2: weights, gradients and optimizer state spread over the ranks
    replicas: int = _changeable(1)  # of the sharded model: 8 machines of 8 GPUs shard within each and average gradients between them
    encodings_gb: float = _changeable(4.0)  # of host memory per process for encoded captions and pictures; what fits is encoded once, in advance
    threads: int = _changeable(0)  # CPU threads of one process; 0 lets torch decide
    ranks: int = _changeable(1)  # processes that it is meant for, one a GPU; a plan reckons with them, a run takes those it is started with
    card_gb: float = _changeable(0.0)  # decimal GB of one GPU, to plan with; a run takes the visible GPU's
    host_gb: float = _changeable(0.0)  # decimal GB of host memory of one machine; 0 is not checked
    disk_gb: float = _changeable(0.0)  # decimal GB of disk for out=; 0 is not checked
    tflops: float = _changeable(0.0)  # TFLOP/s that one GPU reaches in training; a plan then says how long a run takes
    price: float = _changeable(0.0)  # of one GPU for an hour; a plan then says what a run costs

    @property
    def weights(self) -> torch.dtype:
        """Of the trained transformer's weights."""
        return DTYPES[self.dtype]

    @property
    def encoders(self) -> torch.dtype:
        """Of VAE and text encoders, and of what they encode."""
        return DTYPES[self.encoder_dtype or self.dtype]

    @property
    def compute(self) -> torch.dtype:
        """Of the trained transformer's matrix products."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else self.weights

    @property
    def inference(self) -> torch.dtype:
        """Of a transformer that is only sampled from."""
        return DTYPES[self.inference_dtype or self.dtype]


def accelerator(hardware: HardwareConfig) -> Accelerator:
    """The accelerate object for this process. Raises ConfigError for choices this machine cannot fulfil."""
    check_dtypes(hardware)
    if hardware.device not in ("auto", "cpu"):
        raise ConfigError(f"hardware.device={hardware.device} is unknown. Choose auto or cpu; which GPU is CUDA_VISIBLE_DEVICES' to say.")
    if hardware.mixed_precision not in ("no", "bf16"):
        raise ConfigError(f"hardware.mixed_precision={hardware.mixed_precision} is unknown. Choose no or bf16.")
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    if hardware.float8 and hardware.device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("hardware.float8=true needs a GPU of compute capability 8.9 or more (Ada, Hopper). Set it to false.")
    _check_sharding(hardware, int(os.environ.get("WORLD_SIZE", 1)))
    precision = "no" if hardware.shard else hardware.mixed_precision  # FSDP2 has a policy of its own
    limit = InitProcessGroupKwargs(timeout=time_limits.SETUP)
    return Accelerator(cpu=hardware.device == "cpu", mixed_precision=precision, kwargs_handlers=[limit])


def _check_sharding(hardware: HardwareConfig, ranks: int) -> None:
    if hardware.replicas > 1 and not hardware.shard:
        raise ConfigError(f"hardware.replicas={hardware.replicas} counts copies of a sharded model. Set hardware.shard=true, or replicas to 1.")
    if not hardware.shard:
        return
    if ranks == 1:
        raise ConfigError(
            "hardware.shard=true needs several processes. Start with `torchrun --nproc-per-node=N -m stages...`, or set hardware.shard=false."
        )
    if ranks % hardware.replicas or ranks == hardware.replicas:
        raise ConfigError(
            f"hardware.replicas={hardware.replicas} cannot divide {ranks} processes into rows of several. Choose the number of machines."
        )
    if hardware.dtype != "float32":
        raise ConfigError(
            f"hardware.shard=true keeps float32 weights, and hardware.dtype={hardware.dtype} would round updates away. Set hardware.dtype=float32 "
            "and hardware.mixed_precision=bf16."
        )
    if hardware.ema_offload:
        raise ConfigError("hardware.ema_offload=true is for one GPU: of a sharded average each holds a small part. Set it to false.")


def check_full(hardware: HardwareConfig) -> None:
    """Raises ConfigError for choices that only a frozen base allows, in the stages that train all weights, and for unknown precisions."""
    check_dtypes(hardware)
    for key in ("int8_base", "offloaded_blocks"):
        if getattr(hardware, key):
            raise ConfigError(f"hardware.{key} is for a frozen base, in lora, and here all weights are trained. Choose another hardware=.")


def check_dtypes(hardware: HardwareConfig) -> None:
    """Raises ConfigError for unknown precisions."""
    for key in ("dtype", "encoder_dtype", "inference_dtype"):
        check_dtype(f"hardware.{key}", getattr(hardware, key) or hardware.dtype)


def check_dtype(key: str, name: str) -> None:
    """Raises ConfigError for an unknown precision."""
    if name not in DTYPES:
        raise ConfigError(f"{key}={name} is unknown. Choose one of {', '.join(DTYPES)}.")


def check_batch(batch: int, hardware: HardwareConfig, ranks: int) -> None:
    """Raises ConfigError for a batch that does not divide, or that a step inside the backward pass cannot take."""
    if batch % ranks:
        raise ConfigError(f"batch={batch} cannot be shared by {ranks} processes. Choose a multiple of {ranks}.")
    if hardware.step_in_backward and (ranks > 1 or batch > hardware.micro_batch):
        raise ConfigError(
            f"hardware.step_in_backward=true updates each weight in the backward pass of one micro-batch on one GPU, and batch={batch} needs {ranks} "
            f"processes and micro-batches of {hardware.micro_batch}. Set batch={hardware.micro_batch}, or hardware.step_in_backward=false."
        )


def rank_slots(batch: int, hardware: HardwareConfig, accelerator: Accelerator) -> list[range]:
    """This rank's slots of the global batch, cut into micro-batches. Raises ConfigError as `check_batch`."""
    ranks, size = accelerator.num_processes, hardware.micro_batch
    check_batch(batch, hardware, ranks)
    share = batch // ranks
    first = accelerator.process_index * share
    return [range(first + i, first + min(i + size, share)) for i in range(0, share, size)]


def lost_another_rank(error: BaseException) -> bool:
    """Whether gloo, NCCL or torch's store says that another rank ended, or kept this one waiting longer than `time_limits` allow."""
    gone = isinstance(error, (DistNetworkError, DistStoreError)) or any(text in str(error) for text in GONE)
    return gone and "RANK" in os.environ
