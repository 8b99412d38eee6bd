"""Reads the record of a LoRA to be evaluated; says what a file or folder is that stages.lora did not write."""

import os
from pathlib import Path

from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.models import weight_headers
from dev2pro.models.lora import CONTRACT, WEIGHTS

CURE = (
    "evaluate and tune take the output folders of stages.lora, because they need their record of what they were trained on and are to be applied "
    "to; they cannot read the LoRAs of other tools yet."
)


def read(path: str, key: str = "loras") -> Artifact:
    """The record of a finished artifact; of a LoRA, its file is there, whole and not pruned, by size and header. `key` names it in messages.

    Raises ConfigError for everything else, which names the tool, type, base and rank of another tool's LoRA.
    """
    folder = Path(path)
    try:
        if not (folder / record.RECORD).is_file() and (found := _describe(folder)):
            raise ConfigError(f"{key}={path} is no output folder of stages.lora: {found}. {CURE}")
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read ({error.strerror}). Correct the path or its permissions.") from error
    lora = record.read(path)
    if lora.kind == "lora":
        _check_weights(lora, folder, f"Make it again, or leave it out of {key}=.")
    return lora


def _check_weights(lora: Artifact, folder: Path, cure: str) -> None:
    if record.pruned(lora.uri):
        raise ConfigError(f"The weights of {lora.uri} were removed to make room; only its record is left. {cure}")
    for entry in (entry for entry in lora.files if entry["path"] == WEIGHTS):
        try:
            weight_headers.read(folder / WEIGHTS)
            size = (folder / WEIGHTS).stat().st_size
            reason = "" if size == entry["bytes"] else f"has {size:,} bytes, and its record says {entry['bytes']:,}"
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ConfigError(f"The LoRA {lora.uri} is damaged: {WEIGHTS} {reason}. {cure}")


def _describe(path: Path) -> str:
    """What a file or folder without a record is; empty for a folder that a stage began, which `record.read` refuses, and for an unknown one."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return ""
    names = sorted(os.listdir(path))
    if record.CONFIG in names and "stage" in record.read_json(path / record.CONFIG):
        return ""
    if "adapter_config.json" in names:
        weights = next((name for name in names if name.startswith("adapter_model.")), "")
        return f"it is a PEFT adapter{f', {weights} in it {_of_file(path / weights)}' if weights else ' without weights'}"
    if "model_index.json" in names or "transformer" in names:
        return "it is a whole model, or a folder of recover" if "transformer" in names else "it is a whole model"
    files = [name for name in names if name.endswith((".safetensors", ".gguf", *weight_headers.PICKLES)) and (path / name).is_file()]
    if not files:
        return ""
    chosen = WEIGHTS if WEIGHTS in files else files[0]
    more = f" (and {len(files) - 1} more files of weights)" if len(files) > 1 else ""
    return f"{chosen} in it {_of_file(path / chosen)}{more}"


def _of_file(file: Path) -> str:
    """What a file is, as a sentence's end: "is a LoRA in kohya's format for FLUX.1, rank 16"."""
    if file.suffix.lower() in weight_headers.PICKLES:
        return "is a pickle, which can run code when it is read, and is not opened"
    if file.suffix.lower() == ".gguf":
        return "is a quantised model (GGUF)"
    if file.name == record.RECORD:
        return f"is the record of an artifact; give its folder, {file.parent}"
    try:
        header = weight_headers.read(file)
    except ValueError as error:
        return str(error)
    ours = "a LoRA of stages.lora whose record, artifact.json, is not beside it; " if CONTRACT in header.metadata else ""
    return f"is {ours}{weight_headers.identify(header)}"
