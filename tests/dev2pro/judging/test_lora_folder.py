"""What is said about LoRAs of other tools, and about folders of stages.lora that cannot be evaluated. Headers are made as the tools write them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dev2pro.artifacts import record, run_folder
from dev2pro.errors import ConfigError
from dev2pro.judging import lora_folder
from dev2pro.models.lora import WEIGHTS

BLOCK, SINGLE = "double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"
PEFT = {
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (8, 4),
    "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": (4, 8),
}
OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str], str]] = {  # shapes, metadata, what is said
    "kohya": (
        {f"lora_unet_{BLOCK}.lora_down.weight": (16, 4), f"lora_unet_{BLOCK}.lora_up.weight": (4, 16), f"lora_unet_{BLOCK}.alpha": ()},
        {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux", "ss_network_dim": "16"},
        "a LoRA in kohya's format for FLUX.1 (ss_base_model_version=flux1), rank 16, made by sd-scripts",
    ),
    "two ranks": (
        {f"lora_unet_{BLOCK}.lora_down.weight": (16, 4), f"lora_unet_{SINGLE}.lora_down.weight": (4, 4)},
        {},
        "a LoRA in kohya's format for FLUX.1, rank 4 to 16",
    ),
    "ai-toolkit": (PEFT, {"software": '{"name": "ai-toolkit"}'}, "a LoRA in the diffusers format for FLUX.1, rank 8, made by ai-toolkit"),
    "diffusers": (PEFT, {"format": "pt"}, "a LoRA in the diffusers format for FLUX.1, rank 8"),
    "ComfyUI": (
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 2)},
        {},
        "a LoRA in the ComfyUI format (names of Black Forest Labs) for FLUX.1, rank 4",
    ),
    "FLUX.2": (
        {
            "diffusion_model.double_stream_modulation_img.lin.lora_A.weight": (4, 2),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 2),
        },
        {"ss_base_model_version": "flux2"},
        "for FLUX.2 (ss_base_model_version=flux2)",
    ),
    "OneTrainer": (
        {"lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight": (32, 2)},
        {"ot_config": "{}", "modelspec.architecture": "Flux.1-dev/lora"},
        "a LoRA in OneTrainer's legacy format for FLUX.1 (modelspec.architecture=Flux.1-dev/lora), rank 32, made by OneTrainer",
    ),
    "LyCORIS LoKr": (
        {"lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1": (4, 4), "lycoris_single_transformer_blocks_0_attn_to_q.lokr_w2": (4, 4)},
        {"ss_network_module": "lycoris.kohya", "ss_network_dim": "8"},
        "a LoKr in LyCORIS' format for FLUX.1, rank 8, made by LyCORIS",
    ),
    "LoHa": ({f"lora_unet_{BLOCK}.hada_w1_a": (4, 8), f"lora_unet_{BLOCK}.hada_w1_b": (8, 4)}, {}, "a LoHa in kohya's format for FLUX.1, rank 8"),
    "DoRA": (
        {f"lora_unet_{BLOCK}.lora_down.weight": (16, 4), f"lora_unet_{BLOCK}.dora_scale": (4, 1)},
        {},
        "a DoRA in kohya's format for FLUX.1, rank 16",
    ),
    "DoRA of PEFT": ({**PEFT, "transformer.single_transformer_blocks.0.attn.to_q.lora_magnitude_vector": (4,)}, {}, "a DoRA in the diffusers format"),
    "OFT": ({f"lora_unet_{BLOCK}.oft_blocks": (4, 2, 2)}, {}, "an OFT in kohya's format for FLUX.1"),
    "XLabs": ({"double_blocks.0.processor.qkv_lora1.down.weight": (16, 4)}, {}, "a LoRA in XLabs' format for FLUX.1, rank 16"),
    "BFL": (
        {"double_blocks.0.img_attn.qkv.lora_A.weight": (128, 4), "double_blocks.0.img_attn.norm.query_norm.scale": (4,)},
        {},
        "a LoRA in the format of Black Forest Labs for FLUX.1, rank 128",
    ),
    "SDXL": (
        {"lora_unet_input_blocks_8_1_transformer_blocks_4_attn1_to_q.lora_down.weight": (8, 4), "lora_te2_text_model_x.lora_down.weight": (8, 4)},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        "a LoRA in kohya's format for Stable Diffusion XL (ss_base_model_version=sdxl_base_v1-0), rank 8",
    ),
    "a whole model": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, {}, "is a whole model of FLUX.1"),
    "a model in diffusers layout": ({"single_transformer_blocks.0.attn.to_q.weight": (4, 4)}, {}, "is a whole model of FLUX.1"),
    "something else": ({"emb_params": (4, 4)}, {}, "is a file of 1 tensors"),
    "hostile metadata": (PEFT, {"ss_base_model_version": "\x1b[31m\nflux" + "x" * 500}, r"(ss_base_model_version=\x1b[31m\nfluxxx"),
}


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        lora_folder.read(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr("dev2pro.models.lora.safe_open", lambda *_, **__: pytest.fail("weights are read"))


@pytest.mark.parametrize("tool", OTHERS)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_lora_of_another_tool_is_said_to_be_one(tool, place, tmp_path, no_values):
    shapes, metadata, said = OTHERS[tool]
    file = tmp_path / ("style.safetensors" if place == "file" else WEIGHTS)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file, metadata=metadata)
    given = file if place == "file" else tmp_path
    message = refusal(given)
    assert message.startswith(f"loras={given} is no output folder of stages.lora: ")
    assert said in message, message
    assert "evaluate and tune take the output folders of stages.lora, because they need their record" in message
    assert message.endswith("they cannot read the LoRAs of other tools yet.")


def test_pickles_quantised_files_and_broken_ones(tmp_path):
    for name, content, said in (
        ("a.pt", b"\x80\x02", "is a pickle, which can run code when it is read, and is not opened"),
        ("a.ckpt", b"", "is a pickle"),
        ("a.gguf", b"GGUF", "is a quantised model (GGUF)"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        ("b.safetensors", b"", "is empty"),
        ("c.safetensors", b"\xff" * 100, "is no safetensors file"),
        ("a.zip", b"PK", "is no safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in refusal(tmp_path / name)
    assert f"give its folder, {tmp_path}" in refusal(_touched(tmp_path / record.RECORD))


def _touched(file: Path) -> Path:
    file.write_text("{}")
    return file


def test_folders_of_other_tools(tmp_path, tiny):
    peft, many, empty = (tmp_path / name for name in ("peft", "many", "empty"))
    for folder in (peft, many, empty):
        folder.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    assert "it is a PEFT adapter without weights" in refusal(peft)
    save_file({"base_model.model.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(8, 4)}, peft / "adapter_model.safetensors")
    assert "it is a PEFT adapter, adapter_model.safetensors in it is a LoRA in PEFT's format for FLUX.1, rank 8" in refusal(peft)
    for number in (1, 2, 3):
        save_file({f"lora_unet_{BLOCK}.lora_down.weight": torch.zeros(16, 4)}, many / f"style-00000{number}.safetensors")
    assert "style-000001.safetensors in it is a LoRA in kohya's format for FLUX.1, rank 16 (and 2 more files of weights)" in refusal(many)
    assert "it is a whole model" in refusal(tiny)
    assert "no finished artifact" in refusal(empty)
    assert "no finished artifact" in refusal(tmp_path / "nowhere")


@dataclass(frozen=True)
class LoraLike:
    """As much of a LoRA stage's configuration as its record needs."""

    out: str


