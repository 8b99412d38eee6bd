"""Which files of a model's folder are its weights: variants, shards and their index, and what their headers say."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from dev2pro.artifacts.record import LARGEST
from dev2pro.errors import ConfigError
from dev2pro.models import weight_headers
from dev2pro.models.weight_headers import PICKLES, Header

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # what the two libraries call a model's weights
AGAIN = "Download or convert it again."


@dataclass(frozen=True)
class ModelFolder:
    """A folder of models, each in a subfolder called its part; "" and "." are the folder itself. `name`: the path or hub id that was given.

    `complete`: false in the hub's cache, where what is missing can still be fetched.
    """

    name: str
    path: Path
    complete: bool = True

    def fail(self, part: str, file: str, reason: str, cure: str = AGAIN) -> ConfigError:
        """The error for a file that cannot be used."""
        return ConfigError(f"The model in {self.name} cannot be read: {'/'.join(name for name in (part, file) if name.strip('.'))} {reason}. {cure}")

    def config(self, part: str, file: str = "config.json") -> dict[str, Any] | None:
        """The JSON object of a file; None where it can still be fetched. Raises ConfigError for a file that is missing or something else."""
        try:
            path = self.path / part / file
            if not self.complete and not path.exists():
                return None
            if path.stat().st_size > LARGEST:
                raise self.fail(part, file, f"has more than {LARGEST:,} bytes")
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise self.fail(part, file, "is a link to nothing" if path.is_symlink() else "is missing") from error
        except OSError as error:
            raise self.fail(part, file, f"cannot be opened ({error.strerror})") from error
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            pointer = content.startswith(weight_headers.POINTER)
            reason = "is empty" if not content.strip() else "is a pointer of git-lfs" if pointer else f"is no JSON ({error})"
            raise self.fail(part, file, reason, "Run `git lfs pull` in its repository." if pointer else AGAIN) from error
        if not isinstance(values, dict):
            raise self.fail(part, file, "holds no JSON object")
        return values

    def files(self, part: str) -> set[str]:
        """The names of what lies in a part's folder. Raises ConfigError for a folder that may not be read."""
        try:
            return {file.name for file in (self.path / part).iterdir()}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise self.fail(part, "", f"cannot be listed ({error.strerror})") from error

    def variants(self, part: str, stem: str) -> set[str | None]:
        """The variants of the weight files that a part has; None is the one without a name."""
        kinds = (rf"{stem}(?:\.(?P<variant>[\w]+?))?\.safetensors", rf"{stem}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
        return {found["variant"] for name in self.files(part) for kind in kinds if (found := re.fullmatch(kind, name))}

    def header(self, part: str, stem: str, variant: str | None) -> Header | None:
        """What the weights of a part hold, all shards together, in its `variant` or, where it has none of that name, in its plain files.

        None where some can still be fetched. Raises ConfigError, naming the file and the cure.
        """
        present = self.variants(part, stem)
        chosen = variant if variant in present else None
        if chosen not in present:
            if not self.complete:
                return None
            raise self._no_weights(part, stem, present)
        names, listed = self._shards(part, stem, chosen)
        headers = []
        for name in names:
            if not self.complete and not (self.path / part / name).exists():
                return None
            try:
                headers.append(weight_headers.read(self.path / part / name))
            except ValueError as error:
                raise self.fail(part, name, str(error)) from error
        whole = Header(
            {name: shape for header in headers for name, shape in header.shapes.items()},
            {name: kind for header in headers for name, kind in header.types.items()},
            {key: value for header in headers for key, value in header.metadata.items()},
        )
        if missing := listed - set(whole.shapes):
            raise self.fail(part, "", f"has an index that lists {min(missing)}, which none of its {len(names)} files holds")
        return whole

    def _shards(self, part: str, stem: str, variant: str | None) -> tuple[list[str], set[str]]:
        """The file names of one variant's weights, and the tensors that its index lists; one file has none."""
        single, index = f"{stem}{f'.{variant}' if variant else ''}.safetensors", f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        present = self.files(part)
        if index not in present or (stem == TRANSFORMERS and single in present):  # what the libraries take where both are there
            return [single], set()
        values = self.config(part, index) or {}
        weights = values.get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()) or "metadata" not in values:
            raise self.fail(part, index, "is no index of shards (it needs metadata and a weight_map of tensor names to files)")
        names = sorted(set(weights.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise self.fail(part, index, f"names {outside[0][:80]!r}, which is no file beside it")
        if self.complete and (missing := [name for name in names if name not in present]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self.fail(part, index, f"names {len(names)} files, and {missing[0]}{more} is missing")
        return names, set(weights)

    def _no_weights(self, part: str, stem: str, present: set[str | None]) -> ConfigError:
        """The error for a part without plain weights: what is there instead, and what to do with it."""
        if present:
            names = sorted(filter(None, present))
            cure = (
                f"Add model.variant={names[0]} to the command."
                if part.strip(".")
                else f"Save it again without a variant: dev2pro reads {stem}.safetensors."
            )
            return self.fail(part, "", f"has no weights but those of variant {', '.join(names)}", cure)
        files = sorted(self.files(part))
        if shards := [name for name in files if re.fullmatch(rf"{stem}[.-].*-of-\d+.*\.safetensors", name)]:
            return self.fail(part, f"{stem}.safetensors.index.json", f"is missing, which says what {shards[0]} and the other shards hold")
        if pickles := [name for name in files if name.endswith(PICKLES)]:
            cure = "Load it once with diffusers or transformers and call save_pretrained(folder, safe_serialization=True)."
            return self.fail(part, pickles[0], f"is a pickle, which can run code when it is read, and there is no {stem}.safetensors", cure)
        if gguf := [name for name in files if name.endswith(".gguf")]:
            return self.fail(part, gguf[0], "is quantised (GGUF), and only unquantised weights can be trained on", UNQUANTISED)
        if other := [name for name in files if name.endswith(".safetensors")]:
            try:
                what = weight_headers.identify(weight_headers.read(self.path / part / other[0]))
            except ValueError as error:
                what = str(error)
            return self.fail(part, f"{stem}.safetensors", f"is missing; {other[0]} is there ({what})", "Give a model in diffusers layout.")
        return self.fail(part, f"{stem}.safetensors", "is missing")


UNQUANTISED = "Give the original weights in bfloat16, float16 or float32; hardware.int8_base=true rounds a frozen base to save memory."


def find(path: str) -> ModelFolder | None:
    """The folder of a local path, or what the hub's cache on this machine holds of a hub id; None for a hub id of which it holds nothing."""
    if Path(path).is_dir():
        return ModelFolder(path, Path(path))
    for file in ("model_index.json", "transformer/config.json", "config.json"):
        cached = try_to_load_from_cache(path, file)
        if isinstance(cached, str):
            return ModelFolder(path, Path(cached).parents[file.count("/")], complete=False)
    return None


def variant_of(path: str, part: str, stem: str, variant: str | None) -> str | None:
    """`variant` for a part that has weights of it, else None; on the hub always `variant`."""
    folder = find(path)
    return variant if variant is None or folder is None or not folder.complete or variant in folder.variants(part, stem) else None
