"""Shared frame of the data commands: parses arguments, shows progress and tables, sets exit codes."""

import argparse
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dev2pro import signals
from dev2pro.errors import INTERRUPTED, DataError, SpaceError, StageError, TryAgainError
from dev2pro.escape import lines, printable
from dev2pro.redact import redact_url

LINE_EVERY = 15.0  # seconds, where the output is no terminal


def make_parser(module: str, story: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m <module>` whose --help shows the command's description."""
    return argparse.ArgumentParser(f"python -m {module}", description=story, allow_abbrev=False)


def cores() -> int:
    """The number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0))


def positive(text: str) -> int:
    """The type of options that count something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run(name: str, parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int]) -> NoReturn:
    """Runs `work` and exits with its code. Prints an error as one paragraph."""
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    signals.stop_with_parent()  # stops when the parent flow dies
    try:
        sys.exit(work(options))
    except KeyboardInterrupt:
        print(f"{name}: interrupted. Nothing is half done; run the same command again.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "Make room" if full else "Mend that, or choose another place"
        print(
            lines(f"{name}: {redact_url(str(error.filename or 'a file'))}: {error.strerror or error}. {cure} and run the same command again."),
            file=sys.stderr,
        )
        sys.exit(SpaceError.exit_code if full else DataError.exit_code)
    except StageError as error:
        print(lines(f"{name}: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        print(lines(traceback.format_exc()), file=sys.stderr, end="")
        sys.exit(1)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def processes(workers: int, initializer: Callable[..., None] = lambda: None, initargs: tuple = ()) -> Iterator[ProcessPoolExecutor]:
    """A process pool. Its workers are terminated when the body raises or this process is killed."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(initializer, *initargs))
    try:
        yield pool
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - set(others):
            child.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise TryAgainError("A worker process was killed, perhaps because memory ran out. Run the command again with fewer --workers.") from error
        raise
    pool.shutdown()


def _start_worker(initializer: Callable[..., None], *initargs: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    initializer(*initargs)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function that advances the progress by one of `total`: a bar on a terminal, periodic lines otherwise."""
    done, last_line = 0, time.monotonic()

    def line() -> None:
        nonlocal done, last_line
        done += 1
        if time.monotonic() - last_line > LINE_EVERY:
            last_line = time.monotonic()
            print(f"{what}: {done}/{total}", flush=True)

    if not sys.stdout.isatty():
        yield line
        return
    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], most: int) -> None:
    """The first `most` rows, if there are any: a table on a terminal, lines with tabs elsewhere. Values are shown as they are, without markup."""
    if not rows:
        return
    title = f"{title}: {len(rows)}" + (f", the first {most}" if len(rows) > most else "")
    if not sys.stdout.isatty():
        print("\n".join([title, *("\t".join(printable(str(value)) for value in row) for row in rows[:most])]), flush=True)
        return
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows[:most]:
        table.add_row(*(Text(printable(str(value))) for value in row))
    Console().print(table)
