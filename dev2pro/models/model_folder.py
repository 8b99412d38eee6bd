"""Decides from configurations and safetensors headers, never from weights, whether the models of a run can be used and fit each other."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline, FluxTransformer2DModel

from dev2pro.artifacts import store
from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.escape import printable
from dev2pro.models import model_parts, model_path
from dev2pro.models.model_parts import ENCODERS, JUDGE, MODELS, STYLE_JUDGE, TRANSFORMER
from dev2pro.models.weight_files import ModelFolder, find

RELATED = {  # pipelines with a transformer of FLUX.1's class -> what is else about them
    "FluxKontextPipeline": "it edits a picture that it is given, and training here gives it none",
    "FluxFillPipeline": "it fills the holes of a picture, and takes that as further channels",
    "FluxControlPipeline": "it follows a control picture, and takes that as further channels",
}

SWAPPED = {  # judge that is wanted -> what to do with one of the other kind
    "CLIPModel": "It has no text tower to compare prompts with: give it as style_judge=, and a CLIPModel as judge=.",
    "Dinov2Model": "Give it as judge=, which judges what style_judge=null leaves to it, or a Dinov2Model as style_judge=.",
}


def check_models(path: str, variant: str | None, *, base: bool, **others: str | None) -> None:
    """Raises ConfigError unless all models of a run can be read and fit each other; TryAgainError where one cannot be fetched from the hub.

    `path` is model.path, a pipeline; `base`: whether its transformer is used too, and not only its encoders. `others`: the settings that name a
    transformer, such as trained_on, with their paths.
    """
    given = ({"model.path": path} if base else {}) | {setting: other for setting, other in others.items() if other}
    configs = {setting: transformer_config(other) for setting, other in given.items()}
    for setting, config in configs.items():
        if base and (differing := _differing(config, configs["model.path"])):
            raise ConfigError(
                f"{setting}={given[setting]} has another shape than the base, model.path={path} ({differing}). "
                f"Give a model that was {'recovered' if setting in ('start', 'recovered') else 'made'} from this base."
            )
    for other in given.values():
        check_transformer(other, variant)
    for key, value in check_pipeline(path, variant).items():
        for setting, config in configs.items():
            if (taken := _shape(config)[key]) != value:
                raise ConfigError(
                    f"The transformer of {setting}={given[setting]} takes {key}={taken}, and the encoders of model.path={path} make {value}. "
                    "Give models of one family."
                )
    folders = [find(store.resolve(other)) for other in dict.fromkeys([path, *given.values()])]
    _check_variant(variant, [folder for folder in folders if folder], complete=all(folder and folder.complete for folder in folders))


def has_transformer(path: str) -> bool:
    """Whether a pipeline has a transformer beside its encoders; taken for granted on the hub."""
    return not os.path.isdir(path) or os.path.lexists(Path(path) / TRANSFORMER)


def transformer_config(path: str) -> dict[str, Any]:
    """The transformer's configuration. Raises ConfigError unless it is that of a guidance-distilled FLUX transformer which can be trained."""
    folder, config = _transformer(path)
    if config.get("_class_name") != "FluxTransformer2DModel":
        raise ConfigError(
            f"{folder.name}/transformer is a {printable(str(config.get('_class_name')))[:80]}, not a FluxTransformer2DModel. dev2pro works on "
            "FLUX.1-dev and its kin."
        )
    if not config.get("guidance_embeds"):
        raise ConfigError(
            f"The transformer in {folder.name} has no guidance input (guidance_embeds is false), so it is not guidance-distilled: "
            "there is nothing to recover, train on it directly. Give FLUX.1-dev or a model made from it."
        )
    shape = _shape(config)
    if shape["in_channels"] != shape["out_channels"]:
        raise ConfigError(
            f"The transformer in {folder.name} takes {shape['in_channels']} channels and makes {shape['out_channels']}: it is one of FLUX.1's tools "
            "(Fill 384, Canny and Depth 128), which take a further picture as input. Give FLUX.1-dev or a model made from it."
        )
    model_parts.check_config(folder, TRANSFORMER, config)
    return config


def check_transformer(path: str, variant: str | None = None) -> dict[str, Any]:
    """The transformer's configuration, as `transformer_config`. Raises ConfigError as well if its weights do not fit it or are quantised."""
    config = transformer_config(path)
    folder, _ = _transformer(path)
    model_parts.check_weights(folder, TRANSFORMER, variant, config)
    return config


def check_pipeline(path: str, variant: str | None = None) -> dict[str, int]:
    """Raises ConfigError unless `path` holds a FluxPipeline whose encoders, tokenizers and scheduler can be read.

    Returns what its encoders make, as sizes of a transformer's inputs; nothing where that is not known without fetching it.
    """
    model_path.check(path)
    folder = _fetched(path, lambda: FluxPipeline.load_config(path))
    index = folder.config("", model_path.INDEX) or {}
    _check_pipeline_class(folder, index)
    configs = dict[str, dict[str, Any]]()
    for part in (*ENCODERS, "tokenizer", "tokenizer_2"):
        model_parts.check_class(folder, index, part, MODELS[part][0] if part in ENCODERS else "")
    model_parts.check_class(folder, index, "scheduler", "FlowMatchEulerDiscreteScheduler")
    for part in ENCODERS:
        if (config := folder.config(part)) is not None:
            model_parts.check_config(folder, part, config)
            model_parts.check_weights(folder, part, variant, config)
            configs[part] = config
    model_parts.check_scheduler(folder)
    for part in ("tokenizer", "tokenizer_2"):
        model_parts.check_tokenizer(folder, part)
    made = {("vae", "latent_channels"): ("in_channels", 4), ("text_encoder", "hidden_size"): ("pooled_projection_dim", 1),
            ("text_encoder_2", "d_model"): ("joint_attention_dim", 1)}  # fmt: skip
    return {name: times * configs[part][key] for (part, key), (name, times) in made.items() if key in configs.get(part, {})}


