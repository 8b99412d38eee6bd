"""Escapes untrusted text for a line of a terminal or log, an error or traceback, and markdown."""

import logging
import re
import unicodedata

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>()#+!|~$&]|^[=-]|^\d+(?=\.)")  # the last: a list
LONGEST = 500  # characters in markdown
JOINERS = "\u200c\u200d"  # zero-width joiners, used in emoji and in Persian and Indian scripts


def printable(text: str) -> str:
    """One line: escapes control characters, bidirectional ones and line breaks, such as \\x1b."""
    return text if text.isprintable() else "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def _is_visible(character: str) -> bool:
    """Whether a character is visible or a space, French and Chinese spaces included."""
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def lines(text: str) -> str:
    """Several lines, each made printable; tabs stay. All but the first are indented, so that none can pass for another message."""
    first, *more = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    return "\n".join([first, *(line if line[:1] in ("", " ", "\t") else f"  {line}" for line in more)])


class Record(logging.LogRecord):
    """A log record of `lines`, for logging.setLogRecordFactory: libraries log names from untrusted files."""

    def getMessage(self) -> str:
        """The text that handlers write."""
        return lines(super().getMessage())


def markdown(text: str) -> str:
    """One line with markdown, links and HTML escaped, cut at 500 characters."""
    return MARKDOWN.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", printable(" ".join(text.split()))[:LONGEST])
