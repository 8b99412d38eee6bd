"""What judges have in common, and the CLIP judge of images and prompts: the miniature's small CLIP and full-size ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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


class ImageJudge(ABC):
    """A model's embeddings of pictures: unit vectors (N, D). `id`: the model's hash. Raises ConfigError for a model that cannot be read."""

    setting: ClassVar[str]  # the key of the configuration that names it
    kind: ClassVar[str]  # of model, in words
    model_class: ClassVar[str]
    example: ClassVar[str]  # a hub id
    processor: Any

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            self._load(path, device)
        except (OSError, ValueError) as error:
            raise self._unreadable(path, str(error).strip().splitlines()[0]) from error
        self.device = device
        self.id = record.digest(record.fingerprint(path))

    @abstractmethod
    def _load(self, path: str, device: torch.device) -> None:
        """Loads the model and its processor. Raises OSError or ValueError."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> Any:
        """The model's features of what the processor makes of pictures."""

    @classmethod
    def check(cls, path: str) -> None:
        """Raises ConfigError for a path that holds no such model, from its configuration and headers; a hub id that is not here passes."""
        if not Path(path).is_dir() and (Path(path).exists() or not HUB_ID.fullmatch(path)):
            raise cls._unreadable(path, "it is no folder")
        try:
            model_folder.check_judge(path, cls.model_class)
        except (ConfigError, OSError) as error:
            raise cls._unreadable(path, str(error)) from error

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Embeds pictures (N, 3, H, W), uint8 or in [0, 1]."""
        features, whole = [], pictures.dtype == torch.uint8
        for batch in pictures.split(BATCH):
            inputs = self.processor(images=list(batch.cpu()), do_rescale=whole, input_data_format="channels_first", return_tensors="pt")
            features.append(_pooled(self._features(inputs["pixel_values"].to(self.device))))
        return torch.cat(features)

    def shared(self, accelerator: Accelerator, count: int, read: Callable[[range], Tensor]) -> Tensor:
        """Embeds `count` pictures as `images` does, a batch on each rank in turn; `read` gives pictures by number. Call it on every rank."""
        batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        return torch.cat(share(accelerator, batches, lambda rows: self.images(read(rows))))

    @classmethod
    def _unreadable(cls, path: str, reason: str) -> StageError:
        """The error for a judge that cannot be loaded: whether it is a folder, nothing at all, or on the hub."""
        given = f"{cls.setting}={path}"
        if Path(path).exists():
            return ConfigError(f"{given} is no readable {cls.kind} model ({reason}). Give a transformers {cls.model_class} folder.")
        if not HUB_ID.fullmatch(path):
            return ConfigError(f"{given} does not exist. Correct the path, or give a hub id such as {cls.example}.")
        return TryAgainError(f"{given} is no local folder and could not be fetched from the hub ({reason}). Check the name and the network.")


class Judge(ImageJudge):
    """A CLIP model in a folder or on the hub, such as openai/clip-vit-large-patch14. Embeds prompts as well, for the same comparison."""

    setting, kind, model_class, example = "judge", "CLIP", "CLIPModel", "openai/clip-vit-large-patch14"

    def _load(self, path: str, device: torch.device) -> None:
        clip, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        self.clip = clip.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = CLIPImageProcessorPil.from_pretrained(path)
        check_complete(info)
        if len(self.tokenizer) < 0.9 * clip.config.text_config.vocab_size:
            raise ValueError(f"its tokenizer knows {len(self.tokenizer)} pieces and the model {clip.config.text_config.vocab_size}")

    def _features(self, pixels: Tensor) -> Any:
        return self.clip.get_image_features(pixels)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Embeds prompts; truncates long ones as CLIP does."""
        inputs = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.clip.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))


def check_complete(info: Mapping[str, Any]) -> None:
    """Raises ValueError for weights that a file lacks, from transformers' loading info: it would make them up with a warning."""
    if missing := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise ValueError(f"its weights lack {missing[0]}")


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps the projected features in an output object; older versions return them."""
    return normalize(getattr(features, "pooler_output", features), dim=-1).cpu()
