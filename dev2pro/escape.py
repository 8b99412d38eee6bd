"""Texts from outside, made safe to show: in a line of a terminal or log, in a traceback, in markdown."""

import re

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>()#+!|~$&]|^[=-]|^\d+(?=\.)")  # the last: a list
LONGEST = 500  # characters in markdown


def printable(text: str) -> str:
    """One line: control characters, those that turn the direction of writing and line breaks are spelt out, such as \\x1b."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines(text: str) -> str:
    """Several lines, of which each is printable; tabs stay."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def markdown(text: str) -> str:
    """One line in which nothing is markdown, a link or HTML, cut at 500 characters."""
    return MARKDOWN.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", printable(" ".join(text.split()))[:LONGEST])
