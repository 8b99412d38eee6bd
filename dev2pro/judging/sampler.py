"""Samples pictures: the same prompts and the same noise for every model and LoRA, one model in memory at a time."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dev2pro import draws, signals
from dev2pro.artifacts import record
from dev2pro.errors import ConfigError
from dev2pro.judging.cells import Inference
from dev2pro.models import flow_matching, flux1, lora, offload, sampling
from dev2pro.models.encodings import PromptEncoder
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.models.sampling import SamplingConfig

NOTHING = (None, None, 1.0)
DECODED_AT_ONCE = 1024 * 1024  # pixels: the VAE needs some 2.5 GB for a picture of 1024 px in bfloat16


class Sampler:
    """Samples P prompts with R seeds each; row number p * R + r is prompt p with seed r.

    Models are loaded when they are first needed: text encoders, which are freed once every prompt is encoded, then one transformer after
    the other. The VAE stays.
    """

    def __init__(
        self, model: ModelConfig, config: SamplingConfig, prompts: Sequence[str], *, seeds: int, seed: int, resolution: int, dtype: torch.dtype,
        encoder_dtype: torch.dtype, device: torch.device, offloaded_blocks: int = 0, int8_base: bool = False, int8_encoders: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.config, self.prompts, self.seeds, self.seed, self.resolution = model, config, prompts, seeds, seed, resolution
        self.dtype, self.encoder_dtype, self.device, self.offloaded_blocks = dtype, encoder_dtype, device, offloaded_blocks
        self.int8_base, self.int8_encoders = int8_base, int8_encoders
        self.transformer: FluxTransformer2DModel | None = None
        self._applied: tuple[Inference | None, str | None, float] = NOTHING
        self._largest = config.batch
        self._fingerprint = functools.cache(record.fingerprint)

    @classmethod
    def of(cls, config: Any, prompts: Sequence[str], device: torch.device) -> "Sampler":
        """Of a stage's configuration: its model, sampling, seeds, seed, resolution and hardware."""
        hardware = config.hardware
        return cls(
            config.model, config.sampling, prompts, seeds=config.seeds, seed=config.seed, resolution=config.resolution, dtype=hardware.inference,
            encoder_dtype=hardware.encoders, device=device, offloaded_blocks=hardware.offloaded_blocks, int8_base=hardware.int8_base,
            int8_encoders=hardware.int8_encoders,
        )  # fmt: skip

    @property
    def count(self) -> int:
        """Pictures of a cell."""
        return len(self.prompts) * self.seeds

    def identity(self, inference: Inference, path: str | None, strength: float = 1.0) -> dict[str, Any]:
        """Everything that the pictures of an inference base and a LoRA depend on, as JSON values; a strength of 1 goes without saying."""
        return {
            "transformer": self._fingerprint(inference.path), "lora": self._fingerprint(path) if path else None,
            "guidance": inference.guidance, "cfg_scale": inference.cfg_scale, "encoders": self._fingerprint(self.model.path),
            "variant": self.model.variant, "max_sequence_length": self.model.max_sequence_length, "prompts": list(self.prompts),
            "seeds": self.seeds, "seed": self.seed, "draws": draws.VERSION, "resolution": self.resolution, "steps": self.config.steps,
            "batch": self.config.batch, "dtype": str(self.dtype), "encoder_dtype": str(self.encoder_dtype),
            "int8": [self.int8_base, self.int8_encoders], **({"strength": strength} if path and strength != 1 else {}),
        }  # fmt: skip

    def forwards(self, inference: Inference) -> int:
        """Forward passes for one picture."""
        return self.config.steps * (1 if inference.cfg_scale == 1 else 2)

    def apply(self, inference: Inference, path: str | None, strength: float = 1.0) -> None:
        """Loads a transformer, once the one before is gone, and a LoRA file at a strength; nothing that is there already."""
        if (inference, path, strength) == self._applied:
            return
        _ = self._parts  # the text encoders come and go while no transformer is there
        before, lora_before, _ = self._applied
        if before is None or inference.path != before.path or self.transformer is None:
            self.release()
            self.transformer = flux1.load_transformer(inference.path, self.dtype, self.model.variant).eval().requires_grad_(False)
            if self.int8_base:
                lora.to_int8(self.transformer, torch.device("cpu") if self.offloaded_blocks else self.device)
            offload.place(self.transformer, self.device, self.offloaded_blocks)
        elif lora_before:
            lora.unload_lora(self.transformer)
        if path:
            lora.load_lora(self.transformer, path, strength)
            for module in self.transformer.modules():
                if isinstance(module, LoraLayer):  # peft puts its halves where the layer's weights wait
                    module.lora_A.to(self.device), module.lora_B.to(self.device)
        self._applied = (inference, path, strength)

    def release(self) -> None:
        """Drops the transformer."""
        self.transformer, self._applied = None, NOTHING
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sample(self, rows: range) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], float32 on the CPU, of what is applied; in smaller batches where the device's memory ends."""
        done, first = list[Tensor](), rows.start
        while first < rows.stop:
            part = range(first, min(first + self._largest, rows.stop))
            try:
                done.append(self._sample(part))
                first = part.stop
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            self._halve(len(part), reason)  # out here the failed batch is freed
        return torch.cat(done)

    def _halve(self, failed: int, reason: str) -> None:
        if failed == 1:
            raise ConfigError(
                f"One picture of resolution={self.resolution} does not fit into the memory of {self.device} ({reason}). "
                "Choose a smaller resolution, or hardware.inference_dtype=bfloat16."
            )
        self._largest = failed // 2
        signals.emit(f"sampling.batch={self.config.batch} does not fit into the memory of {self.device}: {self._largest} pictures at a time")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @functools.cached_property
    def _parts(self) -> tuple[Encoders, PromptEncoder]:
        """The VAE, and every prompt encoded; the text encoders are gone."""
        encoders = Encoders(self.model, self.encoder_dtype, self.device, int8=self.int8_encoders)
        encoders.grid((self.resolution,) * 2)  # a size that does not fit is refused before the prompts are encoded
        prompt_encoder = PromptEncoder(self.model, encoders, math.inf)
        prompt_encoder.precompute(self.prompts)
        return encoders, prompt_encoder

    def _sample(self, rows: range) -> Tensor:
        encoders, prompt_encoder = self._parts
        inference, size = self._applied[0], (self.resolution,) * 2
        assert self.transformer is not None
        assert inference is not None
        grid, shape = encoders.grid(size), encoders.token_shape(size)
        pairs = [divmod(row, self.seeds) for row in rows]
        noise = torch.stack([sampling.initial_noise(self.seed, repetition, prompt, shape) for prompt, repetition in pairs])
        latents = sampling.sample(
            self.transformer, noise.to(self.device),
            flux1.build_conditioning(*prompt_encoder.encode([self.prompts[prompt] for prompt, _ in pairs]), grid),
            flux1.build_conditioning(*prompt_encoder.encode([""] * len(rows)), grid),
            guidance=inference.guidance, cfg_scale=inference.cfg_scale, steps=self.config.steps,
            mu=flow_matching.shift_mu(shape[0], flux1.scheduler_settings(self.model.path)),
        )  # fmt: skip
        chunks = latents.split(max(1, DECODED_AT_ONCE // self.resolution**2))
        return torch.cat([encoders.decode(chunk, self.resolution, self.resolution).float().cpu() for chunk in chunks])
