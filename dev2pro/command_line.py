"""The words of a stage's command. Hydra's grammar has meanings for `=`, `(`, `#`, commas and more, which paths have as letters.

A word `key=value` of a text is taken as it stands, and one of a list of texts is cut at commas, unless it names what exists. What is
quoted in Hydra's way, `null`, `${...}` and everything that is no text is Hydra's.
"""

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from dev2pro import allowed, patterns
from dev2pro.errors import ConfigError

WORD = re.compile(r"(\+{0,2}([A-Za-z_][\w.]*)=)(.*)", re.DOTALL)  # key= and value
FUNCTION = re.compile(r"(choice|shuffle|sort|range|glob)\(.*\)", re.DOTALL)  # of Hydra's sweeps
FAILED = object()  # to parse, or several values at once


def quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever it holds."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # OmegaConf's escape: no text is an interpolation
    return QuotedString(literal, Quote.single).with_quotes()


def read(words: Sequence[str], schema: type, sweep: bool = False) -> list[str]:
    """The words as Hydra is to read them, for a schema. Raises ConfigError for a list that can be read in two ways.

    In a sweep the commas of a text part the values that it has one after the other, and so do those between lists in brackets.
    """
    keys = allowed.keys(schema)
    return [_read(word, keys, sweep) for word in words]


def _read(word: str, keys: dict[str, Any], sweep: bool) -> str:
    match = WORD.fullmatch(word)
    if not match or not match[3] or keys.get(match[2]) not in (str, list[str]):
        return word
    start, key, value = match.groups()
    if sweep and FUNCTION.fullmatch(value):
        return word
    return start + ",".join(_one(key, one, keys[key]) for one in (_swept(value, keys[key]) if sweep else [value]))


def _one(key: str, value: str, kind: Any) -> str:
    return _text(value, allowed.is_one_of(key, allowed.PATHS)) if kind is str else _texts(key, value)


def _swept(value: str, kind: Any) -> list[str]:
    """The values of a text, or of a list, that a sweep goes through."""
    if os.path.lexists(value):
        return [value]
    if kind is str:
        return _grouped(_pieces(value))
    pieces = [piece.strip() for piece in _pieces(value)]
    return pieces if all(piece.startswith("[") and piece.endswith("]") for piece in pieces) else [value]


def _parsed(value: str) -> Any:
    """What Hydra reads, or FAILED."""
    try:
        override = OverridesParser.create().parse_override(f"x={value}")
        return FAILED if override.is_sweep_override() else override.value()
    except (HydraException, ValueError, RecursionError):
        return FAILED


def _text(value: str, is_path: bool) -> str:
    parsed = _parsed(value)
    if _is_quoted(value, parsed):
        return value
    if is_path and os.path.lexists(value):
        return value if parsed == value else quoted(value)
    is_hydra_s = parsed is None or isinstance(parsed, dict | list) or "${" in value or (isinstance(parsed, str) and "\\" in value)
    return value if is_hydra_s or parsed == value else quoted(value)


def _texts(key: str, value: str) -> str:
    parsed = _parsed(value)
    if _is_quoted(value, parsed):
        return f"[{value}]"
    bracketed = value.startswith("[") and value.endswith("]")
    pieces = _pieces(value[1:-1] if bracketed else value)
    single, grouped = [_unquoted(_bare(piece)) for piece in pieces], [_unquoted(piece) for piece in _grouped(pieces)]
    readings = [[value]] if os.path.lexists(value) else []
    for reading in (grouped, single):
        if reading not in readings and all("://" in one or patterns.matches(one) for one in reading):
            readings.append(reading)
    if len(readings) > 1:
        words = " or ".join(shlex.quote(f"{key}={_as_list(reading)}") for reading in readings)
        raise ConfigError(f"{key}={value} can be read in {len(readings)} ways, all of which exist. Type {words}.")
    is_hydra_s = parsed is None or isinstance(parsed, dict) or parsed == [] or "${" in value or (isinstance(parsed, list) and "\\" in value)
    if not readings and is_hydra_s:
        return value
    reading = readings[0] if readings else grouped if bracketed else [value]
    return value if parsed == reading else _as_list(reading)


def _as_list(texts: Sequence[str]) -> str:
    return f"[{','.join(map(quoted, texts))}]"


def _bare(piece: str) -> str:
    """Without the spaces around it, unless they are of a name that exists."""
    return piece if os.path.lexists(piece) else piece.strip()


def _unquoted(piece: str) -> str:
    parsed = _parsed(piece)
    return parsed if _is_quoted(piece, parsed) else piece


def _is_quoted(value: str, parsed: Any) -> bool:
    return value[:1] in ("'", '"') and isinstance(parsed, str)


def _pieces(text: str) -> list[str]:
    """The text cut at commas, outside of quotes and of brackets that are closed again."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            pieces.append("")
            continue
        if quote:
            quote = "" if letter == quote and not pieces[-1].endswith("\\") else quote
        elif letter in "'\"" and not pieces[-1].strip():
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        pieces[-1] += letter
    return pieces if not depth and not quote else text.split(",")


def _grouped(pieces: Sequence[str]) -> list[str]:
    """The pieces, put together again where a path that exists has a comma in its name."""
    grouped, first = [], 0
    while first < len(pieces):
        ends = range(len(pieces), first + 1, -1)
        end = next((end for end in ends if os.path.lexists(_bare(",".join(pieces[first:end])))), first + 1)
        grouped.append(_bare(",".join(pieces[first:end])))
        first = end
    return grouped


def cure(words: Sequence[str], schema: type) -> str:
    """What to type instead of words that Hydra cannot read: a sentence, or nothing."""
    keys, whole = allowed.keys(schema), list[str]()
    for word in words:
        stray = "=" not in word and not word.startswith("-")
        if stray and whole:  # the shell cut it at a space
            whole[-1] += f" {word}"
        else:
            whole.append(word)
    for word in whole:
        match = WORD.fullmatch(word)
        if match and keys.get(match[2]) in (str, list[str]) and ("${" in word or word not in words):
            start, key, value = match.groups()
            exact = word if word not in words else start + (quoted(value) if keys[key] is str else _as_list([value]))
            return f" If {value} is what it names, type {shlex.quote(exact)}."
    return ""
