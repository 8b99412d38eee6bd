"""Loads the parts of a diffusers FluxPipeline folder or hub repository, and calls its transformer."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from dev2pro.artifacts import record, store
from dev2pro.errors import ConfigError, TryAgainError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    x_t = x_t.to(conditioning.prompt.dtype)  # latents are float32, the prompt has the model's precision
    guidance = torch.as_tensor(guidance, dtype=x_t.dtype, device=x_t.device).expand(x_t.shape[0])
    return transformer(
        hidden_states=x_t,
        timestep=t.to(x_t),
        guidance=guidance,
        encoder_hidden_states=conditioning.prompt,
        pooled_projections=conditioning.pooled,
        txt_ids=conditioning.text_ids,
        img_ids=conditioning.image_ids,
        return_dict=False,
    )[0]


def load_transformer(path: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> FluxTransformer2DModel:
    """The transformer of a pipeline folder, an artifact of `recover` or `distill` (here or in s3), or a hub id. Checks it before reading weights."""
    check_transformer(path)
    path = store.resolve(path)
    transformer, info = _load_or_raise(
        path,
        lambda: FluxTransformer2DModel.from_pretrained(path, subfolder="transformer", dtype=dtype, variant=variant, output_loading_info=True),
    )
    if info["missing_keys"]:  # diffusers would initialize them randomly with a warning
        raise ConfigError(f"The model in {path} cannot be read: its weights lack {min(info['missing_keys'])}. Download or convert it again.")
    return transformer


def parameters(path: str) -> int:
    """The number of the transformer's parameters, without reading them."""
    with torch.device("meta"):
        return sum(p.numel() for p in FluxTransformer2DModel.from_config(check_transformer(path)).parameters())


def check_transformer(path: str) -> dict[str, Any]:
    """The transformer's configuration. Raises ConfigError if `path` holds no guidance-distilled FLUX transformer."""
    path = store.resolve(path)
    _check_path(path)
    config = _load_or_raise(path, lambda: FluxTransformer2DModel.load_config(path, subfolder="transformer"))
    if config.get("_class_name") != "FluxTransformer2DModel":
        raise ConfigError(
            f"{path}/transformer is a {config.get('_class_name')}, not a FluxTransformer2DModel. dev2pro works on FLUX.1-dev and its kin."
        )
    if not config.get("guidance_embeds"):
        raise ConfigError(
            f"The transformer in {path} has no guidance input (guidance_embeds is false), so it is not guidance-distilled: "
            "there is nothing to recover, train on it directly. Give FLUX.1-dev or a model made from it."
        )
    return config


def check_pipeline(path: str) -> None:
    """Raises ConfigError unless `path` holds a complete FluxPipeline."""
    _check_path(path)
    index = _load_or_raise(path, lambda: FluxPipeline.load_config(path))
    if index.get("_class_name") != "FluxPipeline":
        raise ConfigError(f"{path} is a {index.get('_class_name')}, not a FluxPipeline. Point model.path at a FLUX.1-dev folder in diffusers layout.")


def _check_path(path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if (folder / record.CONFIG).is_file():
            record.read(path)  # a stage's output folder counts only once it is finished
        if record.pruned(path):
            raise ConfigError(f"The weights of {path} were removed to make room; only its record is left. Give a newer model, or make it again.")
        if not (folder / "model_index.json").is_file() and not (folder / "transformer" / "config.json").is_file():
            raise ConfigError(
                f"{path} is no diffusers pipeline folder (no model_index.json and no transformer/config.json). Give the folder that "
                "holds model_index.json; a single .safetensors file must be converted to the diffusers layout first."
            )
    elif folder.exists():
        raise ConfigError(f"{path} is a file. Give a folder in diffusers layout, which holds model_index.json.")
    elif not HUB_ID.fullmatch(path) or path.startswith(("runs/", "data/")):
        raise ConfigError(f"The model folder {path} does not exist. Correct the path, or give a hub id such as black-forest-labs/FLUX.1-dev.")


def _load_or_raise(path: str, load: Any) -> Any:
    try:
        return load()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if Path(path).is_dir():
            raise ConfigError(f"The model in {path} cannot be read: {reason}. Download or convert it again.") from error
        raise TryAgainError(
            f"{path} is no local folder and could not be fetched from the Hugging Face hub ({reason}). Check the name and the network, accept "
            "the model's licence and run `hf auth login` if it is gated, or give a local folder."
        ) from error


class Encoders:
    """The frozen parts of a pipeline: VAE, CLIP, T5 and the scheduler's settings. Free them once everything is encoded."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        check_pipeline(model.path)
        self.pipeline = _load_or_raise(
            model.path, lambda: FluxPipeline.from_pretrained(model.path, transformer=None, dtype=dtype, variant=model.variant)
        ).to(device)
        for tokens, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            size, expected = len(getattr(self.pipeline, tokens)), getattr(self.pipeline, encoder).config.vocab_size
            if size < 0.9 * expected:  # transformers makes an empty tokenizer if the files are missing
                raise ConfigError(
                    f"The model in {model.path} cannot be read: {tokens} knows {size} pieces and {encoder} {expected}. Download or convert it again."
                )
        self.max_sequence_length = model.max_sequence_length
        self.device, self.dtype = device, dtype

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
        """SHA-256 over the weights and configurations of parts such as "vae"; equal hashes mean equal encodings."""
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

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """T5 states (K, L, D) and pooled CLIP states (K, P)."""
        prompt, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, device=self.device, num_images_per_prompt=1, max_sequence_length=self.max_sequence_length
        )
        return prompt, pooled

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the packed, normalised latents, (B, S, C) each, for pixels (B, 3, H, W) in [-1, 1]."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        mean = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
        return pack(mean), pack(posterior.std * vae.config.scaling_factor)

    def decode(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] of packed latents (B, S, C)."""
        return decode(self.pipeline.vae, packed, self.grid((width, height)))


def load_vae(model: ModelConfig, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE alone, on the CPU."""
    return _load_or_raise(model.path, lambda: AutoencoderKL.from_pretrained(model.path, subfolder="vae", dtype=dtype, variant=model.variant))


@torch.no_grad()
def decode(vae: AutoencoderKL, packed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] of packed latents (B, S, C) of `grid` (down, across) tokens."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = FluxPipeline._unpack_latents(packed, *(2 * factor * tokens for tokens in grid), factor)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C): 2x2 patches as tokens."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(S, 3) positions of the packed tokens of a latent grid of `height` x `width` tokens."""
    return FluxPipeline._prepare_latent_image_ids(1, height, width, device, dtype)


def scheduler_settings(path: str) -> dict[str, Any]:
    """The scheduler's configuration, with the resolution shift."""
    if Path(path).is_dir():
        return json.loads((Path(path) / "scheduler" / "scheduler_config.json").read_text())
    from diffusers import FlowMatchEulerDiscreteScheduler

    return _load_or_raise(path, lambda: FlowMatchEulerDiscreteScheduler.load_config(path, subfolder="scheduler"))
