"""What recover, lora and distill need, from their configuration and the real modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from dev2pro.models import flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.planning import fake_models, fake_runs
from dev2pro.planning.account import (
    PROCESS,
    STAGED,
    Account,
    Layout,
    Parts,
    Phases,
    Size,
    batch_shape,
    encoding_flops,
    encoding_parts,
    largest_parameter,
    load_encoders,
    offloaded_bytes,
    text_encoder_bytes,
)  # fmt: skip
from dev2pro.planning.fake_runs import Shape, nbytes
from dev2pro.training import checkpoint_files, distributed, ema, trainable
from dev2pro.training.checkpoint_space import LoraCheckpointConfig
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.loss import LOSSES, LossConfig, distillation_loss, pair_distillation_loss
from dev2pro.training.preserve import PreserveConfig, preservation_loss


def training(stage: str, config: Any, sizes: Sequence[Size]) -> Account:
    """Of a training stage's configuration; `sizes` are its buckets, of which the largest counts."""
    hardware, layout = config.hardware, Layout.of(config)
    encoders, size = load_encoders(config), max(sizes, key=lambda size: size[0] * size[1])
    micro = min(hardware.micro_batch, -(-config.batch // layout.ranks))
    shape = batch_shape(encoders, size, micro)
    path = {"lora": "trained_on", "distill": "teacher"}.get(stage)
    path = getattr(config, path) if path else config.model.path

    def transformer(dtype: torch.dtype = hardware.weights) -> FluxTransformer2DModel:
        adapter, offloaded = getattr(config, "adapter", None), hardware.offloaded_blocks
        made = fake_models.transformer(path, dtype, adapter, int8=hardware.int8_base, offloaded=offloaded)
        return trainable.select(made, getattr(config, "trainable", None), path)

    model = transformer()
    computing = transformer(hardware.compute) if hardware.shard else model  # sharded, what is gathered is in the computing precision
    other = {"lora": lambda: config.loss.teacher, "distill": lambda: path}.get(stage, lambda: None)()
    frozen = fake_models.transformer(other, hardware.compute if hardware.shard else hardware.weights) if other else None
    tensors, encoding = _Tensors.of(config, model, layout), encoding_parts(encoders, size)
    freed = hardware.shard or (hardware.step_in_backward and stage != "lora")
    step = fake_runs.training_step(
        computing, shape, _loss(config, frozen), hardware, held=not freed and config.batch > micro * layout.ranks, freed=freed, frozen=frozen
    )
    forward = fake_runs.prediction(computing, shape, hardware)
    decoding, fed = fake_runs.picture_decoding(encoders, 1, size), fake_runs.picture_encoding(encoders, micro, size)
    common = {**layout.overhead, "held-out pictures": _held_out(config, shape), "VAE": nbytes(encoders.pipeline.vae)}
    if frozen:
        common["teacher"] = nbytes(frozen) / (layout.shards if hardware.shard else 1)
    resting = common | {"weights": tensors.weights, "moments": tensors.moments, "average": 0 if hardware.ema_offload else tensors.average}
    kept = {} if hardware.shard or not freed else {"gradients": 0.0}
    gathered, gradients = _transient(computing, hardware), kept or {"gradients": tensors.gradients}
    activations = step.peak - (0 if freed else tensors.trained)
    own = tensors.own if tensors.average and not hardware.ema_offload else 0  # the weights beside their average
    gpu = {
        "encode text": layout.overhead | encoding["text"],
        "encode pictures": layout.overhead | encoding["latents"],
        "load": common | {"weights": tensors.weights, "a layer": largest_parameter(model) if hardware.int8_base else 0},
        "train": resting | gathered | gradients | {"activations": activations},
        "feed": resting | gradients | {"activations": fed.peak},
        "average": resting | {"distances": _distances(hardware, tensors, model)},
        "measure": resting | {"the model's own weights": own, **gathered, "activations": forward.peak},
        "sample": resting | {"the model's own weights": own, **gathered, "activations": max(forward.peak, decoding.peak)},
        "checkpoint": resting,
        "save": resting | {"a whole parameter": largest_parameter(model) if hardware.shard else 0},
    }
    if stage == "recover" and config.teacher:
        gpu["teacher"] = resting | {"teacher": tensors.weights, **gathered, "activations": forward.peak}
    state = tensors.state * layout.shards
    loras = config.checkpoint.count(config.steps) if isinstance(config.checkpoint, LoraCheckpointConfig) else 0
    saved = tensors.whole * distributed.DTYPES[config.save_dtype].itemsize if hasattr(config, "save_dtype") else tensors.numbers * 4
    intermediate = {"LoRAs of steps": loras * saved} if loras else {}
    return Account(
        stage=stage, ranks=layout.ranks, machines=layout.machines, gpu=gpu, blocks=len(flux1.blocks(model)), state=state,
        host=_training_host(config, layout, tensors, saved),
        disk={"checkpoints": (config.checkpoint.keep + 2) * state * checkpoint_files.MARGIN, "the result": saved} | intermediate,
        flops={"a step": step.flops / micro, "measuring": forward.flops / micro, "encoding": encoding_flops(encoders, size)},
        captions=int(hardware.encodings_gb * 1e9 / encoders.text_bytes()) // (2 if getattr(config, "preserve", PreserveConfig()).rewrite else 1),
        staying=text_encoder_bytes(encoders),
    )  # fmt: skip


@dataclass(frozen=True)
class _Tensors:
    """Bytes of one rank: all `weights` on the GPU and those `offloaded`, of the trained ones `own`, gradients, moments, average.

    Of the whole model: `trained` bytes, how many `numbers` these are, and how many there are as a `whole`, frozen ones with them.
    """

    weights: float
    offloaded: float
    loaded: float
    own: float
    gradients: float
    moments: float
    average: float
    trained: int
    numbers: int
    whole: int

    @classmethod
    def of(cls, config: Any, model: FluxTransformer2DModel, layout: Layout) -> "_Tensors":
        hardware, trained, shards = config.hardware, nbytes(model, trained=True), layout.shards
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        offloaded = offloaded_bytes(model)
        whole = sum(p.numel() for p in model.parameters())
        loaded = 0 if hardware.shard else whole * hardware.weights.itemsize  # as they are read
        copies = 2 if layout.ranks > 1 and not hardware.shard else 1  # DDP's buckets hold the gradients again
        average = 4 * numbers / shards if getattr(config, "ema", 0) else 0
        moments = fake_runs.optimizer_state(config.optim, model) / shards
        weights = (nbytes(model) - offloaded) / shards
        return cls(weights, offloaded, loaded, trained / shards, copies * trained / shards, moments, average, trained, numbers, whole)

    @property
    def state(self) -> float:
        """Bytes of this rank's part of a checkpoint."""
        return self.own + self.moments + self.average


def _distances(hardware: HardwareConfig, tensors: _Tensors, model: nn.Module) -> float:
    """What moving the average takes on the GPU: distances of a chunk of weights, and these in float32 where they are not."""
    if not tensors.average or hardware.ema_offload:
        return 0
    largest = max(p.numel() for p in model.parameters())
    return 4 * min(ema.CHUNK + largest, tensors.numbers) * (1 if hardware.weights.itemsize == 4 else 2)


def _transient(model: FluxTransformer2DModel, hardware: HardwareConfig) -> Parts:
    """Weights that are on the GPU for a while: FSDP2's gathered blocks and one block's whole gradients, or an offloaded block."""
    blocks = [nbytes(block) for block in flux1.blocks(model)]
    root, largest, itemsize = nbytes(model) - sum(blocks), max(blocks), hardware.compute.itemsize
    if hardware.shard:  # a block and the one ahead; its gradients as computed, and in float32 where they are reduced
        gradients = max(nbytes(block, trained=True) for block in flux1.blocks(model))
        return {"gathered weights": 2 * largest + root, "a block's gradients": gradients + gradients / itemsize * 4}
    return {"a block from host memory": float(largest)} if hardware.offloaded_blocks else {}


def _loss(config: Any, frozen: nn.Module | None) -> Callable[[nn.Module, NoisedBatch], Tensor]:
    """The stage's loss; `frozen` is distill's teacher, or the model that predicts lora's empty caption."""
    if frozen and hasattr(config, "flow_weight"):
        at, drawn = (pair_distillation_loss, (2,)) if config.pairs else (distillation_loss, ())
        return lambda model, batch: at(model, frozen, batch, batch.conditioning, torch.ones(*drawn, len(batch.t)), 1.0)
    chosen, weight = LOSSES[getattr(config, "loss", LossConfig()).name], getattr(config, "preserve", PreserveConfig()).weight

    def loss(model: nn.Module, batch: NoisedBatch) -> Tensor:
        guidance = torch.ones(len(batch.t))
        own = chosen(model, batch, guidance, batch.conditioning, frozen)
        return own + weight * preservation_loss(model, batch, guidance, batch.conditioning) if weight else own

    return loss


def _held_out(config: Any, shape: Shape) -> float:
    """Latents, noise and prompts of the probe's and the preview's pictures; a teacher's predictions for the probe."""
    tokens, text = shape.grid[0] * shape.grid[1] * shape.channels, (shape.prompt[0] * shape.prompt[1] + shape.pooled) * shape.dtype.itemsize
    predictions = config.probe.bins * tokens * 4 if getattr(config, "teacher", None) else 0
    return config.probe.samples * (3 * 4 * tokens + text + predictions) + config.preview.pictures * (4 * tokens + 2 * text)


def _training_host(config: Any, layout: Layout, tensors: _Tensors, saved: float) -> Phases:
    hardware, local = config.hardware, layout.local
    always: Parts = {
        "processes": PROCESS * local,
        "encodings": hardware.encodings_gb * 1e9 * local,
        "pictures read ahead": config.data.read.prefetch_mb * 1e6 * local,
        "offloaded blocks": tensors.offloaded * local,
        "average": tensors.average * local if hardware.ema_offload else 0,
    }
    return {
        "load": always | {"weights": tensors.loaded * local},
        "measure": always | {"the model's own weights": tensors.own * local if tensors.average and hardware.ema_offload else 0},
        "checkpoint": always | {"checkpoint": STAGED * tensors.state * local},
        "save": always | {"the result": saved},
    }
