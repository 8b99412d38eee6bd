"""What is strange about captions: longer than the model reads, missing, all the same, or with the syntax of other programs in them."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data.loading.read import Reader
from data.names import Names
from data.shards import pictures
from data.shards.pictures import BadContent
from data.shards.snapshot import Snapshot
from data.storage.transport import ReadConfig
from dev2pro.escape import printable

MOST = 20_000  # different captions that are read when a run starts, the longest ones
NAMED, EXCERPT = 3, 80  # captions named, and characters of each
BATCH = 1000  # captions for one call of the tokenizer
NUMBER = r"[+-]?(?:\d(?:\.\d+)?|\.\d+)"
LITERAL = {  # what other programs interpret, and this model reads letter by letter
    "weights such as (word:1.3)": re.compile(rf"\([^()]*[^()\d\s]\s*:\s*{NUMBER}\s*\)|\(\([^()]+\)\)"),
    "brackets such as [word]": re.compile(r"\[[^\[\]]+\]"),
    "tags such as <lora:name:1>": re.compile(r"<\s*(?:lora|lyco|lycoris|hypernet|embedding)\s*:[^<>]*>", re.IGNORECASE),
    "BREAK": re.compile(r"\bBREAK\b"),
    "embedding:name": re.compile(r"(?<![<\w])embedding:\S+", re.IGNORECASE),
    "choices such as {one|other}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
}


class Tokens(Protocol):
    """Counts the tokens of captions as a model reads them, the one at the end included; it reads `limit` of them."""

    limit: int

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """The tokens of every caption."""


def check(snapshot: Snapshot, read: ReadConfig, tokens: Tokens | None = None, most: float = MOST) -> dict[str, Any]:
    """Reads every different caption once, or the `most` longest.

    Returns JSON values: `different` captions, `read` of them, `empty` pictures, the one caption of all pictures as `identical`, `lengths`
    [(length, pictures)] in tokens or, without `tokens`, characters; `longer` than the limit and `literal` syntax, each with a count and examples.
    """
    rows, repeats = _different(snapshot)
    different = len(rows)
    chosen = np.sort(np.argsort(-snapshot.columns["caption_chars"][rows].astype(np.int64), kind="stable")[: int(min(most, different))])
    texts = read_captions(snapshot, rows[chosen], read)
    lengths = _lengths([text for _, text in texts], tokens)
    pictures_of = dict(zip(rows[chosen].tolist(), repeats[chosen].tolist(), strict=True))
    longest = dict[int, tuple[int, str]]()  # a sample may have several captions
    for (row, text), length in zip(texts, lengths, strict=True):
        longest[row] = max(longest.get(row, (-1, "")), (length, text))
    names, over = Names(snapshot, read), [row for row in longest if tokens and longest[row][0] > tokens.limit]
    several = any(row in longest and len(texts) > len(longest) for row in longest)
    return {
        "pictures": len(snapshot), "different": different, "read": len(chosen),
        "unit": "tokens" if tokens else "characters", "limit": tokens.limit if tokens else 0,
        "empty": sum(pictures_of[row] for row, (_, text) in longest.items() if not text),
        "identical": excerpt(texts[0][1]) if different == 1 and len(snapshot) > 1 and not several else "",
        "lengths": [[length, pictures_of[row]] for row, (length, _) in longest.items()],
        "longer": {
            "count": sum(pictures_of[row] for row in over),
            "examples": [
                {"name": names(row), "length": longest[row][0], "text": excerpt(longest[row][1])}
                for row in sorted(over, key=lambda row: -longest[row][0])[:NAMED]
            ],
        },
        "literal": _literal(texts, pictures_of, names),
    }  # fmt: skip


def sentences(facts: dict[str, Any]) -> list[str]:
    """One line for everything of `check` that a person should know before training."""
    said, of = list[str](), f"of {facts['pictures']:,}"
    if longer := facts["longer"]["count"]:
        longest = ", ".join(f"{bad['length']:,} in {bad['name']}" for bad in facts["longer"]["examples"])
        said.append(
            f"captions longer than the {facts['limit']:,} tokens that the model reads, and cut off there: {longer:,} {of} (the longest: {longest}). "
            "Shorten them, or raise model.max_sequence_length, which is at most 512 for FLUX.1."
        )
    if facts["identical"]:
        said.append(f'all {facts["pictures"]:,} pictures have the same caption, "{facts["identical"]}".')
    if facts["empty"]:
        said.append(f"empty captions: {facts['empty']:,} {of}.")
    for kind, found in facts["literal"].items():
        examples = ", ".join(f"{bad['text']} in {bad['name']}" for bad in found["examples"])
        said.append(f"captions with {kind}, which this model reads literally: {found['count']:,} {of} ({examples}).")
    if said and facts["read"] < facts["different"]:
        said.append(f"the {facts['read']:,} longest of {facts['different']:,} different captions were read; `python -m data.report` reads all.")
    return said


def excerpt(text: str) -> str:
    """The beginning of a caption on one line."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 1]}…"


def _different(snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """The first row of every different caption, told by length and CRC-32, and how many pictures have it."""
    columns = snapshot.columns
    sums = columns["caption_crc"].astype(np.uint64) << np.uint64(32) | columns["caption_bytes"]
    _, rows, repeats = np.unique(sums, return_index=True, return_counts=True)
    order = np.argsort(rows)
    return rows[order], repeats[order]


def read_captions(snapshot: Snapshot, rows: Sequence[int] | np.ndarray, read: ReadConfig) -> list[tuple[int, str]]:
    """(row, caption) of every caption of these rows; an empty one for a row without."""
    json, texts = snapshot.columns["caption_json"], list[tuple[int, str]]()
    for row, parts in Reader(snapshot, read, ("caption",)).prefetch((int(row), int(row)) for row in rows):
        try:
            found = pictures.captions(parts["caption"], "json" if json[row] else "txt") if parts["caption"] else [""]
        except BadContent:
            found = [""]
        texts += [(row, text) for text in found]
    return texts


def _lengths(texts: list[str], tokens: Tokens | None) -> list[int]:
    if tokens is None:
        return list(map(len, texts))
    return [length for first in range(0, len(texts), BATCH) for length in tokens(texts[first : first + BATCH])]


def _literal(texts: list[tuple[int, str]], pictures_of: dict[int, int], names: Names) -> dict[str, Any]:
    found = dict[str, dict[int, str]]()  # kind -> row -> the first example in its caption
    for row, text in texts:
        for kind, pattern in LITERAL.items():
            if match := pattern.search(text):
                found.setdefault(kind, {}).setdefault(row, excerpt(match[0]))
    return {
        kind: {"count": sum(map(pictures_of.__getitem__, rows)), "examples": [{"name": names(row), "text": rows[row]} for row in [*rows][:NAMED]]}
        for kind, rows in found.items()
    }
