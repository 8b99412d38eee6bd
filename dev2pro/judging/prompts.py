"""Reads a file of prompts in the shapes that people have, and refuses what would be sampled otherwise than it was meant."""

import codecs
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dev2pro.errors import ConfigError
from dev2pro.escape import printable

LARGEST = 16 << 20  # bytes
LONGEST = 60  # characters of a prompt or key that a message quotes
TABLES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx", ".docx", ".rtf", ".odt", ".pdf", ".zip", ".gz")
PROMPT = ("prompt", "text", "caption")  # keys of an object that is one prompt
LABELS = frozenset({"id", "name", "index", "category", "challenge", "source", "note", "comment", "tags"})  # beside it, and not sampled
MARKS = (  # longest first: the UTF-32 one begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
OPTION = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=[\s=:]|$)")  # as kohya's prompt files and Midjourney have them
NETWORK = re.compile(r"<(lora|lyco|hypernet):", re.IGNORECASE)
WEIGHT = re.compile(r"[(\[][^()\[\]]+:\d+(\.\d+)?[)\]]")
HALF = re.compile(r"[\ud800-\udfff]")
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd]")
SHAPES = (
    "Give a text file with one prompt a line, or JSON: a list whose entries are a prompt, a list of wordings of one prompt, or an object with "
    'a "prompt"; or an object of such entries under names, or under "prompts".'
)

Group = tuple[str, list[Any]]  # where it was found, and its wordings


def read_prompts(path: str, least: int = 2) -> list[list[str]]:
    """Prompts grouped by meaning, each group the wordings of one; as they were written, spaces included. `least`: how many groups are needed.

    From JSON or JSON Lines by the file's ending, else from a text file with one a line. Tells on stderr what is left out. Raises ConfigError,
    naming line or entry, for anything that would be sampled otherwise than it was meant.
    """
    text = _decode(path)
    ending = Path(path).suffix.lower()
    if ending in TABLES:
        raise _refusal(path, f"{ending} files are not read")
    if ending == ".json":
        found = list(_of_json(path, _json(path, "the file", text)))
    elif ending in (".jsonl", ".ndjson"):
        lines = [(f"line {number}", line) for number, line in _lines(text) if line.strip()]
        found = [group for where, line in lines for group in _entry(path, where, _json(path, where, line))]
    else:
        found = list(_of_text(path, text))
    groups = [(where, [_checked(path, where, wording) for wording in wordings]) for where, wordings in found]
    _tell_apart(path, groups, least)
    if weighted := [where for where, wordings in groups if any(map(WEIGHT.search, wordings))]:
        _notice(f"prompts={path}: the weights in brackets of {_some(weighted)} are read as the characters they are")
    return [wordings for _, wordings in groups]


def _refusal(path: str, reason: str, cure: str = SHAPES) -> ConfigError:
    return ConfigError(f"prompts={path} cannot be read ({reason}). {cure}")


def _notice(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr, flush=True)


# ---- from bytes to entries -----------------------------------------------------------------------------------------------------------


def _decode(path: str) -> str:
    """A file's text, in UTF-8 or as its byte order mark says."""
    try:
        if Path(path).is_dir():
            raise _refusal(path, "it is a folder")
        if not Path(path).is_file():
            raise _refusal(path, "there is no such file")
        if (size := Path(path).stat().st_size) > LARGEST:
            raise _refusal(path, f"it has {size:,} bytes, and every prompt is sampled in every cell", f"Give at most {LARGEST:,} bytes.")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise _refusal(path, str(error)) from error
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        wrong = f"byte 0x{content[error.start]:02x} in line {line} is no {encoding.removesuffix('-sig').upper()}"
        raise _refusal(path, f"{wrong}; it may be Windows-1252 or Latin-1", "Save it as UTF-8.") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)


def _of_text(path: str, text: str) -> Iterator[Group]:
    """One prompt a line; lines that begin with # are comments, as in kohya's files."""
    if text.count("\0") > len(text) / 4:
        raise _refusal(path, "it holds NUL characters, as UTF-16 without a byte order mark does", "Save it as UTF-8.")
    comments = []
    for number, line in _lines(text):
        if line.lstrip().startswith("#"):
            comments.append(f"line {number}")
        elif line.strip():
            if line.lstrip()[0] in "[{" and _is_json(text if number == 1 else line):
                raise _refusal(path, f"line {number} is JSON", "Call the file .json, or .jsonl if every line is an entry of its own.")
            yield f"line {number}", [line]
    if comments:
        _notice(
            f"prompts={path}: {_some(comments)} left out: a line that begins with # is a comment. A prompt that does can be given in a .json file"
        )


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False


