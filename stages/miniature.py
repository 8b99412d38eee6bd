"""Makes the miniature's frozen parts: the pipeline (tokenizers, T5, CLIP, VAE, an untrained transformer) or the judge.

`make miniature` runs this for both, trains the teacher with `stages.recover` and distils the base with `stages.distill`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from data import digits
from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.log import Log
from stages import frame

WIDTH = 64  # of the text encoders and the judge
TOKENS = 32  # longest prompt: the judge's, with its style words
LATENT_CHANNELS = 4


@dataclass(slots=True, kw_only=True)
class MiniatureConfig:
    """See conf/miniature.yaml."""

    out: str
    part: str
    seed: int
    vae_steps: int
    clip_steps: int
    judge_steps: int
    vae_batch: int
    clip_batch: int
    lr: float
    check: bool = field(default=False, metadata={"identity": False})


def run(config: MiniatureConfig) -> Artifact | None:
    """Writes the shards, the prompts and `pipeline/`, or `judge/`, into `config.out`."""
    if config.part not in PARTS:
        raise ConfigError(f"part={config.part} is not made here. Choose one of {', '.join(PARTS)}.")
    finished = run_folder.acquire(config.out, "miniature", config, {}, look=config.check)
    if finished or config.check:
        return finished or frame.checked("miniature", config)
    torch.set_num_threads(1)  # the two parts run side by side, a core each
    steps, metrics = PARTS[config.part](config, Path(config.out), *digits.load())
    return record.write(config.out, "miniature", config.part, config, {}, step=steps, metrics=metrics)


def make_pipeline(config: MiniatureConfig, out: Path, train: list[digits.Digit], held_out: list[digits.Digit]) -> tuple[int, dict[str, Any]]:
    """Shards, prompts.json and `pipeline/`; returns steps and metrics."""
    digits.write_shards(out, config.seed)
    clip_tokens, t5_tokens = tokenizers()
    with Log(config.out, "pipeline", config.vae_steps + config.clip_steps) as log:
        vae = train_vae(config, train, log)
        clip = train_clip(config, train, clip_tokens, config.clip_steps, config.seed, log, config.vae_steps)
    errors = vae_error(vae, held_out)  # before saving rounds it to bfloat16
    save_pipeline(config, vae, clip, clip_tokens, t5_tokens, out / "pipeline")
    return log.total, {"vae_mse": errors}


def make_judge(config: MiniatureConfig, out: Path, train: list[digits.Digit], held_out: list[digits.Digit]) -> tuple[int, dict[str, Any]]:
    """`judge/`; returns steps and metrics."""
    tokens, _ = tokenizers()
    with Log(config.out, "judge", config.judge_steps) as log:
        judge = train_clip(config, train, tokens, config.judge_steps, config.seed + 1, log, 0)
    accuracy = judge_accuracy(judge, tokens, held_out)
    save_judge(judge, tokens, out / "judge")
    return log.total, {"judge_accuracy": accuracy}


PARTS = {"pipeline": make_pipeline, "judge": make_judge}


# ---- text ----------------------------------------------------------------------------------------------------------------


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """CLIP's byte-level BPE and T5's unigram over the captions' words and the plain alphabet, written out rather than trained."""
    words = sorted({w for phrase in (*digits.PHRASINGS, *digits.STYLE_WORDS.values()) for w in re.findall(r"[a-z]+", phrase)} | set(digits.NAMES))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = letters + [letter + "</w>" for letter in letters], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            parts[:2], pair = ["".join(parts[:2])], (parts[0], parts[1])
            merges.append(pair)
            vocabulary.append(parts[0])
    merges, vocabulary = list(dict.fromkeys(merges)), [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={p: i for i, p in enumerate(vocabulary)}, merges=merges, model_max_length=TOKENS)
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0), *((chr(c), -8.0) for c in range(33, 127))]
    t5 = T5TokenizerFast(vocab=scored + [("▁" + w, -5.0) for w in words], extra_ids=0, additional_special_tokens=[], model_max_length=TOKENS)
    return clip, t5


