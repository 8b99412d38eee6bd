"""Loads the parts of a diffusers FluxPipeline folder or hub repository, and calls its transformer."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from dev2pro.artifacts import store
from dev2pro.errors import ConfigError
from dev2pro.models import model_folder
from dev2pro.models.model_folder import check_pipeline, fetch, transformer_config
from dev2pro.models.transfer import to_device
from dev2pro.models.vae import decode, encode
from dev2pro.models.weight_files import DIFFUSERS, TRANSFORMERS, variant_of

TEXT_BATCH = 4  # captions per call of the text encoders: as many as a micro-batch on large cards; T5 fills a GPU with fewer


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which FLUX-like model; see conf/model/."""

    path: str  # a FluxPipeline folder or a hub id: VAE, text encoders, scheduler, and the base's transformer
    usual_guidance: float  # the guidance input that users of the base usually set
    max_sequence_length: int  # T5 tokens per prompt; padding changes the predictions, so use the same value for training and sampling
    variant: str | None = None  # of the weight files, such as "bf16"


@dataclass(frozen=True)
class Conditioning:
    """Conditioning inputs of the transformer: prompt (B, L, D), pooled (B, P), text_ids (L, 3), image_ids (S, 3)."""

    prompt: Tensor
    pooled: Tensor
    text_ids: Tensor
    image_ids: Tensor


def build_conditioning(prompt: Tensor, pooled: Tensor, grid: tuple[int, int]) -> Conditioning:
    """Conditioning of samples of `grid` (down, across) tokens: prompts (B, L, D), pooled prompts (B, P) and position ids."""
    return Conditioning(prompt, pooled, prompt.new_zeros(prompt.shape[1], 3), image_ids(*grid, prompt.device, prompt.dtype))


def predict(transformer: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: Tensor | float) -> Tensor:
    """The predicted velocity (B, S, C) for packed latents x_t (B, S, C) at times t (B,) in [0, 1].

    `guidance` is the guidance INPUT of the transformer, a number or (B,); it is not a CFG scale.
    """
    whole: Any = getattr(transformer, "module", transformer)
    dtype = whole.x_embedder.weight.dtype  # latents and encodings have precisions of their own
    return transformer(
        hidden_states=x_t.to(dtype),
        timestep=t.to(dtype),
        guidance=torch.as_tensor(guidance, dtype=dtype, device=x_t.device).expand(x_t.shape[0]),
        encoder_hidden_states=conditioning.prompt.to(dtype),
        pooled_projections=conditioning.pooled.to(dtype),
        txt_ids=conditioning.text_ids.to(dtype),
        img_ids=conditioning.image_ids.to(dtype),
        return_dict=False,
    )[0]


class _NoGuidance(torch.nn.Module):
    """In place of a guidance embedder: adds nothing to the time's embedding, whatever the guidance."""

    def forward(self, guidance: Tensor) -> Tensor:
        """A zero."""
        return guidance.new_zeros(())


def bypass_guidance(transformer: FluxTransformer2DModel) -> None:
    """Removes the transformer's guidance input: it takes a guidance still, and makes nothing of it.

    That is how ai-toolkit and diffusion-pipe train LoRAs on a base "without guidance" (`bypass_guidance_embedding`).
    """
    transformer.time_text_embed.guidance_embedder = _NoGuidance()


