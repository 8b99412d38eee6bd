"""Texts from outside, made safe to show: in a line of a terminal or log, in an error or traceback, in markdown."""

import logging
import re
import unicodedata

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>()#+!|~$&]|^[=-]|^\d+(?=\.)")  # the last: a list
LONGEST = 500  # characters in markdown
JOINERS = "\u200c\u200d"  # which make one emoji of several, and letters of Persian and Indian scripts


def printable(text: str) -> str:
    """One line: control characters, those that turn the direction of writing and line breaks are spelt out, such as \\x1b."""
    return text if text.isprintable() else "".join(c if _seen(c) else c.encode("unicode_escape").decode() for c in text)


def _seen(character: str) -> bool:
    """Whether it is drawn, or is a space between what is: those of French and Chinese are no less ordinary than ASCII's."""
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def lines(text: str) -> str:
    """Several lines, of which each is printable; tabs stay. All but the first are indented, so that none passes for another message."""
    first, *more = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    return "\n".join([first, *(line if line[:1] in ("", " ", "\t") else f"  {line}" for line in more)])


class Record(logging.LogRecord):
    """A log record of `lines`, for logging.setLogRecordFactory: libraries quote names from the files that they read."""

    def getMessage(self) -> str:
        """What handlers write."""
        return lines(super().getMessage())


def markdown(text: str) -> str:
    """One line in which nothing is markdown, a link or HTML, cut at 500 characters."""
    return MARKDOWN.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", printable(" ".join(text.split()))[:LONGEST])