def t5_encoder(tokens: T5TokenizerFast, seed: int) -> T5EncoderModel:
    """A T5 encoder with random weights: fixed random features of the words, which is enough for the transformer to distinguish them."""
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokens), d_model=WIDTH, d_ff=2 * WIDTH, d_kv=16, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id,
        )
    )  # fmt: skip


# ---- pictures for training the frozen parts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmented:
    """Pixels (B, 3, 32, 32) in [-1, 1], their digits (B,), and the styles (B, 2) each shows: how it lies, what it is drawn in."""

    pixels: Tensor
    labels: np.ndarray
    styles: np.ndarray


def augmented(train: list[digits.Digit], count: int, rng: np.random.Generator) -> Augmented:
    """Digits in random colours, places and styles, so that VAE and judge generalise to pictures that LoRAs will make."""
    chosen = [train[i] for i in rng.integers(len(train), size=count)]
    drawn, styles = zip(*(_augment(d.coverage, rng) for d in chosen), strict=True)
    pixels = torch.from_numpy(np.stack(drawn).transpose(0, 3, 1, 2).astype(np.float32) * 2 - 1)
    return Augmented(pixels, np.array([d.label for d in chosen]), np.array(styles))


def _augment(coverage: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, str]]:
    lying = ("", "", "sideways", "mirror")[rng.integers(4)]
    turned = {"": coverage, "sideways": np.rot90(coverage), "mirror": coverage[:, ::-1]}[lying]
    turned = np.roll(turned, rng.integers(-2, 3, size=2), (0, 1))
    turned = np.clip(turned * rng.uniform(0.8, 1.2) + rng.normal(0, rng.uniform(0, 0.08), turned.shape), 0, 1)
    if rng.random() < 0.6:
        drawn_in = ("ink", "chalk", "halftone", "neon")[rng.integers(4)]
        return np.clip(digits.PALETTES[drawn_in](turned, rng), 0, 1), (lying, drawn_in)
    stroke, paper = rng.random(3), rng.random(3)
    return turned[..., None] * stroke + (1 - turned[..., None]) * paper, (lying, "")


# ---- VAE -------------------------------------------------------------------------------------------------------------------


