"""The models of a run without their weights: the real classes from their configurations, made of fake tensors."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

from dev2pro.errors import ConfigError
from dev2pro.models import lora, model_folder, offload
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.models.lora import AdapterConfig

FLUX1_DEV, CLIP_LARGE, DINOV2_BASE = "black-forest-labs/FLUX.1-dev", "openai/clip-vit-large-patch14", "facebook/dinov2-base"
BUNDLED: dict[tuple[str, str], dict[str, Any]] = {  # shapes of what the hub has, so that a plan needs no network
    (FLUX1_DEV, "transformer"): {
        "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "in_channels": 64, "guidance_embeds": True,
    },
    (FLUX1_DEV, "vae"): {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    (FLUX1_DEV, "text_encoder"): {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
    },
    (FLUX1_DEV, "text_encoder_2"): {
        "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "tie_word_embeddings": False,
    },
    (CLIP_LARGE, ""): {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
        },
        "projection_dim": 768,
    },
    (DINOV2_BASE, ""): {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14, "image_size": 518},
}  # fmt: skip


def transformer(
    path: str, dtype: torch.dtype, adapter: AdapterConfig | None = None, *, int8: bool = False, offloaded: int = 0
) -> FluxTransformer2DModel:
    """The transformer of a folder or hub id on the meta device, with a LoRA if there is an `adapter`.

    `int8`: the frozen base in int8; `offloaded`: so many of its blocks wait in host memory.
    """
    model = _on_meta(FluxTransformer2DModel.from_config, _settings(path, "transformer", model_folder.transformer_config), dtype)
    if int8:
        lora.to_int8(model, torch.device("meta"))
    if adapter:
        lora.inject(model, adapter, seed=0)
    elif offloaded:
        model.requires_grad_(False)
    if offloaded:
        offload.place(model, torch.device("meta"), offloaded)
    return model


def encoders(model: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> Encoders:
    """The real class around VAE, T5 (its weights in int8 if `int8`) and CLIP on the meta device, without tokenizers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = Encoders.__new__(Encoders)  # its __init__ reads weights
    vae = _on_meta(AutoencoderKL.from_config, _settings(model.path, "vae", lambda path: AutoencoderKL.load_config(path, subfolder="vae")), dtype)
    text = _text(CLIPTextConfig, CLIPTextModel, model.path, "text_encoder", dtype)
    text_2 = _text(T5Config, T5EncoderModel, model.path, "text_encoder_2", dtype)
    if int8:
        quantize_(text_2, Int8WeightOnlyConfig(), device="meta")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vars(made).update(
        pipeline=SimpleNamespace(vae=vae, text_encoder=text, text_encoder_2=text_2, vae_scale_factor=factor),
        max_sequence_length=model.max_sequence_length, device=torch.device("cpu"), dtype=dtype, int8=int8,
        _on_device={"vae", "text_encoder", "text_encoder_2"},
    )  # fmt: skip
    return made


def judge(path: str) -> CLIPModel:
    """The CLIP that judges pictures, in float32 as `Judge` loads it. On the meta device."""
    settings = _settings(path, "", lambda path: CLIPConfig.from_pretrained(path).to_dict())
    return _on_meta(CLIPModel, CLIPConfig(**settings), torch.float32)


def style_judge(path: str) -> Dinov2Model:
    """The DINOv2 that judges what pictures look like, in float32 as `StyleJudge` loads it. On the meta device."""
    settings = _settings(path, "", lambda path: Dinov2Config.from_pretrained(path).to_dict())
    return _on_meta(Dinov2Model, Dinov2Config(**settings), torch.float32)


def _text(settings: Any, model: Any, path: str, part: str, dtype: torch.dtype) -> Any:
    values = _settings(path, part, lambda path: settings.from_pretrained(path, subfolder=part).to_dict())
    return _on_meta(model, settings(**values), dtype)


def _settings(path: str, part: str, load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The bundled configuration of a model that has one; else that of a folder or of the hub."""
    if (path, part) in BUNDLED:
        return BUNDLED[path, part]
    try:
        return load(path)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"The configuration of {part or 'the judge'} in {path} cannot be read ({reason}). Correct the path.") from error


def _on_meta(make: Callable[[Any], Any], settings: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = make(settings).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def fake(*modules: nn.Module) -> None:
    """Replaces the meta tensors of modules by fake ones that behave like tensors on a CPU; call under FakeTensorMode."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that two modules share is one
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer)


def _fake(tensor: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, FakeTensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: _fake(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
