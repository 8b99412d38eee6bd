"""The jobs of a sweep: the values that each one has, and the folder that is named after them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType

from dev2pro.errors import ConfigError

LONGEST = 120  # characters of a folder's name; file systems take 255 bytes
UNSAFE = re.compile(r"[^\w.+@-]+", re.ASCII)
FLAG = "-m"


@dataclass(frozen=True)
class Job:
    """`name`: of its folder. `values`: swept key -> value, as text. `words`: all of its command but `out=`, as Hydra writes them."""

    name: str
    values: dict[str, str]
    words: list[str]


def is_flag(word: str) -> bool:
    """Whether a word of a command asks for a sweep, in one of Hydra's ways: -m, --multirun or its beginning, hydra.mode=MULTIRUN."""
    return word == FLAG or word == "hydra.mode=MULTIRUN" or (len(word) > 2 and "--multirun".startswith(word))


def plan(words: Sequence[str]) -> list[Job]:
    """The jobs of `key=value` words as Hydra reads them, every combination of the swept values, in the order of Hydra's own sweeper.

    Raises ConfigError where no key has several values, and for those that cannot be swept.
    """
    parser = OverridesParser.create()
    overrides = [override for override in parser.parse_overrides(list(words)) if not override.is_hydra_override()]
    swept = {override.get_key_element(): override for override in overrides if override.is_sweep_override()}
    if not swept:
        raise ConfigError(f"{FLAG} is for several values of a key, and none has them. Give some, such as seed=1,2, or leave {FLAG} out.")
    if "out" in swept:
        raise ConfigError("out= cannot be swept: it is the folder of the whole sweep, and every job has its own in it. Give one folder.")
    for key, override in swept.items():
        if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{override.input_line} leaves open what is swept. Write the values out, such as {key}=a,b.")
    [combinations] = BasicSweeper.split_arguments(overrides, None)
    jobs = [_job(parser.parse_overrides(combination), set(swept)) for combination in combinations]
    names = [job.name for job in jobs]
    if twice := next((job for job in jobs if names.count(job.name) > 1), None):
        raise ConfigError(f"The sweep has {', '.join(f'{key}={value}' for key, value in twice.values.items())} more than once. Leave it out once.")
    return jobs


def _job(overrides: Sequence[Override], swept: set[str]) -> Job:
    values = {override.get_key_element(): _text(override) for override in overrides if override.get_key_element() in swept}
    return Job(folder_name(values), values, [str(override.input_line) for override in overrides if override.get_key_element() != "out"])


def _text(override: Override) -> str:
    value = override.value()
    return value if isinstance(value, str) else override.get_value_element_as_str()


def folder_name(values: dict[str, str]) -> str:
    """A folder's name that can be read: `adapter.rank=4,optim.lr=0.001`, whatever the order of the keys. No two combinations have the same.

    In a value, what is no plain letter, digit or one of .+@- becomes `_`. A name that was changed or cut so ends with a hash of what it was.
    """
    exact = sorted(values.items())
    safe = [(UNSAFE.sub("_", key), UNSAFE.sub("_", value)) for key, value in exact]
    name = ",".join(f"{key}={value}" for key, value in safe)
    if safe == exact and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 13]}-{hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:12]}"