def _json(path: str, where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(path, where, pairs))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"{where} is no JSON ({error})") from error


def _object(path: str, where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _refusal(path, f"{where} holds the name {_quoted(twice)} twice in one object", "Leave one out, or give a list.")
    return dict(pairs)


def _of_json(path: str, value: Any) -> Iterator[Group]:
    if isinstance(value, dict) and "prompts" in value and not set(value) & set(PROMPT):
        _only_labels(path, "the file", {name: inner for name, inner in value.items() if name != "prompts"})
        value = value["prompts"]
    if isinstance(value, list):
        for number, entry in enumerate(value, 1):
            yield from _entry(path, f"entry {number}", entry)
    elif isinstance(value, dict) and not set(value) & set(PROMPT):
        if value:
            _notice(f"prompts={path}: the {len(value)} names of its object are not sampled, only what stands under them")
        for name, entry in value.items():
            yield from _entry(path, f"entry {_quoted(name)}", entry)
    else:
        yield from _entry(path, "the file", value)


def _entry(path: str, where: str, value: Any) -> Iterator[Group]:
    """One group: a prompt, a list of its wordings, or an object with either."""
    if isinstance(value, dict):
        keys = [key for key in PROMPT if key in value]
        if len(keys) != 1:
            raise _refusal(path, f"{where} is an object with {' and '.join(keys) or 'none of ' + ', '.join(PROMPT)}")
        _only_labels(path, where, {name: inner for name, inner in value.items() if name != keys[0]})
        value = value[keys[0]]
    yield where, value if isinstance(value, list) else [value]


def _only_labels(path: str, where: str, others: dict[str, Any]) -> None:
    """Raises ConfigError for values beside a prompt that would have to change how it is sampled; labels are not sampled."""
    if setting := next((name for name in others if name not in LABELS), None):
        raise _refusal(
            path, f"{where} holds {_quoted(setting)} beside its prompt", "Leave it out: all prompts are sampled alike, by the configuration."
        )


# ---- what a prompt may be -----------------------------------------------------------------------------------------------------------


def _checked(path: str, where: str, value: Any) -> str:
    """A prompt. Raises ConfigError for anything that is none."""
    if not isinstance(value, str):
        kinds = {bool: "true or false", type(None): "null", list: "a list in a list", dict: "an object in a list of wordings"}
        raise _refusal(path, f"{where} is {kinds.get(type(value), 'a number')} where a prompt should be")
    if HALF.search(value):
        raise _refusal(path, f"{where} holds half of a surrogate pair, which is no character", "Write the character itself.")
    if hidden := HIDDEN.search(value):
        code = ord(hidden[0])
        what = {0xFFFD: ", the mark of a character that was lost", 0xFEFF: ", a byte order mark inside the text"}.get(code, "")
        raise _refusal(path, f"{where} holds the control character U+{code:04X}{what}", "Remove it.")
    if option := OPTION.search(value):
        raise _refusal(
            path, f"{where} holds the option --{option[1]}, which would be sampled as words",
            "Leave options out of prompts: the configuration sets size, steps, guidance and seeds for all of them.",
        )  # fmt: skip
    if network := NETWORK.search(value):
        raise _refusal(path, f"{where} holds {network[0]}...>, which would be sampled as words", "Leave it out: LoRAs are given as loras=.")
    return value


def _tell_apart(path: str, groups: list[tuple[str, list[str]]], least: int) -> None:
    """Raises ConfigError unless there are `least` groups or more, none empty and no prompt twice."""
    problem, seen, alike = "", dict[str, str](), dict[str, str]()
    for where, wordings in groups:
        if not wordings or not all(wording.strip() for wording in wordings):
            problem = problem or f"{where} is empty"
        for wording in wordings:
            if wording in seen:
                problem = problem or f"{_quoted(wording)} is in {seen[wording]} and in {where}"
            if alike.setdefault(_judged(wording), where) != where:
                problem = problem or f"{_quoted(wording)} in {where} differs from {alike[_judged(wording)]} only in spaces or capitals"
            seen[wording] = where
    if len(groups) < least:
        problem = problem or f"it holds {len(groups) or 'none'}"
    if problem:
        many, why = ("two prompts", ": R-precision asks which of them a picture shows") if least > 1 else ("one prompt", "")
        raise ConfigError(f"prompts={path} must hold at least {many}, all different and none empty{why}. Here {problem}.")


def _judged(wording: str) -> str:
    """A prompt as CLIP's tokenizer reads it."""
    return " ".join(wording.lower().split())


def _quoted(text: str) -> str:
    return repr(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
