"""The parts of a pipeline, one by one: their classes, configurations, tokenizer files, and the headers of their weights."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

from dev2pro.errors import ConfigError
from dev2pro.escape import printable
from dev2pro.models import weight_headers
from dev2pro.models.model_path import INDEX
from dev2pro.models.weight_files import DIFFUSERS, TRANSFORMERS, UNQUANTISED, ModelFolder

TRANSFORMER, JUDGE, STYLE_JUDGE = "transformer", "", "."  # a judge is its folder; "." is the same one
MODELS: dict[str, tuple[str, str, Callable[[Any], torch.nn.Module]]] = {  # part -> class, name of its weights, maker from a configuration
    TRANSFORMER: ("FluxTransformer2DModel", DIFFUSERS, FluxTransformer2DModel.from_config),
    "vae": ("AutoencoderKL", DIFFUSERS, AutoencoderKL.from_config),
    "text_encoder": ("CLIPTextModel", TRANSFORMERS, lambda values: CLIPTextModel(CLIPTextConfig(**values))),
    "text_encoder_2": ("T5EncoderModel", TRANSFORMERS, lambda values: T5EncoderModel(T5Config(**values))),
    JUDGE: ("CLIPModel", TRANSFORMERS, lambda values: CLIPModel(CLIPConfig(**values))),
    STYLE_JUDGE: ("Dinov2Model", TRANSFORMERS, lambda values: Dinov2Model(Dinov2Config(**values))),
}
BLOCKS = {  # part -> key of its configuration, and the blocks that it counts
    TRANSFORMER: {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"},
    "text_encoder": {"num_hidden_layers": "encoder.layers"},
    "text_encoder_2": {"num_layers": "encoder.block"},
}
DINO_ATTENTION = {  # names in files -> in transformers 5
    ".attention.attention.query.": ".attention.q_proj.", ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.", ".attention.output.dense.": ".attention.o_proj.",
}  # fmt: skip
FEW = 2  # blocks of each kind that are made to learn the shapes
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
CLIP_FILES, T5_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt")), (("tokenizer.json",), ("spiece.model",))
TOKENIZERS = {"tokenizer": CLIP_FILES, "tokenizer_2": T5_FILES, JUDGE: CLIP_FILES}  # part -> sets of files, one of which is enough
ANCHORS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")  # of the scheduler's shift
MOST_LAYERS = 1000
FOREIGN = r"double_blocks|lora_|lokr_|hada_"  # in the names of other tools' files


def check_class(folder: ModelFolder, index: Mapping[str, Any], part: str, kind: str = "") -> None:
    """Raises ConfigError if a pipeline's index says that a part is missing, or of another class than `kind`."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        raise folder.fail("", INDEX, f"names no {part}")
    if entry[0] not in ("diffusers", "transformers") or (kind and entry[1] != kind):
        wanted = f", not {kind}" if kind else ""
        raise folder.fail("", INDEX, f"says that {part} is {printable('.'.join(entry))[:80]}{wanted}", "Give FLUX.1-dev or a model made from it.")


def check_scheduler(folder: ModelFolder) -> None:
    """Raises ConfigError for a scheduler's configuration without the numbers of the resolution shift."""
    file = "scheduler_config.json"
    if (config := folder.config("scheduler", file)) is None:
        return
    if wrong := next((key for key in ANCHORS if type(config.get(key)) not in (int, float)), None):
        raise folder.fail("scheduler", file, f"has no number {wrong}, by which timesteps are shifted with the resolution")
    if config[ANCHORS[0]] == config[ANCHORS[1]]:
        raise folder.fail("scheduler", file, f"has the same {ANCHORS[0]} and {ANCHORS[1]}")


def check_tokenizer(folder: ModelFolder, part: str) -> None:
    """Raises ConfigError unless all files of a tokenizer are there, none of them empty or a pointer."""
    files, choices = folder.files(part), TOKENIZERS[part]
    chosen = next((names for names in choices if set(names) <= files), None)
    if chosen is None:
        if folder.complete:
            raise folder.fail(part, choices[0][0], "is missing")
        return
    for name in chosen:
        if name.endswith(".json"):
            if folder.config(part, name) == {}:
                raise folder.fail(part, name, "holds nothing")
        elif folder.complete and (reason := weight_headers.unreadable(folder.path / part / name)):
            raise folder.fail(part, name, reason)


