"""Paths and patterns of this machine. What exists is itself, whatever characters its name has; only the rest is a pattern."""

import glob
import os


def existing(pattern: str) -> tuple[str, str]:
    """(the leading folders that exist, with their slash, and the rest): `shots [2020]/` and `*.tar`, if there is such a folder."""
    end = 0
    while (slash := pattern.find("/", end)) >= 0 and os.path.isdir(pattern[: slash + 1]):
        end = slash + 1
    return pattern[:end], pattern[end:]


def matches(pattern: str) -> list[str]:
    """The path itself if it exists, else every path that the pattern matches, in order."""
    if os.path.lexists(pattern):
        return [pattern]
    above, rest = existing(pattern)
    return sorted(glob.glob(glob.escape(above) + rest))
