"""What the values of a configuration may be: numbers, names and paths. One table for command lines, yaml files and forms."""

import dataclasses
import math
import os
import re
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from dev2pro.errors import ConfigError

NAME_WORDS = "a name of up to 64 characters, without / and control characters, that does not begin with a dot"
NAME = re.compile(r"(?!\.)[^/\x00-\x1f\x7f-\x9f]{1,64}")
NAMES = ("data.name", "arm")  # of files and folders, and in tables
WRITTEN = ("out", "cells", "to", "read.cache")  # folders that a stage makes
PATHS = (  # on this machine, in a store or on the hub
    *WRITTEN, "publish", "ledger", "model.path", "trained_on", "start", "teacher", "recovered", "judge", "style_judge", "lora", "loras", "prompts",
    "shards", "data.train", "data.heldout", "outside", "loss.teacher", "loss.teacher_lora", "training_adapter", "captions",
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have: `low` to `high`, both included unless `above` or `below` says otherwise; 0 besides where that is `off`."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    off: bool = False
    words: str = ""

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below or self.high == math.inf else value <= self.high
        return (low and high) or (self.off and value == 0)

    def told(self, value: float) -> str:
        """The range in words, for a value outside of it."""
        if self.words:
            return self.words
        off = "0, which is off, or " if self.off else ""
        if value < self.low and not self.above and not self.off:
            return f"{self.low:,g} or more"
        low = f"{off}more than {self.low:,g}" if self.above else f"{off}{self.low:,}"
        high = "" if self.high == math.inf else f"{', and' if self.above else ' to'} {'less than ' if self.below else ''}{self.high:,}"
        return f"{low}{high.replace(', and', ', up to') if not self.below else high}"

    def bounds(self) -> dict[str, float]:
        """As a form's field has it: gt or ge, lt or le. `off` is left to the stage."""
        high = {} if self.high == math.inf else {"lt" if self.below else "le": self.high}
        return {"gt" if self.above else "ge": self.low} | high


STEPS, COUNT, SHARE = Range(1, 10_000_000), Range(1, 65_536), Range(0, 1, words="a number from 0 to 1")
STRENGTH = Range(0, 100)  # of guidance, as an input or true CFG
GB = Range(0, 1_000_000)
SECONDS = Range(0, 1_000_000, above=True)
MULTIPLE = Range(1, 1_000_000, above=True, off=True)  # of a loss: of its own size or less, every step would be one too many
RANGES = {  # by the end of a dotted key; the longest end counts
    "seed": Range(0, 2**63 - 1), "steps": STEPS, "batch": COUNT, "guidance": STRENGTH, "usual_guidance": STRENGTH, "cfg_scale": STRENGTH,
    "loss.guidance_range": STRENGTH, "line": STRENGTH, "strengths": Range(0, 100, above=True), "guidances": Range(0, 100, above=True),
    "caption_dropout": SHARE, "ema": Range(0, 1, below=True, words="a number from 0 to 1, and not 1, which would keep the first weights"),
    "logit_mean": Range(-5, 5, words="a number from -5 to 5; 0 is the usual distribution, more is more noise"),
    "stop": Range(0, 1, above=True, below=True, words="a share between 0 and 1, such as 0.01, or null to train all steps"),
    "flow_weight": Range(0, 1000), "preserve.weight": Range(0, 1000), "collapse": SHARE, "seeds": Range(1, 100_000),
    "bootstrap": Range(1, 1_000_000),
    "resolution": Range(8, 8192), "bucket_step": Range(1, 8192),
    "aspect": Range(1, 8, words="1 for squares, or the longest form to keep, such as 2 for 2:1"),
    "data.max_enlarge": Range(1, words="1 or more, or null for no limit"),
    "data.max_crop": Range(0, 1, words="a share from 0 to 1, or null for no limit"),
    "model.max_sequence_length": Range(1, 512),
    "adapter.rank": Range(1, 16_384), "rank": Range(1, 16_384), "adapter.alpha": Range(0.001, 65_536),  # less than that over a rank trains zeros
    "lr": Range(1e-9, 1), "optim.warmup": Range(0, 10_000_000), "optim.weight_decay": Range(0, 10), "optim.beta2": Range(0, 1, below=True),
    "optim.clip": Range(0, 1_000_000, above=True),
    "checkpoint.every": STEPS, "checkpoint.keep": Range(1, 10_000), "checkpoint.loras": Range(0, 10_000_000), "checkpoint.grace": Range(0, 1_000_000),
    "guard.spike": MULTIPLE, "guard.collapse": MULTIPLE,
    "probe.every": STEPS, "probe.samples": Range(1, 100_000), "probe.bins": Range(1, 1000),
    "preview.pictures": Range(0, 16, words="0, which is off, to 16"),  # what fits on a sheet
    "preview.steps": Range(1, 1000), "sampling.steps": Range(1, 1000),
    "hardware.checkpointed_blocks": Range(0, 10_000), "hardware.offloaded_blocks": Range(0, 10_000), "hardware.micro_batch": COUNT,
    "hardware.ema_every": STEPS, "hardware.replicas": COUNT, "hardware.ranks": COUNT, "hardware.threads": Range(0, 1024),
    "hardware.encodings_gb": GB, "hardware.card_gb": GB, "hardware.host_gb": GB, "hardware.disk_gb": GB,
    "hardware.tflops": Range(0, 1_000_000), "hardware.price": Range(0, 1_000_000),
    "read.workers": Range(0, 256), "read.threads": Range(1, 1024), "read.prefetch_mb": Range(1, 1_000_000), "read.connect_timeout": SECONDS,
    "read.idle_timeout": SECONDS, "read.hedge": Range(0, 1_000_000), "read.retries": Range(0, 1000), "read.cache_gb": GB,
    "vae_steps": STEPS, "clip_steps": STEPS, "judge_steps": STEPS, "vae_batch": COUNT, "clip_batch": COUNT,
}  # fmt: skip


def ends(key: str) -> list[str]:
    """A dotted key and its ends, the longest first: a.b.c, b.c, c."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def range_of(key: str) -> Range | None:
    """The range of a dotted key; None if the table has none."""
    return next((RANGES[end] for end in ends(key) if end in RANGES), None)


def is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a dotted key or its end is among `keys`. A name alone must be the whole key: `out`, and not `x.out`."""
    return any(end in keys for end in ends(key) if "." in end or end == key)


def keys(schema: type, above: str = "") -> dict[str, Any]:
    """Dotted key -> type, without None, of a configuration's dataclasses."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(one for one in get_args(kind) if one is not type(None))
        found |= keys(kind, f"{above}{name}.") if dataclasses.is_dataclass(kind) else {above + name: kind}  # type: ignore[arg-type]
    return found


def checked(key: str, value: Any) -> Any:
    """The value of a key, a home folder's ~ written out. Raises ConfigError for one that cannot mean anything."""
    if isinstance(value, list):
        return [checked(key, one) for one in value]
    if isinstance(value, str):
        return _checked_text(key, value)
    allowed = range_of(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and allowed and value not in allowed:
        raise ConfigError(f"{key}={value} cannot work. Choose {allowed.told(value)}.")
    return value


def _checked_text(key: str, text: str) -> str:
    if not text.strip():
        raise ConfigError(f"{key}={text} is empty. Give a value, or leave {key} out of the command.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{key}={text!a} is no text: it holds a NUL or bytes that are not UTF-8. Correct it, or rename what it names.")
    if is_one_of(key, NAMES) and not NAME.fullmatch(text):
        raise ConfigError(f"{key}={text} cannot work: files are named after it. Choose {NAME_WORDS}.")
    return _checked_path(key, text) if is_one_of(key, PATHS) and "://" not in text else text


def _checked_path(key: str, path: str) -> str:
    if path.startswith("~") and not os.path.lexists(path):
        home = os.path.expanduser(path)
        if home == path:
            raise ConfigError(f"{key}={path} names the home folder of nobody on this machine. Write the path out; a file of that name is ./{path}.")
        path = home
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        if not re.search(r"[*?\[{]", path):  # a pattern may be longer than any name
            raise ConfigError(f"{key}={path} cannot be looked up ({error.strerror}). Correct the path.") from error
    if is_one_of(key, WRITTEN):
        place = path
        while place and not os.path.lexists(place):
            place = os.path.dirname(place)
        place = place or "."
        if not os.path.isdir(place):
            raise ConfigError(f"{key}={path} cannot be a folder: {place} is none. Choose another {key}=, or remove {place}.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"{key}={path} cannot be written: {place} is closed to this user. Choose another {key}=, or open it.")
    return path