def check_config(folder: ModelFolder, part: str, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for the configuration of a quantised model, and for one that describes no model."""
    settings = config.get("quantization_config") or config.get("compression_config")
    method = str(settings.get("quant_method") or settings.get("quant_type") or "") if isinstance(settings, dict) else ""
    if settings:
        raise folder.fail(part, "config.json", f"is that of a quantised model ({printable(method)[:60] or 'quantization_config'})", UNQUANTISED)
    if "quanto_qmap.json" in folder.files(part):
        raise folder.fail(part, "quanto_qmap.json", "is that of a quantised model (optimum-quanto)", UNQUANTISED)
    for key, value in _flat(config):
        if "layers" in key.split("_") and value is not None and not (type(value) is int and 0 <= value <= MOST_LAYERS):
            raise folder.fail(part, "config.json", f"has {printable(key)[:60]}={printable(str(value))[:40]}")
    parameters(folder, part, config)


def parameters(folder: ModelFolder, part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape of the model that a configuration describes. Raises ConfigError for a configuration that describes none."""
    try:
        return _parameters(part, json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True))
    except Exception as error:  # the libraries raise anything for values that they do not expect
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])[:200]
        raise folder.fail(part, "config.json", f"describes no {MODELS[part][0]} ({reason})") from error


@functools.lru_cache(maxsize=16)
def _parameters(part: str, config: str) -> dict[str, tuple[int, ...]]:
    values, blocks = json.loads(config), BLOCKS.get(part, {})
    counts = {blocks[key]: values[key] for key in blocks if values.get(key, 0) > FEW}
    with torch.device("meta"):
        model = MODELS[part][2](values | {key: FEW for key in blocks if blocks[key] in counts})
    shapes = {_plain(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for block, count in counts.items():  # all but the first are alike, and making 57 of them takes a second
        last = {name.removeprefix(f"{block}.{FEW - 1}."): shape for name, shape in shapes.items() if name.startswith(f"{block}.{FEW - 1}.")}
        shapes |= {f"{block}.{number}.{name}": shape for number in range(FEW, count) for name, shape in last.items()}
    return shapes


def _plain(name: str) -> str:
    """A parameter's name without what only some versions of transformers write; T5 has its embedding under two names, DINOv2 its attention."""
    for in_files, in_models in DINO_ATTENTION.items():
        name = name.replace(in_files, in_models)
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name.removeprefix("text_model.")


def _flat(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [pair for key, value in config.items() for pair in (_flat(value) if isinstance(value, dict) else [(key, value)])]


def check_weights(folder: ModelFolder, part: str, variant: str | None, config: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the headers of the weights describe the model of the configuration, in floating-point numbers."""
    stem = MODELS[part][1]
    header, expected = folder.header(part, stem, variant), parameters(folder, part, config)
    if header is None:
        return
    if method := weight_headers.quantisation(header):
        raise folder.fail(part, "", f"has quantised weights ({method})", UNQUANTISED)
    shapes = {_plain(name): shape for name, shape in header.shapes.items()}
    if header.any(FOREIGN):
        raise folder.fail(part, "", f"has weights that are {weight_headers.identify(header)}", "Give a model in diffusers layout.")
    older = {name for name in (*expected, *shapes) if stem == DIFFUSERS and ".attentions." in name}  # VAEs: diffusers renames them on loading
    if missing := expected.keys() - shapes.keys() - older:
        raise ConfigError(f"The model in {folder.name} cannot be read: its weights lack {min(missing)}. Download or convert it again.")
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape and name not in older:
            raise folder.fail(part, "", f"has weights for another config.json: {name} is {list(shapes[name])} and should be {list(shape)}")
    ours = "" if stem == DIFFUSERS else "encoder."  # a file of transformers may hold the other half of a model, such as a decoder
    if unknown := {name for name in shapes.keys() - expected.keys() - older if name.startswith(ours) and "position_ids" not in name}:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise folder.fail(part, "", f"has weights for another config.json, which knows no {printable(min(unknown))[:80]}{more}")