def check_judge(path: str, kind: str = "CLIPModel") -> None:
    """Raises ConfigError if the folder of a judge, a CLIPModel or a Dinov2Model, or the copy in the hub's cache, cannot be read.

    Nothing for a path that holds neither.
    """
    part, model_type = (JUDGE, "clip") if kind == "CLIPModel" else (STYLE_JUDGE, "dinov2")
    if (folder := find(path)) and (config := folder.config(part)) is not None:
        if (found := config.get("model_type")) != model_type:
            other = printable(str(found or config.get("_class_name")))[:60]
            cure = SWAPPED[kind] if found in ("clip", "dinov2") else f"Give a transformers {kind} folder."
            raise folder.fail(part, "config.json", f"is that of a {other}, not of a {kind}", cure)
        model_parts.check_config(folder, part, config)
        model_parts.check_weights(folder, part, None, config)
        folder.config(part, "preprocessor_config.json")
        if part == JUDGE:
            model_parts.check_tokenizer(folder, part)


def fetch(path: str, load: Callable[[], Any]) -> Any:
    """What `load` reads. Raises ConfigError if a folder cannot be read, TryAgainError if the hub cannot be reached."""
    try:
        return load()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if Path(path).is_dir():
            raise ConfigError(f"The model in {path} cannot be read: {reason}. Download or convert it again.") from error
        raise TryAgainError(
            f"{path} is no local folder and could not be fetched from the Hugging Face hub ({reason}). Check the name and the network, accept "
            "the model's licence and run `hf auth login` if it is gated, or give a local folder."
        ) from error


def _fetched(path: str, load: Callable[[], Any]) -> ModelFolder:
    """The folder of a path, or of the hub's cache once `load` has fetched a file into it."""
    if not Path(path).is_dir():
        fetch(path, load)
    return find(path) or ModelFolder(path, Path(path), complete=False)


def _transformer(path: str) -> tuple[ModelFolder, dict[str, Any]]:
    path = store.resolve(path)
    model_path.check(path)
    folder = _fetched(path, lambda: FluxTransformer2DModel.load_config(path, subfolder=TRANSFORMER))
    if (folder.path / model_path.INDEX).is_file():
        _check_pipeline_class(folder, folder.config("", model_path.INDEX) or {})
    return folder, folder.config(TRANSFORMER) or {}


def _check_pipeline_class(folder: ModelFolder, index: Mapping[str, Any]) -> None:
    if (kind := index.get("_class_name")) != "FluxPipeline":
        why = f": {RELATED[kind]}" if isinstance(kind, str) and kind in RELATED else ""
        raise ConfigError(
            f"{folder.name} is a {printable(str(kind))[:80]}, not a FluxPipeline{why}. Point model.path at a FLUX.1-dev folder in diffusers layout."
        )


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a transformer's shape, with diffusers' defaults for what a configuration does not say."""
    known = inspect.signature(FluxTransformer2DModel.__init__).parameters
    shape = {key: config.get(key, parameter.default) for key, parameter in known.items() if key != "self"}
    axes = shape["axes_dims_rope"]
    return shape | {"out_channels": shape["out_channels"] or shape["in_channels"], "axes_dims_rope": list(axes) if isinstance(axes, tuple) else axes}


def _differing(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The first value in which two transformers differ: "num_layers is 18 there and 19 here"; empty if there is none."""
    here = _shape(base)
    return next((f"{key} is {value} there and {here[key]} here" for key, value in _shape(config).items() if value != here[key]), "")


def _check_variant(variant: str | None, folders: list[ModelFolder], *, complete: bool) -> None:
    """Raises ConfigError if no model of a run has weights of the variant; tells of quantised files beside the ones that are read."""
    stems = {part: stem for part, (_, stem, _) in MODELS.items() if part != JUDGE}
    found = {name for folder in folders for part, stem in stems.items() for name in folder.variants(part, stem)}
    if variant and complete and variant not in found:
        have = ", ".join(sorted(name for name in found if name)) or "none"
        raise ConfigError(
            f"model.variant={variant}, and no weights in {' or '.join(folder.name for folder in folders)} are called so (variants: {have}). "
            "Leave model.variant out, or give the folder that has them."
        )
    if os.environ.get("RANK", "0") == "0":
        for folder in folders:
            for unread in sorted(name for part in ("", TRANSFORMER) for name in folder.files(part) if name.endswith(".gguf")):
                print(printable(f"{folder.name}: {unread} is not read, the weights in transformer/*.safetensors are"), file=sys.stderr, flush=True)
