"""The pictures of a cell: the same prompts and the same noise for every model and LoRA, shared among the ranks."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import FluxTransformer2DModel
from torch import Tensor

from dev2pro.judging.cells import Inference
from dev2pro.models import flow_matching, flux1, lora, sampling
from dev2pro.models.encodings import PromptEncoder
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.models.sampling import SamplingConfig


class Sampler:
    """Samples P prompts with R seeds each: pictures are (P, R, 3, H, W) in [0, 1]."""

    def __init__(
        self, model: ModelConfig, config: SamplingConfig, prompts: Sequence[str], *, seeds: int, seed: int, resolution: int, dtype: torch.dtype,
        text_cache_bytes: float, accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.model, self.config, self.prompts, self.seeds, self.resolution = model, config, prompts, seeds, resolution
        self.dtype, self.accelerator = dtype, accelerator
        self.no_lora_images: dict[str, Tensor] = {}
        self.encoders = Encoders(model, dtype, accelerator.device)
        self.grid, shape = self.encoders.grid((resolution,) * 2), self.encoders.token_shape((resolution,) * 2)
        self.prompt_encoder = PromptEncoder(model, self.encoders, text_cache_bytes)
        self.mu = flow_matching.shift_mu(shape[0], flux1.scheduler_settings(model.path))
        pairs = [(p, r) for p in range(len(prompts)) for r in range(seeds)]
        self.rows = torch.tensor([p for p, _ in pairs])
        self.noise = torch.stack([sampling.initial_noise(seed, r, p, shape) for p, r in pairs])

    def load(self, inference: Inference) -> FluxTransformer2DModel:
        """The transformer of an inference base, on the device."""
        return flux1.load_transformer(inference.path, self.dtype, self.model.variant).to(self.accelerator.device).eval()

    def sample_cell(self, transformer: FluxTransformer2DModel, inference: Inference, path: str | None) -> Tensor:
        """The pictures of one cell, on the CPU of every rank; the ranks share the work. Without a LoRA they are the same for every style."""
        if path is None and inference.name in self.no_lora_images:
            return self.no_lora_images[inference.name]
        if path:
            lora.load_lora(transformer, path)
        batches = list(enumerate(torch.arange(len(self.rows)).split(self.config.batch)))
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        drawn = gather_object([(number, self._batch(transformer, inference, rows)) for number, rows in mine])
        if path:
            lora.unload_lora(transformer)
        images = torch.cat([batch for _, batch in sorted(drawn, key=lambda pair: pair[0])]).unflatten(0, (-1, self.seeds))
        if path is None:
            self.no_lora_images[inference.name] = images
        return images

    def _batch(self, transformer: FluxTransformer2DModel, inference: Inference, rows: Tensor) -> Tensor:
        conditioning = flux1.build_conditioning(*self.prompt_encoder.encode([self.prompts[i] for i in self.rows[rows]]), self.grid)
        null_conditioning = flux1.build_conditioning(*self.prompt_encoder.encode([""] * len(rows)), self.grid)
        latents = sampling.sample(
            transformer, self.noise[rows].to(self.accelerator.device), conditioning, null_conditioning,
            guidance=inference.guidance, cfg_scale=inference.cfg_scale, steps=self.config.steps, mu=self.mu,
        )  # fmt: skip
        return self.encoders.decode(latents, self.resolution, self.resolution).float().cpu()
