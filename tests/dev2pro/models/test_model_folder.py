"""Model folders as people have them: which are refused, and what is said about them. No weights are read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dev2pro.models import model_folder
from tests.folders import BITSANDBYTES, POINTER, T5, TRANSFORMER, as_type, change, refusal, rename, shard

# ---- what is refused, and how it is said --------------------------------------------------------------------------------------------

UNQUANTISED = "Give the original weights in bfloat16, float16 or float32"
# ruff: noqa: E501  (a table, one case a line)
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "bitsandbytes in the configuration": (
        lambda m: change(m / "transformer/config.json", quantization_config=BITSANDBYTES),
        ("transformer/config.json is that of a quantised model (bitsandbytes)", UNQUANTISED, "hardware.int8_base=true"),
    ),
    "torchao, in pickles": (
        lambda m: (change(m / "transformer/config.json", quantization_config={"quant_method": "torchao"}), (m / f"{TRANSFORMER}.safetensors").unlink()),
        ("quantised model (torchao)",),
    ),
    "a quantised T5": (
        lambda m: change(m / "text_encoder_2/config.json", quantization_config=BITSANDBYTES),
        ("text_encoder_2/config.json is that of a quantised model (bitsandbytes)",),
    ),
    "GPTQ": (lambda m: change(m / "text_encoder_2/config.json", quantization_config={"quant_method": "gptq"}), ("(gptq)",)),
    "a quantisation of another shape": (lambda m: change(m / "transformer/config.json", quantization_config="yes"), ("quantised model",)),
    "quanto": (lambda m: (m / "transformer/quanto_qmap.json").write_text("{}"), ("quanto_qmap.json is that of a quantised model (optimum-quanto)",)),
    "bitsandbytes in the weights": (
        lambda m: rename(m / f"{TRANSFORMER}.safetensors", x_embedder__weight__absmax=torch.ones(3)),
        ("transformer has quantised weights (bitsandbytes)", UNQUANTISED),
    ),
    "scaled fp8": (lambda m: rename(m / f"{TRANSFORMER}.safetensors", scaled_fp8=torch.ones(2)), ("quantised weights (scaled fp8)",)),
    "AWQ in the weights": (
        lambda m: rename(m / f"{T5}.safetensors", encoder__qweight=torch.ones(2, dtype=torch.int32)),
        ("text_encoder_2 has quantised weights (GPTQ or AWQ)",),
    ),
    "fp8 of no scale": (lambda m: as_type(m / f"{TRANSFORMER}.safetensors", torch.float8_e4m3fn), ("quantised weights (F8_E4M3 weights)",)),
    "uint8": (lambda m: as_type(m / "vae/diffusion_pytorch_model.safetensors", torch.uint8), ("vae has quantised weights (U8 weights)",)),
    "int8": (lambda m: as_type(m / "text_encoder/model.safetensors", torch.int8), ("text_encoder has quantised weights (I8 weights)",)),
    "GGUF alone": (
        lambda m: (m / f"{TRANSFORMER}.safetensors").rename(m / "transformer/flux1-dev-Q4_0.gguf"),
        ("transformer/flux1-dev-Q4_0.gguf is quantised (GGUF)", UNQUANTISED),
    ),
    "Fill": (
        lambda m: change(m / "transformer/config.json", in_channels=384, out_channels=16),
        ("takes 384 channels and makes 16: it is one of FLUX.1's tools",),
    ),
    "Control": (lambda m: change(m / "transformer/config.json", in_channels=32, out_channels=16), ("takes 32 channels and makes 16",)),
    "Kontext": (
        lambda m: change(m / "model_index.json", _class_name="FluxKontextPipeline"),
        ("is a FluxKontextPipeline, not a FluxPipeline: it edits a picture that it is given",),
    ),
    "Fill by its name": (lambda m: change(m / "model_index.json", _class_name="FluxFillPipeline"), ("is a FluxFillPipeline",)),
    "a control pipeline": (lambda m: change(m / "model_index.json", _class_name="FluxControlPipeline"), ("it follows a control picture",)),
    "SDXL": (lambda m: change(m / "model_index.json", _class_name="StableDiffusionXLPipeline"), ("StableDiffusionXLPipeline, not a FluxPipeline",)),
    "a class that is no name": (lambda m: change(m / "model_index.json", _class_name=["my_code", "Mine"]), ("not a FluxPipeline",)),
    "FLUX.2": (lambda m: change(m / "transformer/config.json", _class_name="Flux2Transformer2DModel"), ("Flux2Transformer2DModel, not a Flux",)),
    "schnell": (lambda m: change(m / "transformer/config.json", guidance_embeds=False), ("has no guidance input",)),
    "a VAE of another family": (lambda m: change(m / "vae/config.json", latent_channels=8), ("vae has weights for another config.json",)),
    "a tiny autoencoder": (
        lambda m: change(m / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        ("says that vae is diffusers.AutoencoderTiny, not AutoencoderKL",),
    ),
    "a part of its own code": (lambda m: change(m / "model_index.json", vae=["my_vae", "AutoencoderKL"]), ("vae is my_vae.AutoencoderKL",)),
    "no second encoder": (lambda m: change(m / "model_index.json", text_encoder_2=[None, None]), ("model_index.json names no text_encoder_2",)),
    "another scheduler": (
        lambda m: change(m / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        ("scheduler is diffusers.DDIMScheduler",),
    ),
    "a scheduler without its shift": (
        lambda m: change(m / "scheduler/scheduler_config.json", base_shift=None),
        ("scheduler/scheduler_config.json has no number base_shift",),
    ),
    "more blocks in the weights": (
        lambda m: change(m / "transformer/config.json", num_layers=1),
        ("transformer has weights for another config.json, which knows no transformer_blocks.1.",),
    ),
    "fewer blocks in the weights": (lambda m: change(m / "transformer/config.json", num_single_layers=9), ("its weights lack single_transformer_blocks",)),
    "other widths": (lambda m: change(m / "transformer/config.json", joint_attention_dim=32), ("context_embedder.weight is [96, 64] and should be [96, 32]",)),
    "more layers than there can be": (lambda m: change(m / "transformer/config.json", num_layers=10**9), ("has num_layers=1000000000",)),
    "layers that are no number": (lambda m: change(m / "text_encoder_2/config.json", num_layers="2"), ("text_encoder_2/config.json has num_layers=2",)),
    "a configuration of nonsense": (lambda m: change(m / "vae/config.json", block_out_channels="x"), ("vae/config.json describes no AutoencoderKL",)),
    "an empty configuration": (lambda m: (m / "vae/config.json").write_text(""), ("vae/config.json is empty",)),
    "no JSON": (lambda m: (m / "transformer/config.json").write_text("{"), ("transformer/config.json is no JSON", "Download or convert it again")),
    "a list": (lambda m: (m / "model_index.json").write_text("[]"), ("model_index.json holds no JSON object",)),
    "no T5": (lambda m: shutil.rmtree(m / "text_encoder_2"), ("text_encoder_2/config.json is missing",)),
    "no VAE": (lambda m: shutil.rmtree(m / "vae"), ("vae/config.json is missing",)),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ("tokenizer/tokenizer.json is missing",)),
    "an empty tokenizer": (lambda m: (m / "tokenizer_2/tokenizer.json").write_text("{}"), ("tokenizer_2/tokenizer.json holds nothing",)),
    "a tokenizer that is a pointer": (
        lambda m: ((m / "tokenizer_2/tokenizer.json").unlink(), (m / "tokenizer_2/spiece.model").write_text(POINTER)),
        ("tokenizer_2/spiece.model is a pointer of git-lfs",),
    ),
    "pointers of git-lfs": (
        lambda m: (m / f"{TRANSFORMER}.safetensors").write_text(POINTER),
        (f"{TRANSFORMER}.safetensors is a pointer of git-lfs and not the file itself: run `git lfs pull`",),
    ),
    "a pointer for a configuration": (lambda m: (m / "vae/config.json").write_text(POINTER), ("vae/config.json is a pointer of git-lfs", "git lfs pull")),
    "a web page": (lambda m: (m / f"{T5}.safetensors").write_text("<!doctype html>"), ("is a web page that was saved in its place",)),
    "an empty file": (lambda m: (m / f"{T5}.safetensors").write_bytes(b""), (f"{T5}.safetensors is empty",)),
    "cut off": (
        lambda m: os.truncate(m / f"{TRANSFORMER}.safetensors", (m / f"{TRANSFORMER}.safetensors").stat().st_size - 1000),
        ("bytes where its header describes", "it is cut off or damaged"),
    ),
    "cut off within its header": (lambda m: os.truncate(m / f"{T5}.safetensors", 100), ("is cut off within its header",)),
    "no safetensors": (lambda m: (m / f"{T5}.safetensors").write_bytes(b"PK\3\4" * 50), ("is no safetensors file",)),
    "a link to nothing": (
        lambda m: ((m / f"{T5}.safetensors").unlink(), (m / f"{T5}.safetensors").symlink_to("../../blobs/abc")),
        ("is a link to nothing (../../blobs/abc)",),
    ),
    "a folder for a file": (lambda m: ((m / f"{T5}.safetensors").unlink(), (m / f"{T5}.safetensors").mkdir()), ("cannot be opened (Is a directory)",)),
    "pickles only": (
        lambda m: (m / f"{TRANSFORMER}.safetensors").rename(m / f"{TRANSFORMER}.bin"),
        (f"{TRANSFORMER}.bin is a pickle", "safe_serialization=True"),
    ),
    "a BFL file": (
        lambda m: ((m / f"{TRANSFORMER}.safetensors").unlink(), save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, m / "transformer/flux1-dev.safetensors")),
        ("is missing; flux1-dev.safetensors is there (a whole model of FLUX.1 in the format of Black Forest Labs)",),
    ),
    "a BFL file under diffusers' name": (
        lambda m: save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, m / f"{TRANSFORMER}.safetensors"),
        ("has weights that are a whole model of FLUX.1 in the format of Black Forest Labs",),
    ),
    "a LoRA for a transformer": (
        lambda m: save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 2)}, m / f"{TRANSFORMER}.safetensors"),
        ("has weights that are a LoRA in the diffusers format", "rank 4"),
    ),
    "fp16 only": (
        lambda m: (m / f"{TRANSFORMER}.safetensors").rename(m / f"{TRANSFORMER}.fp16.safetensors"),
        ("transformer has no weights but those of variant fp16", "model.variant=fp16"),
    ),
    "a T5 in fp16 only": (
        lambda m: (m / f"{T5}.safetensors").rename(m / f"{T5}.fp16.safetensors"),
        ("text_encoder_2 has no weights but those of variant fp16", "model.variant=fp16"),
    ),
    "shards in bf16 only": (lambda m: shard_of_variant(m), ("no weights but those of variant bf16", "model.variant=bf16")),
    "a shard missing": (
        lambda m: (shard(m / "transformer", "diffusion_pytorch_model"), (m / f"{TRANSFORMER}-00002-of-00002.safetensors").unlink()),
        ("diffusion_pytorch_model.safetensors.index.json names 2 files, and diffusion_pytorch_model-00002-of-00002.safetensors is missing",),
    ),
    "shards without their index": (
        lambda m: (shard(m / "transformer", "diffusion_pytorch_model"), (m / f"{TRANSFORMER}.safetensors.index.json").unlink()),
        ("diffusion_pytorch_model.safetensors.index.json is missing, which says what",),
    ),
    "an index that leads outside": (
        lambda m: (m / f"{TRANSFORMER}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../etc/x.safetensors"}})),
        ("names '../../etc/x.safetensors', which is no file beside it",),
    ),
    "an index of nothing": (lambda m: (m / f"{TRANSFORMER}.safetensors.index.json").write_text("{}"), ("is no index of shards",)),
}  # fmt: skip


def shard_of_variant(model: Path) -> None:
    shard(model / "transformer", "diffusion_pytorch_model", "bf16")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_trained(damage, model, no_weights):
    DAMAGES[damage][0](model)
    message = refusal(model)
    assert message.startswith(("The model in ", "The transformer in ", str(model)))
    for part in (str(model), *DAMAGES[damage][1]):
        assert part in message, message


def test_the_other_settings_are_checked_alike(tiny, model, no_weights):
    DAMAGES["bitsandbytes in the weights"][0](model)
    for setting in ("trained_on", "start", "teacher", "recovered"):
        assert "quantised weights (bitsandbytes)" in refusal(tiny, **{setting: str(model)})


def test_a_transformer_that_is_only_applied_to_or_not_read(model, tiny, no_weights):
    change(model / "transformer/config.json", quantization_config=BITSANDBYTES)
    model_folder.check_models(str(model), None, base=False, teacher=str(tiny))  # only its encoders are read
    assert model_folder.has_transformer(str(model))
    shutil.rmtree(model / "transformer")
    assert not model_folder.has_transformer(str(model))


@pytest.mark.parametrize(("key", "value"), [("num_layers", 1), ("num_single_layers", 3), ("attention_head_dim", 32), ("joint_attention_dim", 96)])
@pytest.mark.parametrize("setting", ["trained_on", "start", "teacher", "recovered"])
def test_models_of_two_shapes(setting, key, value, tiny, model, no_weights):
    change(model / "transformer/config.json", **{key: value})
    message = refusal(tiny, **{setting: str(model)})
    assert f"{setting}={model} has another shape than the base, model.path={tiny} ({key} is {value} there and" in message


def test_keys_that_older_versions_do_not_write_make_no_other_shape(tiny, model, no_weights):
    config = json.loads((model / "transformer/config.json").read_text())
    (model / "transformer/config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("out_channels", "patch_size")}))
    model_folder.check_models(str(tiny), None, base=True, trained_on=str(model))
    change(model / "transformer/config.json", out_channels=config["in_channels"])
    model_folder.check_models(str(tiny), None, base=True, trained_on=str(model))


def test_encoders_that_do_not_fit_the_transformer(tiny, model, no_weights):
    config = json.loads((model / "transformer/config.json").read_text()) | {"pooled_projection_dim": 32}
    (model / "transformer/config.json").write_text(json.dumps(config))
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel.from_config(config).save_pretrained(model / "transformer")
    assert "takes pooled_projection_dim=32, and the encoders" in refusal(model)
    assert "make 64" in refusal(model)
