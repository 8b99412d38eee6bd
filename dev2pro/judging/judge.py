"""CLIP embeddings of images and prompts, for the miniature's small CLIP and full-size ones."""

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
        """Embeds pictures (N, 3, H, W) in [0, 1]."""
        features = []
        for batch in pictures.split(BATCH):
            inputs = self.processor(images=list(batch.cpu()), do_rescale=False, input_data_format="channels_first", return_tensors="pt")
            features.append(_pooled(self.clip.get_image_features(inputs["pixel_values"].to(self.device))))
        return torch.cat(features)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Embeds prompts; truncates long ones as CLIP does."""
        inputs = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.clip.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps the projected features in an output object; older versions return them."""
    return normalize(getattr(features, "pooler_output", features), dim=-1).cpu()
