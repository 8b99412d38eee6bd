"""Whether a path can be a model's at all; and what it is instead: a part of a pipeline, a hub cache, a single file, a LoRA."""

import json
import os
import re
from pathlib import Path

from dev2pro.artifacts import record
from dev2pro.errors import ConfigError
from dev2pro.models import weight_headers

INDEX = "model_index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_CACHE = re.compile(r"models--[\w.-]+")  # a repository's folder
MOST = 1000  # entries of a folder that are looked at for a hint


def check(path: str) -> None:
    """Raises ConfigError unless `path` is a folder with a pipeline or a transformer in diffusers layout, or looks like a hub id."""
    folder = Path(path)
    try:
        if folder.is_dir():
            _check_folder(path, folder)
        elif folder.exists():
            raise ConfigError(f"{path} is a file. Give a folder in diffusers layout, which holds {INDEX}.{_hint_of_file(folder)}")
        elif not HUB_ID.fullmatch(path) or path.startswith(("runs/", "data/")):
            link = f" It is a link to {os.readlink(path)}, which is gone." if folder.is_symlink() else ""
            raise ConfigError(
                f"The model folder {path} does not exist. Correct the path, or give a hub id such as black-forest-labs/FLUX.1-dev.{link}"
            )
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"The model folder {path!r} cannot be read: {reason}. Correct the path or its permissions.") from error


def _check_folder(path: str, folder: Path) -> None:
    names = os.listdir(folder)
    pipeline = INDEX in names or (folder / "transformer" / "config.json").is_file()
    if record.CONFIG in names and not _is_part(folder):
        record.read(path)  # a stage's output folder counts only once it is finished
    if record.pruned(path):
        raise ConfigError(f"The weights of {path} were removed to make room; only its record is left. Give a newer model, or make it again.")
    if not pipeline:
        raise ConfigError(
            f"{path} is no diffusers pipeline folder (no {INDEX} and no transformer/config.json). Give the folder that "
            f"holds {INDEX}; a single .safetensors file must be converted to the diffusers layout first.{_hint(folder, sorted(names)[:MOST])}"
        )


def _is_part(folder: Path) -> bool:
    """Whether a config.json is diffusers' or transformers', not a stage's."""
    try:
        values = json.loads((folder / record.CONFIG).read_bytes()[: record.LARGEST])
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and bool({"_class_name", "model_type", "architectures"} & set(values))


def _is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / "transformer" / "config.json").is_file()


def _hint(folder: Path, names: list[str]) -> str:
    """One sentence about a folder that is no pipeline's: what it is, and what to give instead. Empty if nothing is known."""
    parent = folder.parent if folder.name else Path(os.path.abspath(folder)).parent
    if (folder.name.startswith(("transformer", "vae", "text_encoder", "tokenizer", "scheduler")) or _is_part(folder)) and _is_pipeline(parent):
        return f" It is a part of a pipeline: give {parent}."
    repository = folder if "snapshots" in names else parent
    if HUB_CACHE.fullmatch(repository.name) and (found := _snapshots(repository)):
        return f" It is a folder of the Hugging Face cache: give {' or '.join(map(str, found[:3]))}."
    if found := [folder / name for name in names if (folder / name).is_dir() and _is_pipeline(folder / name)]:
        return f" It holds {len(found)} such folder{'s' if len(found) > 1 else ''}: give {' or '.join(map(str, found[:3]))}."
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return " It holds a LoRA; give the model that the LoRA is for."
    if "config.json" in names and _is_part(folder):
        return " It is one model alone: put it into a folder of that name beside the other parts of its pipeline."
    if files := [name for name in names if name.endswith((".safetensors", ".gguf", *weight_headers.PICKLES))]:
        return f" {files[0]}{_hint_of_file(folder / files[0]).removeprefix(' It')}"
    return ""


def _snapshots(repository: Path) -> list[Path]:
    """The pipeline folders in the hub's cache of one repository, the current one first."""
    folders = sorted(folder for folder in repository.glob("snapshots/*") if _is_pipeline(folder))
    main = repository / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    return sorted(folders, key=lambda folder: folder.name != current)


def _hint_of_file(file: Path) -> str:
    """One sentence about a file that was given as a model."""
    if file.suffix.lower() == ".gguf":
        return " It is quantised (GGUF), and only unquantised weights can be trained on."
    if file.suffix.lower() in weight_headers.PICKLES:
        return " It is a pickle, which can run code when it is read, and is not opened."
    if file.name in (INDEX, "config.json"):
        return f" Give its folder, {file.parent}."
    if file.suffix.lower() != ".safetensors":
        return ""
    try:
        header = weight_headers.read(file)
    except ValueError as error:
        return f" It {error}."
    whole = " FluxTransformer2DModel.from_single_file(...).save_pretrained(folder/transformer) converts it." if header.any(r"double_blocks") else ""
    return f" It is {weight_headers.identify(header)}.{whole if weight_headers.identify(header).startswith('a whole') else ''}"