def train_vae(config: MiniatureConfig, train: list[digits.Digit], log: Log) -> AutoencoderKL:
    """A small AutoencoderKL, 4x down, 4 channels; its scaling and shift make the ink world's latents standard normal."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=(8, 24, 48), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, mid_block_add_attention=False,
        sample_size=digits.SIDE, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    rng = np.random.default_rng([config.seed, 10])

    def compute_loss() -> Tensor:
        pixels = augmented(train, config.vae_batch, rng).pixels
        posterior = vae.encode(pixels).latent_dist
        return mse_loss(vae.decode(posterior.sample()).sample, pixels) + 1e-5 * posterior.kl().mean()

    train_model(vae, compute_loss, config.vae_steps, 3 * config.lr, log, 0)
    with torch.no_grad():
        ink = torch.stack([_pixels(digits.picture(d, digits.ink, config.seed)) for d in train])
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in ink.split(250)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


@torch.no_grad()
def vae_error(vae: AutoencoderKL, held_out: list[digits.Digit]) -> dict[str, float]:
    """Mean squared error of pixels in [-1, 1] through the VAE and back, by style."""
    errors = {}
    for name, style in {"ink": digits.ink, **digits.STYLES}.items():
        pixels = torch.stack([_pixels(digits.picture(d, style, 0)) for d in held_out])
        errors[name] = mse_loss(vae.decode(vae.encode(pixels).latent_dist.mean).sample, pixels).item()
    return errors


# ---- CLIP: one for the pipeline's text encoder, another as the judge ---------------------------------------------------------


def train_clip(config: MiniatureConfig, train: list[digits.Digit], tokens: CLIPTokenizer, steps: int, seed: int, log: Log, done: int) -> CLIPModel:
    """A small CLIP, trained on augmented digits and all phrasings; every picture of the same digit (and style, if named) is a match."""
    torch.manual_seed(seed)
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = {"vocab_size": len(tokens), "num_hidden_layers": 2, "max_position_embeddings": TOKENS, "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}  # fmt: skip
    vision = {"image_size": digits.SIDE, "patch_size": 4, "num_hidden_layers": 4}
    clip = CLIPModel(CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=WIDTH))
    rng = np.random.default_rng([seed, 20])

    def compute_loss() -> Tensor:
        batch = augmented(train, config.clip_batch, rng)
        with_style = rng.random(config.clip_batch) < 0.5  # captions that also name the style
        captions = [_caption(*sample, rng) for sample in zip(batch.labels, batch.styles, with_style, strict=True)]
        inputs = tokens(captions, padding=True, truncation=True, return_tensors="pt")
        similarity = clip(pixel_values=batch.pixels, **inputs).logits_per_image
        same_style = (batch.styles[:, None] == batch.styles[None, :]).all(-1) | ~with_style[None, :]
        same = torch.from_numpy((batch.labels[:, None] == batch.labels[None, :]) & same_style).float()
        per_image, per_text = same / same.sum(1, keepdim=True), (same / same.sum(0, keepdim=True)).T
        return cross_entropy(similarity, per_image) + cross_entropy(similarity.T, per_text)

    train_model(clip, compute_loss, steps, config.lr, log, done)
    return clip.eval()


def _caption(label: int, styles: np.ndarray, with_style: bool, rng: np.random.Generator) -> str:
    phrase = digits.PHRASINGS[rng.integers(len(digits.PHRASINGS))].format(digits.NAMES[label])
    return " ".join([phrase, *(digits.STYLE_WORDS[s] for s in styles if s and with_style)])


@torch.no_grad()
def judge_accuracy(judge: CLIPModel, tokens: CLIPTokenizer, held_out: list[digits.Digit]) -> dict[str, float]:
    """The share of real held-out pictures whose nearest prompt names their digit, by style: the ceiling of prompt fidelity."""
    prompts = tokens([digits.PHRASINGS[0].format(name) for name in digits.NAMES], padding="max_length", truncation=True, return_tensors="pt")
    labels = torch.tensor([d.label for d in held_out])
    accuracy = {}
    for name, style in {"ink": digits.ink, **digits.STYLES}.items():
        pixels = torch.stack([_pixels(digits.picture(d, style, 0)) for d in held_out])
        accuracy[name] = (judge(pixel_values=pixels, **prompts).logits_per_image.argmax(1) == labels).float().mean().item()
    return accuracy


def save_judge(judge: CLIPModel, tokens: CLIPTokenizer, folder: Path) -> None:
    """The CLIP folder layout that transformers reads; weights in bfloat16, as the rest of the miniature."""
    judge.to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": digits.SIDE}, crop_size={"height": digits.SIDE, "width": digits.SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


# ---- the pipeline ----------------------------------------------------------------------------------------------------------


def save_pipeline(
    config: MiniatureConfig, vae: AutoencoderKL, clip: CLIPModel, clip_tokens: CLIPTokenizer, t5_tokens: T5TokenizerFast, folder: Path
) -> None:
    """A FluxPipeline folder in bfloat16, as FLUX.1-dev is published; its transformer is the teacher's initialization."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict({k.removeprefix("text_model."): v for k, v in clip.state_dict().items() if k.startswith("text_model.")})
    torch.manual_seed(config.seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 10, 10),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=clip_tokens, text_encoder_2=t5_encoder(t5_tokens, config.seed),
        tokenizer_2=t5_tokens, transformer=transformer,
    ).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip


def train_model(model: torch.nn.Module, compute_loss: Callable[[], Tensor], steps: int, lr: float, log: Log, done: int) -> None:
    """AdamW with a cosine schedule to zero; `compute_loss` draws its own batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        loss = compute_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.write(done + step + 1, loss=loss.item())
        log.step(done + step + 1, loss=loss.item())


def _pixels(image: object) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)


if __name__ == "__main__":
    frame.main("miniature", MiniatureConfig, run)
