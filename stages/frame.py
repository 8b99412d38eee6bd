"""The frame of every stage: parses the Hydra config into dataclasses, runs the stage, maps errors to exit codes."""

import difflib
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import diffusers.utils.logging
import hydra
import transformers.utils.logging
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dev2pro import allowed, command_line, signals
from dev2pro.artifacts import backends, run_folder, store
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import INTERRUPTED, LOST, ConfigError, SpaceError, StageError, out_of_space
from dev2pro.escape import Record, lines, printable
from dev2pro.sweeps import jobs
from dev2pro.sweeps.sweep import Sweep
from dev2pro.training import distributed

C = TypeVar("C")
NO_SPACE = "no space is left where out= writes. Free some, or choose another out=, and run again."

# Hydra creates no folders and no log files: a stage writes only into out=.
PLAIN_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def main(name: str, schema: type[C], run: Callable[[C], Artifact | None]) -> None:
    """`python -m stages.<name> key=value ...`: composes conf/<name>.yaml, calls `run` with a `schema`, ends with its exit code."""
    gc.freeze()  # what was imported is never garbage; without this the process needs a second more to end
    gc.enable()
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    words, outcome = sys.argv[1:], list[int]()
    sweep: Sweep | None = None

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)
    def composed(values: DictConfig) -> None:
        def work() -> int:
            return _exit_code(name, lambda: run_and_publish(typed(schema, values), run))

        try:
            outcome.append(sweep.run(values, work) if sweep else work())
        except ConfigError as error:  # of the sweep: no other job is begun
            sys.exit(_fail(name, str(error), error.exit_code))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them; `explain` prints them
    try:
        if any(map(jobs.is_flag, words)):
            sys.argv[1:], sweep = _sweep(name, words, schema)
            outcome = [_run(sweep, composed)]
        else:
            sys.argv[1:] = [*PLAIN_HYDRA, *command_line.read(words, schema)]
            composed()
    except ConfigError as error:
        sys.exit(_fail(name, str(error), error.exit_code))
    except (HydraException, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
        sys.exit(_fail(name, explain(error, schema) + command_line.cure(words, schema), ConfigError.exit_code))
    if outcome:
        signals.nothing_left_to_stop(outcome[0])
        if outcome[0] == LOST:
            os._exit(LOST)  # threads of this rank may wait for one that is gone, and other ranks for the end of this one
    sys.exit(outcome[0] if outcome else 0)


def _sweep(name: str, words: list[str], schema: type) -> tuple[list[str], Sweep]:
    """A sweep, and its words for Hydra, which takes options only before all others."""
    read = command_line.read([word for word in words if not jobs.is_flag(word)], schema, sweep=True)
    return [jobs.FLAG, *PLAIN_HYDRA, "hydra.sweep.subdir=.", *read], Sweep(name, jobs.plan(read))


def _run(sweep: Sweep, composed: Callable[[], None]) -> int:
    """The exit code of a sweep: of the first job that failed, or that of a stop. Names the jobs that failed."""
    with TemporaryDirectory() as folder:  # Hydra writes into it what is in sweep.csv and in every job's record
        sys.argv.append(f"hydra.sweep.dir={folder}")
        try:
            composed()
        except KeyboardInterrupt:
            sweep.end()
            return _fail(sweep.stage, "the sweep was stopped. The same command goes on with the job that was running.", INTERRUPTED)
    return sweep.end()


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
    names = {name for key in allowed.keys(schema) for name in key.split(".")}
    near = difflib.get_close_matches(unknown[1], names, n=1) if unknown else []
    return f"{message}.{f' Did you mean {near[0]}?' if near else ''} `--cfg job` prints every key and its value, `--help` the groups."


def typed(schema: type[C], values: DictConfig) -> C:
    """The dataclass for a composed config. Raises ConfigError for a missing required value or an unknown key."""
    try:
        missing = sorted(OmegaConf.missing_keys(values))
        if missing:
            raise ConfigError(f"These values are required and were not given: {', '.join(missing)}. Add for example {missing[0]}=... to the command.")
        check_values(values)
        return OmegaConf.to_object(values)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise ConfigError(f"The configuration does not fit {schema.__name__}: {error}") from error


def check_values(values: DictConfig, above: str = "") -> None:
    """Raises ConfigError for numbers, names and paths that `dev2pro.allowed` excludes; writes out a home folder's ~."""
    for key, value in values.items():
        if isinstance(value, DictConfig):
            check_values(value, f"{above}{key!s}.")
            continue
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if (written_out := allowed.checked(f"{above}{key!s}", plain)) != plain:
            values[key] = written_out


def run_and_publish(config: Any, run: Callable[[Any], Artifact | None]) -> Artifact | None:
    """Runs the stage, pushes its artifact to the store of `config.publish` if there is one, and returns it; None if it was only planned."""
    store_url = getattr(config, "publish", None)
    if store_url:
        backends.parse_url(store_url)  # fails on a bad address before the run
    artifact = run(config)
    if artifact and store_url and not config.check and os.environ.get("RANK", "0") == "0":
        print(printable(f"published as {store.push(artifact.uri, store_url)}"), flush=True)
    return artifact


def checked(name: str, config: Any) -> Artifact | None:
    """The end of `check=true`: says on the first rank that nothing stands in the way of a run. There is no artifact."""
    if os.environ.get("RANK", "0") == "0":
        state = "a run goes on there" if run_folder.has_output(config.out) else "it is free"
        print(
            printable(f"{name}: what can be told without weights is in order, and so is out={config.out} ({state}). Nothing was written there."),
            flush=True,
        )
    return None


def _exit_code(name: str, run: Callable[[], Artifact | None]) -> int:
    signals.install_handlers()
    logging.setLogRecordFactory(Record)
    if not sys.stderr.isatty():  # a progress bar fills a log with lines
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        artifact = run()
        if artifact:
            print(printable(f"{name}: done, {artifact.uri}/artifact.json ({artifact.kind} {artifact.id[:12]})"), flush=True)
        return 0
    except KeyboardInterrupt:
        return _fail(name, "interrupted. The same command goes on from the last checkpoint, if there is one.", INTERRUPTED)
    except StageError as error:
        return _fail(name, str(error), error.exit_code)
    except Exception as error:
        if out_of_space(error):
            return _fail(name, NO_SPACE, SpaceError.exit_code)
        if distributed.lost_another_rank(error):
            return _fail(name, f"rank {os.environ['RANK']}: another rank ended or hangs; what went wrong is told there.", LOST)
        print(lines(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        return 1
    finally:
        run_folder.release()


def _fail(name: str, message: str, code: int) -> int:
    print(lines(f"{name}: {message}"), file=sys.stderr, flush=True)
    return code
