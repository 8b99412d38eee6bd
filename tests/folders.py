"""Copies of a model folder, changed as people find them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.errors import ConfigError
from dev2pro.models import model_folder

TRANSFORMER, T5 = "transformer/diffusion_pytorch_model", "text_encoder_2/model"
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


def change(config: Path, **values: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def rename(file: Path, **tensors: torch.Tensor) -> None:
    """Adds tensors to a safetensors file."""
    save_file({**load_file(file), **{name.replace("__", "."): value for name, value in tensors.items()}}, file, metadata={"format": "pt"})


def as_type(file: Path, kind: torch.dtype) -> None:
    save_file({name: value.to(kind) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def shard(folder: Path, stem: str, variant: str = "") -> dict[str, str]:
    """Splits one file of weights into two with an index, as diffusers and transformers write them."""
    dot = f".{variant}" if variant else ""
    weights = load_file(folder / f"{stem}.safetensors")
    files = [f"{stem}{dot}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    placed = {name: files[number % 2] for number, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in placed if placed[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / f"{stem}.safetensors").unlink()
    return placed


def refusal(path: Path | str, variant: str | None = None, **others: str) -> str:
    with pytest.raises(ConfigError) as caught:
        model_folder.check_models(str(path), variant, base=True, **others)
    assert "\n" not in str(caught.value)
    return str(caught.value)
