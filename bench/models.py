"""FLUX pipelines of random weights, from two million parameters to FLUX.1-dev's twelve billion, and captioned pictures to train them on."""

import stages  # isort: skip  # noqa: F401  (first, because it quiets the libraries)

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.shards import photo
from data import digits
from dev2pro.training import sharding
from stages import miniature

FOLDER = Path("runs/bench")
PICTURES = 32
COPIED = 1 << 24  # numbers drawn once and repeated over all weights: drawing twelve billion takes minutes


@dataclass(frozen=True)
class Size:
    """Shape of a pipeline. `pixels`: sides of pictures that `make gpu` trains on; `tokens`: of a prompt, for T5."""

    double: int
    single: int
    heads: int
    head_dim: int
    rope: tuple[int, int, int]
    clip: int
    clip_layers: int
    t5: int
    t5_layers: int
    vae: tuple[int, ...]
    vae_layers: int
    pixels: tuple[int, ...]
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def transformer(self) -> dict[str, Any]:
        """The configuration of its FluxTransformer2DModel."""
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=self.double, num_single_layers=self.single, attention_head_dim=self.head_dim,
                num_attention_heads=self.heads, joint_attention_dim=self.t5, pooled_projection_dim=self.clip, guidance_embeds=True,
                axes_dims_rope=self.rope,
            )  # fmt: skip
        return dict(model.config)


TINY = Size(2, 4, 4, 32, (8, 12, 12), 64, 2, 64, 2, (16, 32, 32, 32), 1, (64,), 64)
SMALL = Size(3, 6, 8, 64, (16, 24, 24), 128, 2, 256, 4, (32, 64, 64, 64), 1, (256, 512), 512)
FLUX = Size(19, 38, 24, 128, (16, 56, 56), 768, 12, 4096, 24, (128, 256, 512, 512), 2, (512, 1024), 512, torch.bfloat16)
SIZES = {"tiny": TINY, "small": SMALL, "12b": FLUX}
CUSTOM = re.compile(r"(\d+)\+(\d+)x(\d+)")


def size(name: str) -> Size:
    """A named size, or D+SxW: D double and S single blocks of width W, a multiple of 64, with the encoders of `small`."""
    if name in SIZES:
        return SIZES[name]
    if not (match := CUSTOM.fullmatch(name)) or (width := int(match[3])) % 64 or not width:
        raise SystemExit(f"--size {name} is no size. Choose miniature, {', '.join(SIZES)}, or blocks and width such as 4+8x512, a multiple of 64.")
    return replace(SMALL, double=int(match[1]), single=int(match[2]), heads=width // 64)


def pipeline(name: str, *, weights: bool = False) -> Path:
    """The folder of a FluxPipeline of random weights, made once. Without `weights` its transformer is only a configuration."""
    shape, folder = size(name), FOLDER / "models" / f"{name}{'-whole' if weights else ''}"
    if (folder / "transformer/config.json").is_file():
        return folder
    torch.manual_seed(0)
    clip_tokens, t5_tokens = miniature.tokenizers()
    clip_tokens.model_max_length, t5_tokens.model_max_length = 77, 512
    clip, t5, vae = _encoders(shape, clip_tokens, t5_tokens)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    transformer = unfilled(shape.transformer, shape.dtype)
    if weights:
        fill(transformer, "cpu")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip, tokenizer=clip_tokens, text_encoder_2=t5, tokenizer_2=t5_tokens,
        transformer=transformer if weights else None,
    ).save_pretrained(partial)  # fmt: skip
    if not weights:
        transformer.save_config(partial / "transformer")
    partial.rename(folder)
    return folder


def _encoders(shape: Size, clip_tokens: Any, t5_tokens: Any) -> tuple[CLIPTextModel, T5EncoderModel, AutoencoderKL]:
    """CLIP, T5 and VAE of random weights, drawn on a GPU if there is one: T5's five billion take minutes on a CPU."""
    t5_head, usual = (16 if shape.t5 < 1024 else 64), torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            clip = CLIPTextModel(CLIPTextConfig(
                vocab_size=len(clip_tokens), hidden_size=shape.clip, intermediate_size=4 * shape.clip, projection_dim=shape.clip,
                num_hidden_layers=shape.clip_layers, num_attention_heads=shape.clip // (16 if shape.clip < 768 else 64),
                bos_token_id=clip_tokens.bos_token_id, eos_token_id=clip_tokens.eos_token_id, pad_token_id=clip_tokens.pad_token_id,
            ))  # fmt: skip
            t5 = T5EncoderModel(T5Config(
                vocab_size=len(t5_tokens), d_model=shape.t5, d_ff=5 * shape.t5 // 2, d_kv=t5_head, num_heads=shape.t5 // t5_head,
                num_layers=shape.t5_layers, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
                pad_token_id=t5_tokens.pad_token_id, eos_token_id=t5_tokens.eos_token_id,
            ))  # fmt: skip
            vae = AutoencoderKL(
                in_channels=3, out_channels=3, latent_channels=16, block_out_channels=shape.vae, layers_per_block=shape.vae_layers,
                norm_num_groups=min(32, shape.vae[0] // 2), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=256, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(usual)
    return clip, t5, vae


def unfilled(config: dict[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer on the meta device."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config).to(dtype)


def fill(model: torch.nn.Module, device: torch.device | str) -> None:
    """Gives a model of the meta device random weights of standard deviation 0.02, of a sharded one this rank's parts."""
    model.to_empty(device=device)
    with torch.no_grad():
        parts = [sharding.local_tensor(parameter).view(-1) for parameter in model.parameters()]
        numbers = 0.02 * torch.randn(min(COPIED, max(map(len, parts))), generator=torch.Generator().manual_seed(0))
        numbers = numbers.to(parts[0])
        for chunk in (chunk for part in parts for chunk in part.split(len(numbers)) if len(part)):
            chunk.copy_(numbers[: len(chunk)])


def pictures(side: int, count: int = PICTURES, first: int = 0) -> Path:
    """A folder of JPEGs of `side` x `side` pixels with metadata.jsonl, which both dev2pro and diffusers' scripts read; made once.

    They are the pictures number `first` and on of one endless series.
    """
    folder = FOLDER / "pictures" / f"{side}-{first}-{count}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = []
    for i in range(count):
        (partial / f"{i:05d}.jpg").write_bytes(photo(side, first + i, 3.0))
        rows.append(json.dumps({"file_name": f"{i:05d}.jpg", "text": digits.PHRASINGS[i % 5].format(digits.NAMES[i % 10])}))
    (partial / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    partial.rename(folder)
    return folder


def held_out(side: int) -> Path:
    """Such a folder of one picture that `pictures` does not have."""
    return pictures(side, 1, first=1000)
