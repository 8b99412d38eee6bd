"""The frame around every stage's story: Hydra to typed values at the door, errors to exit codes on the way out."""

import dataclasses
import difflib
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar, get_type_hints

import diffusers.utils.logging
import hydra
import transformers.utils.logging
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dev2pro import signals
from dev2pro.artifacts import backends, run_folder, store
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import INTERRUPTED, ConfigError, SpaceError, StageError, out_of_space
from dev2pro.escape import Record, lines, printable

C = TypeVar("C")
NO_SPACE = "no space is left where out= writes. Free some, or choose another out=, and run again."

# Hydra makes no folders and no log files of its own: a stage writes only into out=.
PLAIN_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def main(name: str, schema: type[C], run: Callable[[C], Artifact]) -> None:
    """`python -m stages.<name> key=value ...`: composes conf/<name>.yaml, calls `run` with a `schema`, ends with its exit code."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    outcome: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)
    def composed(values: DictConfig) -> None:
        outcome.append(_guarded(name, lambda: published(typed(schema, values), run)))

    sys.argv[1:1] = PLAIN_HYDRA
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them, and we say what they mean
    try:
        composed()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_fail(name, explained(error, schema), ConfigError.exit_code))
    sys.exit(outcome[0] if outcome else 0)


def explained(error: BaseException, schema: type) -> str:
    """What a mistake in the command or a yaml file was, where, and the nearest key that exists."""
    said = [line.strip() for e in (error, error.__cause__) if e for line in str(e).splitlines()]
    useful = [
        line
        for line in said
        if line and not line.startswith(("To append", "full_key", "object_type", "reference_type", "Config search", "provider="))
    ]
    message = ". ".join(line.rstrip(".") for line in dict.fromkeys(useful)).replace(":. ", ": ")
    unknown = re.search(r"Key '([^']+)'", message)
    near = difflib.get_close_matches(unknown[1], _keys(schema), n=1) if unknown else []
    return f"{message}.{f' Did you mean {near[0]}?' if near else ''} `--cfg job` prints every key and its value, `--help` the groups."


def _keys(schema: type) -> set[str]:
    fields = get_type_hints(schema)
    return set(fields).union(*(_keys(kind) for kind in fields.values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)))


def typed(schema: type[C], values: DictConfig) -> C:
    """The dataclass for a composed config. Raises ConfigError for a value that is required and missing, or that nobody knows."""
    missing = sorted(OmegaConf.missing_keys(values))
    if missing:
        raise ConfigError(f"These values are required and were not given: {', '.join(missing)}. Add for example {missing[0]}=... to the command.")
    check_ranges(values)
    try:
        return OmegaConf.to_object(values)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise ConfigError(f"The configuration does not fit {schema.__name__}: {error}") from error


COUNTS = (  # 1 or more, in every stage
    "steps", "batch", "micro_batch", "every", "samples", "bins", "seeds", "bootstrap", "resolution", "bucket_step", "keep", "prefetch_mb",
)  # fmt: skip
SHARES = ("caption_dropout", "ema")  # 0 to 1
RANGES = {  # the least, the most, and both in words
    **dict.fromkeys(COUNTS, (1, math.inf, "1 or more")),
    **dict.fromkeys(SHARES, (0, 1, "a number from 0 to 1")),
    "pictures": (0, 16, "0, which is off, to 16"),  # what fits on a sheet
}


def check_ranges(values: DictConfig, above: str = "") -> None:
    """Raises ConfigError for a count of nothing or a share of more than everything."""
    for key, value in values.items():
        if isinstance(value, DictConfig):
            check_ranges(value, f"{above}{key!s}.")
        elif key in RANGES and not RANGES[key][0] <= value <= RANGES[key][1]:
            raise ConfigError(f"{above}{key!s}={value} cannot work. Choose {RANGES[key][2]}.")


def published(config: C, run: Callable[[C], Artifact]) -> Artifact:
    """The artifact of a stage, once it is in the store of `config.publish` as well, where one is named."""
    where = getattr(config, "publish", None)
    if where:
        backends.parse_url(where)  # a mistake in it is told before the run
    made = run(config)
    if where and os.environ.get("RANK", "0") == "0":
        print(printable(f"published as {store.push(made.uri, where)}"), flush=True)
    return made


def _guarded(name: str, work: Callable[[], Artifact]) -> int:
    signals.install_handlers()
    logging.setLogRecordFactory(Record)
    if not sys.stderr.isatty():  # a bar that redraws itself is a hundred lines in a log
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        made = work()
        print(printable(f"{name}: done, {made.uri}/artifact.json ({made.kind} {made.id[:12]})"), flush=True)
        return 0
    except KeyboardInterrupt:
        return _fail(name, "interrupted. The same command goes on from the last checkpoint, if there is one.", INTERRUPTED)
    except StageError as error:
        return _fail(name, str(error), error.exit_code)
    except Exception as error:
        if out_of_space(error):
            return _fail(name, NO_SPACE, SpaceError.exit_code)
        if "closed by peer" in str(error) or "Connection reset by peer" in str(error):  # gloo
            return _fail(name, f"rank {os.environ.get('RANK')}: another rank ended; what went wrong is told there.", 1)
        print(lines(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        return 1
    finally:
        run_folder.release()


def _fail(name: str, message: str, code: int) -> int:
    print(lines(f"{name}: {message}"), file=sys.stderr, flush=True)
    return code
