"""Reads pictures and prompts with a CLIP model, the miniature's small one and full-size ones alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.models.flux1 import HUB_ID

BATCH = 64


class Judge:
    """A CLIP model in a folder or on the hub, such as openai/clip-vit-large-patch14. Embeddings are unit vectors (N, D)."""

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            clip, found = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            self.clip = clip.to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.processor = CLIPImageProcessorPil.from_pretrained(path)
            lacking = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
            if lacking:  # transformers would make them up with a warning
                raise ValueError(f"its weights lack {lacking[0]}")
            if len(self.tokenizer) < 0.9 * clip.config.text_config.vocab_size:
                raise ValueError(f"its tokenizer knows {len(self.tokenizer)} pieces and the model {clip.config.text_config.vocab_size}")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if Path(path).exists():
                raise ConfigError(f"judge={path} is no readable CLIP model ({reason}). Give a transformers CLIPModel folder.") from error
            if not HUB_ID.fullmatch(path):
                raise ConfigError(
                    f"judge={path} does not exist. Correct the path, or give a hub id such as openai/clip-vit-large-patch14."
                ) from error
            raise TryAgainError(
                f"judge={path} is no local folder and could not be fetched from the hub ({reason}). Check the name and the network."
            ) from error
        self.device = device

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Of pictures (N, 3, H, W) in [0, 1]."""
        parts = []
        for some in pictures.split(BATCH):
            ready = self.processor(images=list(some.cpu()), do_rescale=False, input_data_format="channels_first", return_tensors="pt")
            parts.append(_pooled(self.clip.get_image_features(ready["pixel_values"].to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Of prompts; longer ones are cut as CLIP does."""
        ready = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.clip.get_text_features(input_ids=ready["input_ids"], attention_mask=ready["attention_mask"]))


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps the projected features in an output object; older versions return them."""
    return normalize(getattr(features, "pooler_output", features), dim=-1).cpu()