def load_transformer(path: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> FluxTransformer2DModel:
    """The transformer of a pipeline folder, an artifact of `recover` or `distill` (here or in s3), or a hub id. Checks it before reading weights."""
    model_folder.check_transformer(path, variant)
    path = store.resolve(path)
    variant = variant_of(path, "transformer", DIFFUSERS, variant)
    transformer, info = fetch(
        path,
        lambda: FluxTransformer2DModel.from_pretrained(
            path, subfolder="transformer", dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        ),
    )
    check_complete(path, info["missing_keys"], ())
    return transformer


def weight_files(path: str, variant: str | None = None) -> dict[str, Path]:
    """Parameter -> the safetensors file that holds it, for a transformer as `load_transformer` takes it; fetched first if it is on the hub."""
    path = store.resolve(path)
    if not Path(path).is_dir():
        path = fetch(path, lambda: snapshot_download(path, allow_patterns=["transformer/*"]))
    variant = variant_of(path, "transformer", DIFFUSERS, variant)
    folder, suffix = Path(path) / "transformer", f".{variant}" if variant else ""
    index = folder / f"{DIFFUSERS}.safetensors.index{suffix}.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    file = folder / f"{DIFFUSERS}{suffix}.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The model in {path} cannot be read: {error}. Download or convert it again.") from error


def check_complete(path: str, names: Collection[str], found: Collection[str]) -> None:
    """Raises ConfigError if weights lack parameters, which diffusers would initialize randomly with a warning."""
    if missing := set(names) - set(found):
        raise ConfigError(f"The model in {path} cannot be read: its weights lack {min(missing)}. Download or convert it again.")


def blocks(model: Any) -> list[torch.nn.Module]:
    """The transformer blocks, in the order they run."""
    return [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]


def skeleton(path: str, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """The transformer on the meta device: names, shapes and types without memory. Its weights are not read."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(transformer_config(path)).to(dtype)


class Encoders:
    """The frozen parts of a pipeline: VAE, CLIP, T5 and the scheduler's settings.

    A part is in host memory until its first use moves it to `device`; free it once everything is encoded. `int8`: the weights of T5's
    linear layers are rounded to int8 with one scale a row (torchao) on the way, which halves the 9.5 GB of T5-XXL in bfloat16.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device, *, int8: bool = False) -> None:
        check_pipeline(model.path, model.variant)
        self.pipeline = fetch(model.path, lambda: _load_pipeline(model, dtype))
        for tokens, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            size, expected = len(getattr(self.pipeline, tokens)), getattr(self.pipeline, encoder).config.vocab_size
            if size < 0.9 * expected:  # transformers makes an empty tokenizer if the files are missing
                raise ConfigError(
                    f"The model in {model.path} cannot be read: {tokens} knows {size} pieces and {encoder} {expected}. Download or convert it again."
                )
        self.max_sequence_length = model.max_sequence_length
        self.device, self.dtype, self.int8 = device, dtype, int8
        self._on_device: set[str] = set()

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of the square that one packed latent token covers."""
        return self.pipeline.vae_scale_factor * 2

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (down, across) of a picture of `size` (width, height) pixels. Raises ConfigError if the size is no multiple of a token's."""
        side = self.pixels_per_token
        if misfit := next((pixels for pixels in size if pixels < 1 or pixels % side), 0):
            raise ConfigError(
                f"{misfit} pixels do not fit this model: its VAE needs a multiple of {side}. "
                f"Choose {max(1, misfit // side) * side}, and data.bucket_step to match."
            )
        return size[1] // side, size[0] // side

    def token_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(S, C) of the packed latents of a picture of `size` (width, height) pixels."""
        down, across = self.grid(size)
        return down * across, 4 * self.pipeline.vae.config.latent_channels

    def text_bytes(self) -> int:
        """Bytes of one encoded caption."""
        width, pooled = self.pipeline.text_encoder_2.config.d_model, self.pipeline.text_encoder.config.hidden_size
        return (self.max_sequence_length * width + pooled) * self.dtype.itemsize

    def weights(self, *parts: str) -> str:
        """SHA-256 over the weights and configurations of parts such as "vae", before their first use; equal hashes mean equal encodings."""
        assert not (self.int8 and "text_encoder_2" in self._on_device), "T5's weights are rounded already"
        digest = hashlib.sha256()
        for part in parts:
            module = getattr(self.pipeline, part)
            settings = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
            settings = {key: str(value) for key, value in settings.items() if not key.startswith("_")}
            digest.update(json.dumps(settings, sort_keys=True).encode())
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def free(self, *parts: str) -> None:
        """Frees parts that are no longer needed."""
        for part in parts:
            setattr(self.pipeline, part, None)

    def _use(self, *parts: str) -> None:
        """Moves parts to the device if they are not there."""
        for part in set(parts) - self._on_device:
            module = getattr(self.pipeline, part)
            if part == "text_encoder_2" and self.int8:
                from torchao.quantization import Int8WeightOnlyConfig, quantize_

                quantize_(module, Int8WeightOnlyConfig(), device=self.device)  # layer by layer, so that the whole is never there in bfloat16
            module.to(self.device)
            self._on_device.add(part)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T5 states (K, L, D) and pooled CLIP states (K, P).

        Every call of the encoders has TEXT_BATCH rows, the last one filled up with "". A kernel is chosen by its shapes and computes a
        row without the others, so a caption's bits do not depend on what is encoded beside it; another number of rows could change them.
        """
        self._use("text_encoder", "text_encoder_2")
        states = []
        for first in range(0, len(prompts), TEXT_BATCH):
            chunk = [*prompts[first : first + TEXT_BATCH]]
            chunk += [""] * (TEXT_BATCH - len(chunk))
            prompt, pooled, _ = self.pipeline.encode_prompt(
                chunk, chunk, device=self.device, num_images_per_prompt=1, max_sequence_length=self.max_sequence_length
            )
            states.append((prompt, pooled))
        return torch.cat([prompt for prompt, _ in states])[: len(prompts)], torch.cat([pooled for _, pooled in states])[: len(prompts)]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the packed, normalised latents, (B, S, C) each, for pixels (B, 3, H, W) in [-1, 1]."""
        self._use("vae")
        return encode(self.pipeline.vae, pixels.to(self.device))

    def decode(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] of packed latents (B, S, C)."""
        self._use("vae")
        return decode(self.pipeline.vae, packed, self.grid((width, height)))


def _load_pipeline(model: ModelConfig, dtype: torch.dtype) -> FluxPipeline:
    """The pipeline without its transformer. In a folder, each part is read in the variant that it has."""
    parts = {}
    if model.variant and Path(model.path).is_dir():  # diffusers' own choice cannot stand a file without an ending
        for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)):
            variant = variant_of(model.path, part, TRANSFORMERS, model.variant)
            parts[part] = kind.from_pretrained(model.path, subfolder=part, dtype=dtype, variant=variant, use_safetensors=True)
        parts["vae"] = load_vae(model, dtype)
    variant = None if parts else model.variant
    return FluxPipeline.from_pretrained(model.path, transformer=None, dtype=dtype, variant=variant, use_safetensors=True, **parts)


def load_vae(model: ModelConfig, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE alone, on the CPU."""
    variant = variant_of(model.path, "vae", DIFFUSERS, model.variant)
    return fetch(model.path, lambda: AutoencoderKL.from_pretrained(model.path, subfolder="vae", dtype=dtype, variant=variant, use_safetensors=True))


def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(S, 3) positions of the packed tokens of a latent grid of `height` x `width` tokens."""
    return to_device(FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), dtype), device)


def scheduler_settings(path: str) -> dict[str, Any]:
    """The scheduler's configuration, with the resolution shift."""
    if Path(path).is_dir():
        return json.loads((Path(path) / "scheduler" / "scheduler_config.json").read_text())
    from diffusers import FlowMatchEulerDiscreteScheduler

    return fetch(path, lambda: FlowMatchEulerDiscreteScheduler.load_config(path, subfolder="scheduler"))
