"""The command `python -m dev2pro.artifacts`: what an artifact is, where it comes from, whether it is whole; stores; and what may go."""

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
import traceback
from collections import deque
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from dev2pro import errors
from dev2pro.artifacts import gc, lineage, record, store, verify
from dev2pro.artifacts.lineage import Parent
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import INTERRUPTED, ConfigError, DataError, SpaceError, StageError
from dev2pro.escape import lines, printable
from dev2pro.s3 import redact_url

SHORT = 12  # digits of an id that are shown
DEEPEST = 20_000  # calls: a recurring recovery has a generation every day; with 100,000 a deeply nested record of others ends the process
STYLES = {
    lineage.THERE: "green", lineage.PRUNED: "dim", lineage.CHANGED: "yellow", lineage.GONE: "red", lineage.AWAY: "red", lineage.NAMED: "dim",
}  # fmt: skip


def main() -> NoReturn:
    """Does what the command says and ends with an exit code of errors.py; what went wrong is told in one paragraph."""
    options = _words().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = options.work(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _fail("interrupted. Nothing is half done; the same command goes on from there.", INTERRUPTED)
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except StageError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:
        full = errors.out_of_space(error)
        cure = "Make room" if full else "Mend that, or choose another place"
        where = redact_url(str(error.filename or "a file"))
        code = _fail(f"{where}: {error.strerror or error}. {cure}, and run the same command again.", (SpaceError if full else ConfigError).exit_code)
    except Exception:
        print(lines(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        code = 1
    sys.exit(code)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(lines(f"artifact: {message}"), file=sys.stderr, flush=True)
    return code


def _words() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dev2pro.artifacts", description=__doc__.partition(": ")[2].capitalize(), allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work, story in (
        ("verify", verify_command, "Looks through every file, and parents as far as they lie here. Ends with 0 only if all is whole, else with 3."),
        ("show", show, "Tells what made an artifact, with which configuration, and what it holds."),
        ("lineage", tree, "Draws where an artifact comes from, back to the base and the data, and whether that is still there."),
        ("push", push, "Publishes an artifact in a store, a folder or s3://bucket/prefix, and prints its address."),
        ("pull", pull, f"Fetches an artifact from its address into {store.CACHE}, verified, and prints its folder."),
        ("prune", prune, "Removes an artifact's weights and checkpoints and keeps its record, so that what was made from it still has its past."),
        ("gc", gc_command, "Lists the finished artifacts that nothing kept was made from, and what they take up; removes them only with --delete."),
    ):
        command = commands.add_parser(name, help=story, description=story, allow_abbrev=False)
        command.set_defaults(work=work)
        if name in ("verify", "prune"):
            command.add_argument("paths", nargs="+", metavar="PATH", help="an artifact's folder")
            if name == "prune":
                command.add_argument("--runs", nargs="+", default=[], metavar="FOLDER", help="what unfinished runs in it were given stays whole")
        elif name == "gc":
            command.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder with artifacts in it, however deep, or a store")
            command.add_argument(
                "--keep", nargs="+", required=True, metavar="PATH", help="an artifact, or a folder or store all of whose artifacts stay"
            )
            command.add_argument("--delete", action="store_true", help="remove what is listed")
        else:
            command.add_argument("path", metavar="URL" if name == "pull" else "PATH", help="an artifact's folder, or its address in a store")
        if name == "push":
            command.add_argument("store", metavar="STORE", help="a folder, or s3://bucket/prefix")
    return parser


def _say(text: str = "") -> None:
    print(printable(text))


def _opened(path: str) -> Artifact:
    """The artifact in a folder or, without its files, in a store."""
    if not record.STORED.fullmatch(path):
        return record.read(path)
    if (made := store.read_record(path.rstrip("/"))) is None:
        raise ConfigError(f"{redact_url(path)} is no finished artifact: {record.RECORD} is missing. Correct the address.")
    return made


# ---- verify -------------------------------------------------------------------------------------------------------------------------


def verify_command(options: argparse.Namespace) -> int:
    """One line for each problem; what was asked for first, then ancestors, which may have been pruned."""
    problems, seen = 0, set[str]()
    todo = deque((record.read(store.resolve(path)), "") for path in options.paths)
    while todo:
        made, why = todo.popleft()
        if os.path.realpath(made.uri) not in seen:
            seen.add(os.path.realpath(made.uri))
            found, above = _verify(made, why)
            problems += found
            todo += [(parent.made, f" ({parent.role} of {made.uri})") for parent in above if parent.made and "://" not in parent.place]
    return DataError.exit_code if problems else 0


def _verify(made: Artifact, why: str) -> tuple[int, list[Parent]]:
    """(problems, parents). `why` an ancestor is looked at, too."""
    pruned = record.pruned(made.uri) if why else frozenset()
    problems = list(verify.find_problems(made, without=pruned))
    parents = list(lineage.parents(made))
    for parent in parents:
        if parent.state == lineage.CHANGED:
            problems.append(
                f"{made.uri}: its {parent.role}, {parent.uri}, changed: {parent.id[:SHORT]} lies there no more. Bring it back, or pull it."
            )
        elif parent.state not in (lineage.THERE, lineage.PRUNED):
            _say(f"{made.uri}: its {parent.role}, {parent.uri}, is {parent.state}, and was not looked at.")
    for problem in problems:
        _say(problem)
    strangers = verify.untracked_files(made)
    if strangers:
        _say(f"{made.uri}: {len(strangers)} files are there that are no part of it ({', '.join(strangers[:5])}).")
    if not problems:
        left = [one["bytes"] for one in made.files if one["path"] not in pruned]
        how = f"whole but for {len(made.files) - len(left)} files that were removed to make room" if pruned else "whole"
        _say(f"{made.uri}: {how}, {made.kind} {made.id[:SHORT]}, {len(left)} files, {_size(sum(left))}{why}")
    return len(problems), parents


# ---- show ---------------------------------------------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> int:
    """The record for people."""
    made = _opened(options.path)
    facts = {
        "kind": made.kind, "stage": made.stage, "id": made.id, "where": redact_url(made.uri), "created": made.created, "steps": made.step,
        "git revision": made.git_revision, "command": f"python -m stages.{made.stage} {shlex.join(made.command)}",
        "packages": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
    }  # fmt: skip
    for name, value in facts.items():
        _say(f"{name:<14}{value}")
    _part("made from", [f"{p['role']:<14}{p['id'][:SHORT]}  {redact_url(p['uri'])}" for p in made.parents])
    _part("how to use it", _yaml(made.inference))
    _part("configuration", _yaml(made.config))
    _part("metrics", _yaml(_of_interest(made.metrics)))
    width = max((len(f"{one['bytes']:,}") for one in made.files), default=0)
    _part(f"files, {_size(sum(one['bytes'] for one in made.files))}", [f"{one['bytes']:>{width},}  {one['path']}" for one in made.files])
    return 0


def _part(title: str, lines: list[str]) -> None:
    if lines:
        _say()
        _say(title)
        for line in lines:
            _say(f"  {line}")


def _yaml(values: Any) -> list[str]:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000).splitlines() if values else []


def _of_interest(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what is one of many: of a list, the last, and how many there are; numbers as long as they say something."""
    return {name: _shorter(value) for name, value in metrics.items()}


def _shorter(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {name: _shorter(inner) for name, inner in value.items()}
        case [*_, last] if len(value) > 3 or isinstance(last, dict):
            return {f"the last of {len(value)}": _shorter(last)}
        case list():
            return [_shorter(inner) for inner in value]
    return value


def _size(bytes_: int) -> str:
    return next((f"{bytes_ / scale:.3g} {unit}" for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if bytes_ >= scale), f"{bytes_} bytes")


# ---- lineage ------------------------------------------------------------------------------------------------------------------------


def tree(options: argparse.Namespace) -> int:
    """Drawn with rich; without colours where nobody looks."""
    made = _opened(options.path)
    root = Tree(_label((f"{made.kind} {made.id[:SHORT]}", "bold"), (f"  {redact_url(made.uri)}", "")))
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(DEEPEST)
    try:
        _grow(root, made, {made.id})
    finally:
        sys.setrecursionlimit(usual)
    drawn = io.StringIO()
    terminal = sys.stdout.isatty()
    Console(file=drawn, force_terminal=terminal, width=None if terminal else 10_000, highlight=False).print(root, soft_wrap=True)
    print("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))
    return 0


def _grow(node: Tree, made: Artifact, drawn: set[str]) -> None:
    """A parent that was drawn before is named and not drawn again, and so a circle has an end."""
    for path, state in lineage.watched(made):
        node.add(_label(("watched  ", ""), (state, STYLES[state]), (f"  {redact_url(path)}", "")))
    for parent in lineage.parents(made):
        kind = f"{parent.made.kind} " if parent.made else ""
        moved = f" (was {redact_url(parent.uri)})" if parent.place != parent.uri else ""
        id = parent.id[:SHORT] if record.HASH.fullmatch(parent.id) else ""
        again = parent.made is not None and parent.id in drawn
        label = _label(
            (f"{parent.role}  ", ""), (f"{kind}{id}".strip(), "bold"), ("  " if id else "", ""), (parent.state, STYLES[parent.state]),
            (f"  {redact_url(parent.place)}{moved}{'  (see above)' if again else ''}", ""),
        )  # fmt: skip
        branch = node.add(label)
        if parent.made and not again:
            drawn.add(parent.id)
            _grow(branch, parent.made, drawn)


def _label(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*((printable(text), style) for text, style in parts))


# ---- stores -------------------------------------------------------------------------------------------------------------------------


def push(options: argparse.Namespace) -> int:
    """The address goes to stdout, progress to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        address = store.push(options.path, options.store)
    _say(address)
    return 0


def pull(options: argparse.Namespace) -> int:
    """The folder goes to stdout, progress to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        folder = store.pull(options.path)
    _say(folder)
    return 0


def prune(options: argparse.Namespace) -> int:
    """A line for each artifact."""
    needed = gc.needed(options.runs)
    for path in options.paths:
        made = record.read(path)
        freed, why = (0, "an unfinished run was given it") if needed(made) else gc.prune(made)
        _say(f"{redact_url(made.uri)}: {f'left as it is: {why}' if why else f'{_size(freed)} removed; its record stays'}")
    return 0


def gc_command(options: argparse.Namespace) -> int:
    """A line for each artifact that may go."""
    found = gc.plan_gc(options.folders, options.keep)
    for note in dict.fromkeys(found.notes):
        _say(f"note: {note}")
    freed, word = 0, "removed" if options.delete else "unneeded"
    for made in found.unneeded:
        freed += (size := gc.bytes_of(made))
        left = gc.remove(made) if options.delete else []
        _say(f"{word:<9} {made.id[:SHORT]}  {made.kind:<12} {_size(size):>9}  {redact_url(made.uri)}")
        if left:
            _say(f"          still there, as no part of it: {', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}")
    _say(f"{len(found.unneeded)} {word}, {_size(freed)}; {len(found.kept)} kept, or needed by what is kept")
    if found.unneeded and not options.delete:
        _say("Nothing was removed. The same command with --delete does it.")
    return 0


if __name__ == "__main__":
    main()
