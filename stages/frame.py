"""The frame of every stage: parses the Hydra config into dataclasses, runs the stage, maps errors to exit codes."""

import dataclasses
import difflib
import gc
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

# Hydra creates no folders and no log files: a stage writes only into out=.
PLAIN_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def main(name: str, schema: type[C], run: Callable[[C], Artifact]) -> None:
    """`python -m stages.<name> key=value ...`: composes conf/<name>.yaml, calls `run` with a `schema`, ends with its exit code."""
    gc.freeze()  # what was imported is never garbage; without this the process needs a second more to end
    gc.enable()
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    outcome: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)
    def composed(values: DictConfig) -> None:
        outcome.append(_exit_code(name, lambda: run_and_publish(typed(schema, values), run)))

    sys.argv[1:1] = PLAIN_HYDRA
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them; `explain` prints them
    try:
        composed()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_fail(name, explain(error, schema), ConfigError.exit_code))
    sys.exit(outcome[0] if outcome else 0)


def explain(error: BaseException, schema: type) -> str:
    """An error in the command or a yaml file as one paragraph, with the nearest existing key."""
    messages = [line.strip() for e in (error, error.__cause__) if e for line in str(e).splitlines()]
    useful = [
        line
        for line in messages
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
    """The dataclass for a composed config. Raises ConfigError for a missing required value or an unknown key."""
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
RANGES = {  # minimum, maximum, and the range in words
    **dict.fromkeys(COUNTS, (1, math.inf, "1 or more")),
    **dict.fromkeys(SHARES, (0, 1, "a number from 0 to 1")),
    "pictures": (0, 16, "0, which is off, to 16"),  # what fits on a sheet
}


def check_ranges(values: DictConfig, above: str = "") -> None:
    """Raises ConfigError for counts and shares outside `RANGES`."""
    for key, value in values.items():
        if isinstance(value, DictConfig):
            check_ranges(value, f"{above}{key!s}.")
        elif key in RANGES and not RANGES[key][0] <= value <= RANGES[key][1]:
            raise ConfigError(f"{above}{key!s}={value} cannot work. Choose {RANGES[key][2]}.")


def run_and_publish(config: C, run: Callable[[C], Artifact]) -> Artifact:
    """Runs the stage, pushes its artifact to the store of `config.publish` if there is one, and returns it."""
    store_url = getattr(config, "publish", None)
    if store_url:
        backends.parse_url(store_url)  # fails on a bad address before the run
    artifact = run(config)
    if store_url and os.environ.get("RANK", "0") == "0":
        print(printable(f"published as {store.push(artifact.uri, store_url)}"), flush=True)
    return artifact


def _exit_code(name: str, run: Callable[[], Artifact]) -> int:
    signals.install_handlers()
    logging.setLogRecordFactory(Record)
    if not sys.stderr.isatty():  # a progress bar fills a log with lines
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        artifact = run()
        print(printable(f"{name}: done, {artifact.uri}/artifact.json ({artifact.kind} {artifact.id[:12]})"), flush=True)
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
