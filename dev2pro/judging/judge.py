"""CLIP embeddings of images and prompts, for the miniature's small CLIP and full-size ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dev2pro.artifacts import record
from dev2pro.errors import ConfigError, StageError, TryAgainError
from dev2pro.judging.shares import share
from dev2pro.models import model_folder
from dev2pro.models.model_path import HUB_ID

BATCH = 64


class Judge:
    """A CLIP model in a folder or on the hub, such as openai/clip-vit-large-patch14. Embeddings are unit vectors (N, D). `id`: the model's hash."""

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            clip, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            self.clip = clip.to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.processor = CLIPImageProcessorPil.from_pretrained(path)
            missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
            if missing:  # transformers would make them up with a warning
                raise ValueError(f"its weights lack {missing[0]}")
            if len(self.tokenizer) < 0.9 * clip.config.text_config.vocab_size:
                raise ValueError(f"its tokenizer knows {len(self.tokenizer)} pieces and the model {clip.config.text_config.vocab_size}")
        except (OSError, ValueError) as error:
            raise _unreadable(path, str(error).strip().splitlines()[0]) from error
        self.device = device
        self.id = record.digest(record.fingerprint(path))

    @staticmethod
    def check(path: str) -> None:
        """Raises ConfigError for a path that holds no CLIP model, from its configuration and headers; a hub id that is not here passes."""
        if not Path(path).is_dir() and (Path(path).exists() or not HUB_ID.fullmatch(path)):
            raise _unreadable(path, "it is no folder")
        try:
            model_folder.check_judge(path)
        except (ConfigError, OSError) as error:
            raise _unreadable(path, str(error)) from error

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Embeds pictures (N, 3, H, W), uint8 or in [0, 1]."""
        features, whole = [], pictures.dtype == torch.uint8
        for batch in pictures.split(BATCH):
            inputs = self.processor(images=list(batch.cpu()), do_rescale=whole, input_data_format="channels_first", return_tensors="pt")
            features.append(_pooled(self.clip.get_image_features(inputs["pixel_values"].to(self.device))))
        return torch.cat(features)

    def shared(self, accelerator: Accelerator, count: int, read: Callable[[range], Tensor]) -> Tensor:
        """Embeds `count` pictures as `images` does, a batch on each rank in turn; `read` gives pictures by number. Call it on every rank."""
        batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        return torch.cat(share(accelerator, batches, lambda rows: self.images(read(rows))))

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Embeds prompts; truncates long ones as CLIP does."""
        inputs = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.clip.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))


def _unreadable(path: str, reason: str) -> StageError:
    """The error for a judge that cannot be loaded: whether it is a folder, nothing at all, or on the hub."""
    if Path(path).exists():
        return ConfigError(f"judge={path} is no readable CLIP model ({reason}). Give a transformers CLIPModel folder.")
    if not HUB_ID.fullmatch(path):
        return ConfigError(f"judge={path} does not exist. Correct the path, or give a hub id such as openai/clip-vit-large-patch14.")
    return TryAgainError(f"judge={path} is no local folder and could not be fetched from the hub ({reason}). Check the name and the network.")


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps the projected features in an output object; older versions return them."""
    return normalize(getattr(features, "pooler_output", features), dim=-1).cpu()
