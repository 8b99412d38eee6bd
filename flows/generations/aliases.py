"""Aliases of recovered models: `latest` and `best` of the recurring recovery, each a small file that names an artifact."""

import re
from pathlib import Path

from dev2pro.artifacts import record
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError

LINE = "main"  # the default line of recovered models
NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"  # of a line
ALIASES = ("latest", "best")
ALIAS = re.compile(rf"(?:({NAME}):)?({'|'.join(ALIASES)})")  # latest, best, or line:latest


def line_folder(line: str) -> Path:
    """The folder of a line of recovered models."""
    return ROOT / "runs" / "recurring" / line


def promote(line: str, alias: str, uri: str, id: str) -> None:
    """Points `alias` at the artifact, atomically."""
    record.write_json(line_folder(line) / f"{alias}.json", {"uri": uri, "id": id})


def target(line: str, alias: str) -> str | None:
    """The folder of the artifact that the alias names, as a path below the root, or None if nothing was promoted yet."""
    file = line_folder(line) / f"{alias}.json"
    return str(record.read_json(file)["uri"]) if file.is_file() else None


def resolve(base: str) -> str:
    """The target of an alias; any other path or URL unchanged. Raises ConfigError for an alias without a model."""
    if not (match := ALIAS.fullmatch(base)):
        return base
    line, alias = match[1] or LINE, match[2]
    if (uri := target(line, alias)) is None:
        raise ConfigError(
            f"{base} names no model yet: nothing was promoted in {line_folder(line)}. Let the recurring recovery run first, or give a folder."
        )
    return uri