def finished(out: Path) -> record.Artifact:
    config = LoraLike(str(out))
    assert run_folder.acquire(config.out, "lora", config, {}) is None
    save_file({name: torch.zeros(shape) for name, shape in PEFT.items()}, out / WEIGHTS, metadata={"dev2pro": "{}"})
    return record.write(config.out, "lora", "lora", config, {}, step=1, metrics={}, inference={})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "killed": (lambda out: ((out / record.RECORD).unlink(), (out / WEIGHTS).unlink(), (out / "checkpoint-5").mkdir()), "is no finished artifact"),
    "in progress": (lambda out: (out / record.RECORD).unlink(), "is no finished artifact"),
    "only the file was copied": (
        lambda out: ((out / record.RECORD).unlink(), (out / record.CONFIG).unlink()),
        "a LoRA of stages.lora whose record, artifact.json, is not beside it; a LoRA in the diffusers format",
    ),
    "pruned": (
        lambda out: ((out / WEIGHTS).unlink(), record.write_json(out / record.PRUNED, {"files": [WEIGHTS]})),
        "were removed to make room; only its record is left",
    ),
    "without its file": (lambda out: (out / WEIGHTS).unlink(), f"is damaged: {WEIGHTS} is missing"),
    "cut off": (lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-40]), "it is cut off or damaged"),
    "another file": (
        lambda out: save_file({"a": torch.zeros(1)}, out / WEIGHTS),
        "and its record says",
    ),
    "its record is no JSON": (lambda out: (out / record.RECORD).write_text("{"), "is damaged"),
    "its record is of another time": (lambda out: (out / record.RECORD).write_text(json.dumps({"schema": 99})), "has schema 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lora_of_ours_that_cannot_be_evaluated(damage, tmp_path, no_values):
    out = tmp_path / "lora"
    assert finished(out) == lora_folder.read(str(out))
    DAMAGES[damage][0](out)
    assert re.search(re.escape(DAMAGES[damage][1]), refusal(out))
    run_folder.release()
