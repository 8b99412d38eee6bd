"""Variants, shards and the hub's cache; and paths that lie beside the right one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dev2pro.artifacts import record
from dev2pro.models import flux1, model_folder
from dev2pro.models.flux1 import Encoders, ModelConfig
from tests.folders import BITSANDBYTES, POINTER, T5, TRANSFORMER, change, refusal, shard

# ---- variants -----------------------------------------------------------------------------------------------------------------------


def test_a_variant_is_used_where_a_model_has_it(tiny, model):
    for stem in (TRANSFORMER, T5, "vae/diffusion_pytorch_model"):
        (model / f"{stem}.safetensors").rename(model / f"{stem}.fp16.safetensors")
    (model / "vae/LICENSE").write_text("a file without an ending")
    model_folder.check_models(str(model), "fp16", base=True, trained_on=str(tiny))  # which has plain files only
    model_folder.check_models(str(tiny), "fp16", base=True, trained_on=str(model))
    config = ModelConfig(path=str(model), usual_guidance=3.5, max_sequence_length=8, variant="fp16")
    plain, named = (Encoders(config if path == model else ModelConfig(path=str(path), usual_guidance=3.5, max_sequence_length=8),
                             torch.float32, torch.device("cpu")) for path in (tiny, model))  # fmt: skip
    parts = ("vae", "text_encoder", "text_encoder_2")
    assert plain.weights(*parts) == named.weights(*parts)
    for path in (tiny, model):
        loaded = flux1.load_transformer(str(path), variant="fp16")
        assert torch.equal(loaded.x_embedder.weight, flux1.load_transformer(str(tiny)).x_embedder.weight)
        assert flux1.weight_files(str(path), "fp16").keys() == dict(loaded.named_parameters()).keys()
    assert flux1.load_vae(config, torch.float32).config.latent_channels == 4


def test_a_variant_that_nothing_has(tiny, model, no_weights):
    message = refusal(tiny, "fp16")
    assert f"model.variant=fp16, and no weights in {tiny} are called so (variants: none). Leave model.variant out" in message
    shutil.copy(model / f"{TRANSFORMER}.safetensors", model / f"{TRANSFORMER}.bf16.safetensors")
    assert "(variants: bf16)" in refusal(model, "fp16", trained_on=str(tiny))
    (model / f"{TRANSFORMER}.safetensors").unlink()
    assert "model.variant=bf16" in refusal(model, "fp16")


def test_shards_are_read_through_their_index(model, no_weights):
    for stem in (TRANSFORMER, T5):
        shard((model / stem).parent, Path(stem).name)
    model_folder.check_models(str(model), None, base=True)
    index = model / f"{TRANSFORMER}.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["a.b"] = next(iter(values["weight_map"].values()))
    index.write_text(json.dumps(values))
    assert "has an index that lists a.b, which none of its 2 files holds" in refusal(model)


def test_quantised_files_beside_whole_weights_are_told(model, no_weights, capsys):
    (model / "transformer/flux1-dev-Q8_0.gguf").write_bytes(b"GGUF")
    model_folder.check_models(str(model), None, base=True)
    assert f"{model}: flux1-dev-Q8_0.gguf is not read, the weights in transformer/*.safetensors are" in capsys.readouterr().err


# ---- paths beside the right one -------------------------------------------------------------------------------------------------------


def test_a_part_in_place_of_its_pipeline(model):
    for part in ("transformer", "vae", "text_encoder_2", "tokenizer", "scheduler"):
        message = refusal(model / part)
        assert "is no diffusers pipeline folder" in message
        assert f"It is a part of a pipeline: give {model}." in message
    assert f"give {model}." in refusal(model, trained_on=str(model / "transformer") + "/")


def test_a_folder_above_pipelines(model):
    assert f"It holds 1 such folder: give {model}." in refusal(model.parent)


def test_the_hub_s_cache(tiny, tmp_path):
    repository = tmp_path / "hub/models--black-forest-labs--FLUX.1-dev"
    for revision in ("abc", "def"):
        shutil.copytree(tiny, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("def")
    for path in (repository, repository / "snapshots"):
        message = refusal(path)
        assert f"a folder of the Hugging Face cache: give {repository}/snapshots/def or {repository}/snapshots/abc." in message


def test_a_copy_in_the_hub_s_cache_is_checked(tiny, tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--flux-nf4"
    shutil.copytree(tiny, repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (repository / "snapshots/abc/vae/diffusion_pytorch_model.safetensors").unlink()  # is fetched when it is needed
    model_folder.check_models("somebody/flux-nf4", None, base=True)
    change(repository / "snapshots/abc/text_encoder_2/config.json", quantization_config=BITSANDBYTES)
    assert "The model in somebody/flux-nf4 cannot be read: text_encoder_2/config.json is that of a quantised model" in refusal("somebody/flux-nf4")


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        ("flux1-dev.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.ones(2)}, "It is a whole model of FLUX.1 in the format of Black"),
        ("comfy.safetensors", {"model.diffusion_model.double_blocks.0.x.weight": torch.ones(2)}, "It is a whole model of FLUX.1"),
        ("style.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(16, 2)}, "It is a LoRA in kohya's format"),
        ("flux1-dev-Q4_0.gguf", None, "It is quantised (GGUF)"),
        ("flux1-dev.ckpt", None, "It is a pickle"),
        ("model_index.json", None, "Give its folder"),
        ("pointer.safetensors", None, "It is a pointer of git-lfs"),
    ],
)
def test_a_file_in_place_of_a_folder(name, tensors, said, tmp_path):
    save_file(tensors, tmp_path / name) if tensors else (tmp_path / name).write_text(POINTER)
    message = refusal(tmp_path / name)
    assert "is a file. Give a folder in diffusers layout, which holds model_index.json." in message
    assert said in message


def test_folders_of_something_else(tmp_path, model):
    lora, alone, gguf = (tmp_path / name for name in ("lora", "alone", "gguf"))
    for folder in (lora, alone, gguf):
        folder.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    shutil.copy(model / "transformer/config.json", alone)
    (gguf / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF")
    assert "It holds a LoRA; give the model that the LoRA is for." in refusal(lora)
    assert "It is one model alone" in refusal(alone)
    assert "flux1-dev-Q4_0.gguf is quantised (GGUF)" in refusal(gguf)
    assert "cannot be read: File name too long" in refusal("x" * 5000)
    assert "does not exist" in refusal("a\0b")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert "does not exist" in refusal(link)
    assert f"It is a link to {tmp_path}/gone, which is gone." in refusal(link)


def test_a_pipeline_with_a_configuration_of_its_own_is_no_stage_s_folder(model):
    (model / record.CONFIG).write_text('{"model_type": "flux"}')
    model_folder.check_models(str(model), None, base=True)
