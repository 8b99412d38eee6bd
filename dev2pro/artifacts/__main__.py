"""The command `python -m dev2pro.artifacts`: show, verify and trace artifacts, push and pull them, and remove those that are not needed."""

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
from dev2pro.redact import redact_url

SHORT_ID = 12  # digits of an id in the output
RECURSION_LIMIT = 20_000  # calls: a recurring recovery has a generation every day; with 100,000 a deeply nested untrusted record ends the process
STYLES = {
    lineage.PRESENT: "green", lineage.PRUNED: "dim", lineage.CHANGED: "yellow", lineage.GONE: "red", lineage.UNREACHABLE: "red", lineage.NAMED: "dim",
}  # fmt: skip


def main() -> NoReturn:
    """Runs the command and exits with a code of errors.py. Prints errors as one paragraph."""
    options = _argument_parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = options.work(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _fail("interrupted. Nothing is half done; the same command goes on from there.", INTERRUPTED)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except StageError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:
        full = errors.out_of_space(error)
        cure = "Make room" if full else "Mend that, or choose another place"
        path = redact_url(str(error.filename or "a file"))
        code = _fail(f"{path}: {error.strerror or error}. {cure}, and run the same command again.", (SpaceError if full else ConfigError).exit_code)
    except Exception:
        print(lines(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        code = 1
    sys.exit(code)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(lines(f"artifact: {message}"), file=sys.stderr, flush=True)
    return code


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dev2pro.artifacts", description=__doc__.partition(": ")[2].capitalize(), allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work, description in (
        ("verify", verify_command, "Looks through every file, and parents as far as they lie here. Ends with 0 only if all is whole, else with 3."),
        ("show", show, "Tells what made an artifact, with which configuration, and what it holds."),
        ("lineage", tree, "Draws where an artifact comes from, back to the base and the data, and whether that is still there."),
        ("push", push, "Publishes an artifact in a store, a folder or s3://bucket/prefix, and prints its address."),
        ("pull", pull, f"Fetches an artifact from its address into {store.CACHE}, verified, and prints its folder."),
        ("prune", prune, "Removes an artifact's weights and checkpoints and keeps its record, so that what was made from it still has its past."),
        ("gc", gc_command, "Lists the finished artifacts that nothing kept was made from, and what they take up; removes them only with --delete."),
    ):
        command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
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


def _print(text: str = "") -> None:
    print(printable(text))


def _open_artifact(path: str) -> Artifact:
    """Reads the artifact in a folder, or its record alone in a store."""
    if not record.STORED.fullmatch(path):
        return record.read(path)
    if (artifact := store.read_record(path.rstrip("/"))) is None:
        raise ConfigError(f"{redact_url(path)} is no finished artifact: {record.RECORD} is missing. Correct the address.")
    return artifact


# ---- verify -------------------------------------------------------------------------------------------------------------------------


def verify_command(options: argparse.Namespace) -> int:
    """Prints one line for each problem: the requested artifacts first, then their ancestors, which may be pruned."""
    problems, seen = 0, set[str]()
    todo = deque((record.read(store.resolve(path)), "") for path in options.paths)
    while todo:
        artifact, why = todo.popleft()
        if os.path.realpath(artifact.uri) not in seen:
            seen.add(os.path.realpath(artifact.uri))
            count, parents = _verify(artifact, why)
            problems += count
            todo += [(p.artifact, f" ({p.role} of {artifact.uri})") for p in parents if p.artifact and "://" not in p.location]
    return DataError.exit_code if problems else 0


def _verify(artifact: Artifact, why: str) -> tuple[int, list[Parent]]:
    """Returns (problems, parents). `why` names the descendant of an ancestor; it is empty for a requested artifact."""
    pruned = record.pruned(artifact.uri) if why else frozenset()
    problems = list(verify.find_problems(artifact, without=pruned))
    parents = list(lineage.parents(artifact))
    for parent in parents:
        if parent.state == lineage.CHANGED:
            problems.append(
                f"{artifact.uri}: its {parent.role}, {parent.uri}, changed: {parent.id[:SHORT_ID]} lies there no more. Bring it back, or pull it."
            )
        elif parent.state not in (lineage.PRESENT, lineage.PRUNED):
            _print(f"{artifact.uri}: its {parent.role}, {parent.uri}, is {parent.state}, and was not looked at.")
    for problem in problems:
        _print(problem)
    untracked = verify.untracked_files(artifact)
    if untracked:
        _print(f"{artifact.uri}: {len(untracked)} files are there that are no part of it ({', '.join(untracked[:5])}).")
    if not problems:
        sizes = [entry["bytes"] for entry in artifact.files if entry["path"] not in pruned]
        how = f"whole but for {len(artifact.files) - len(sizes)} files that were removed to make room" if pruned else "whole"
        _print(f"{artifact.uri}: {how}, {artifact.kind} {artifact.id[:SHORT_ID]}, {len(sizes)} files, {_human_size(sum(sizes))}{why}")
    return len(problems), parents


# ---- show ---------------------------------------------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> int:
    """Prints the record as text."""
    artifact = _open_artifact(options.path)
    facts = {
        "kind": artifact.kind, "stage": artifact.stage, "id": artifact.id, "where": redact_url(artifact.uri), "created": artifact.created,
        "steps": artifact.step, "git revision": artifact.git_revision, "command": f"python -m stages.{artifact.stage} {shlex.join(artifact.command)}",
        "packages": ", ".join(f"{name} {version}" for name, version in artifact.packages.items()),
    }  # fmt: skip
    for name, value in facts.items():
        _print(f"{name:<14}{value}")
    _print_section("made from", [f"{p['role']:<14}{p['id'][:SHORT_ID]}  {redact_url(p['uri'])}" for p in artifact.parents])
    _print_section("how to use it", _yaml(artifact.inference))
    _print_section("configuration", _yaml(artifact.config))
    _print_section("metrics", _yaml(_summarize(artifact.metrics)))
    width = max((len(f"{entry['bytes']:,}") for entry in artifact.files), default=0)
    _print_section(f"files, {_human_size(sum(f['bytes'] for f in artifact.files))}", [f"{f['bytes']:>{width},}  {f['path']}" for f in artifact.files])
    return 0


def _print_section(title: str, lines: list[str]) -> None:
    if lines:
        _print()
        _print(title)
        for line in lines:
            _print(f"  {line}")


def _yaml(values: Any) -> list[str]:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000).splitlines() if values else []


def _summarize(metrics: dict[str, Any]) -> dict[str, Any]:
    """Shortens metrics: of a list the last item and the length; numbers with five significant digits."""
    return {name: _shorten(value) for name, value in metrics.items()}


def _shorten(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {name: _shorten(inner) for name, inner in value.items()}
        case [*_, last] if len(value) > 3 or isinstance(last, dict):
            return {f"the last of {len(value)}": _shorten(last)}
        case list():
            return [_shorten(inner) for inner in value]
    return value


def _human_size(bytes_: int) -> str:
    return next((f"{bytes_ / scale:.3g} {unit}" for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if bytes_ >= scale), f"{bytes_} bytes")


# ---- lineage ------------------------------------------------------------------------------------------------------------------------


def tree(options: argparse.Namespace) -> int:
    """Draws the lineage with rich; without colours if stdout is no terminal."""
    artifact = _open_artifact(options.path)
    root = Tree(_label((f"{artifact.kind} {artifact.id[:SHORT_ID]}", "bold"), (f"  {redact_url(artifact.uri)}", "")))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    try:
        _add_parents(root, artifact, {artifact.id})
    finally:
        sys.setrecursionlimit(limit)
    drawn = io.StringIO()
    terminal = sys.stdout.isatty()
    Console(file=drawn, force_terminal=terminal, width=None if terminal else 10_000, highlight=False).print(root, soft_wrap=True)
    print("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))
    return 0


def _add_parents(node: Tree, artifact: Artifact, drawn: set[str]) -> None:
    """Adds the parents below `node`. Names a parent that is already drawn without expanding it again, so cycles end."""
    for path, state in lineage.changed_inputs(artifact):
        node.add(_label(("watched  ", ""), (state, STYLES[state]), (f"  {redact_url(path)}", "")))
    for parent in lineage.parents(artifact):
        kind = f"{parent.artifact.kind} " if parent.artifact else ""
        moved = f" (was {redact_url(parent.uri)})" if parent.location != parent.uri else ""
        id = parent.id[:SHORT_ID] if record.HASH.fullmatch(parent.id) else ""
        again = parent.artifact is not None and parent.id in drawn
        label = _label(
            (f"{parent.role}  ", ""), (f"{kind}{id}".strip(), "bold"), ("  " if id else "", ""), (parent.state, STYLES[parent.state]),
            (f"  {redact_url(parent.location)}{moved}{'  (see above)' if again else ''}", ""),
        )  # fmt: skip
        branch = node.add(label)
        if parent.artifact and not again:
            drawn.add(parent.id)
            _add_parents(branch, parent.artifact, drawn)


def _label(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*((printable(text), style) for text, style in parts))


# ---- stores -------------------------------------------------------------------------------------------------------------------------


def push(options: argparse.Namespace) -> int:
    """Prints the URL to stdout and progress to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        url = store.push(options.path, options.store)
    _print(url)
    return 0


def pull(options: argparse.Namespace) -> int:
    """Prints the folder to stdout and progress to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        folder = store.pull(options.path)
    _print(folder)
    return 0


def prune(options: argparse.Namespace) -> int:
    """Prints a line for each artifact."""
    needed = gc.needed(options.runs)
    for path in options.paths:
        artifact = record.read(path)
        freed, why = (0, "an unfinished run was given it") if needed(artifact) else gc.prune(artifact)
        _print(f"{redact_url(artifact.uri)}: {f'left as it is: {why}' if why else f'{_human_size(freed)} removed; its record stays'}")
    return 0


def gc_command(options: argparse.Namespace) -> int:
    """Prints a line for each artifact that is not needed."""
    plan = gc.plan_gc(options.folders, options.keep)
    for note in dict.fromkeys(plan.notes):
        _print(f"note: {note}")
    freed, word = 0, "removed" if options.delete else "unneeded"
    for artifact in plan.unneeded:
        freed += (size := gc.bytes_of(artifact))
        rest = gc.remove(artifact) if options.delete else []
        _print(f"{word:<9} {artifact.id[:SHORT_ID]}  {artifact.kind:<12} {_human_size(size):>9}  {redact_url(artifact.uri)}")
        if rest:
            _print(f"          still there, as no part of it: {', '.join(rest[:3])}{f' and {len(rest) - 3} more' if len(rest) > 3 else ''}")
    _print(f"{len(plan.unneeded)} {word}, {_human_size(freed)}; {len(plan.kept)} kept, or needed by what is kept")
    if plan.unneeded and not options.delete:
        _print("Nothing was removed. The same command with --delete does it.")
    return 0


if __name__ == "__main__":
    main()
