"""The frame around the room's commands: words in, progress and tables for people, exit codes out."""

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

from data.storage import urls
from dev2pro import signals
from dev2pro.errors import INTERRUPTED, DataError, SpaceError, StageError, TryAgainError
from dev2pro.escape import lines, printable

LINE_EVERY = 15.0  # seconds, where the output is no terminal


def parser(module: str, story: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m <module>` that tells the command's story under --help."""
    return argparse.ArgumentParser(f"python -m {module}", description=story, allow_abbrev=False)


def cores() -> int:
    """How many processes this one may fill."""
    return len(os.sched_getaffinity(0))


def positive(text: str) -> int:
    """The type of options that count something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run(name: str, words: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int]) -> NoReturn:
    """Does the work and ends with its exit code; what went wrong is told in one paragraph."""
    options = words.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    signals.stop_with_parent()  # a flow that started it
    try:
        sys.exit(work(options))
    except KeyboardInterrupt:
        print(f"{name}: interrupted. Nothing is half done; run the same command again.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "Make room" if full else "Mend that, or choose another place"
        print(
            lines(f"{name}: {urls.redact_url(str(error.filename or 'a file'))}: {error.strerror or error}. {cure} and run the same command again."),
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
    """A pool of processes that ends at once when the work within is interrupted or goes wrong, and when this process is killed."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(initializer, *initargs))
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


def _begin(initializer: Callable[..., None], *initargs: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it as well
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Within, every call of what it gives is one step of `total`: a bar on a terminal, a line now and then elsewhere."""
    done, said = 0, time.monotonic()

    def line() -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() - said > LINE_EVERY:
            said = time.monotonic()
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
