"""Notes on what was left out or is altered: how many of each kind, and the first names."""

from collections.abc import Iterable
from typing import Any

from data.shards import pictures
from dev2pro.escape import printable

NAMES = 3  # that are told of each kind
Notes = dict[str, dict[str, Any]]  # kind -> {"count": how many, "names": the first of them}, and "why" of what is left out


def add(notes: Notes, kind: str, names: Iterable[str], count: int = 1, why: str = "") -> None:
    """Counts `count` more of a kind, and keeps their names while there are few."""
    entry = notes.setdefault(kind, {"count": 0, "names": [], **({"why": why} if why else {})})
    entry["count"] += count
    entry["names"] = [*entry["names"], *names][:NAMES]


def merge(notes: Notes, more: Notes) -> None:
    """Adds all of `more`."""
    for kind, entry in more.items():
        add(notes, kind, entry["names"], entry["count"])


def checked(notes: Any) -> Notes:
    """Notes from a file. Raises TypeError for what is none."""
    for entry in dict(notes).values():
        texts = [*entry["names"], entry.get("why", "")]
        if not isinstance(entry["count"], int) or not all(isinstance(text, str) for text in texts):
            raise TypeError("notes without count or names")
    return notes


def words(kind: str, background: str) -> str:
    """What is altered of pictures of a kind."""
    known = {
        pictures.TRANSPARENT: f"transparent pixels, which become {background}",
        pictures.FRAMES: "several frames or pages, of which the first is used",
    }
    return known.get(kind, printable(kind))


def altered(notes: Notes, background: str) -> list[str]:
    """A line for each kind of alteration."""
    return [
        f"{entry['count']:,} {'picture has' if entry['count'] == 1 else 'pictures have'} {words(kind, background)}: {_names(entry)}"
        for kind, entry in notes.items()
    ]


def left_out(notes: Notes) -> str:
    """All that was left out, the most frequent kind first: count, kind, names and reason."""
    entries = sorted(notes.items(), key=lambda item: -item[1]["count"])
    return ", ".join(f"{entry['count']:,} {printable(kind)} ({_names(entry)}{_why(entry)})" for kind, entry in entries)


def _names(entry: dict[str, Any]) -> str:
    return ", ".join(map(printable, entry["names"])) + (", ..." if entry["count"] > len(entry["names"]) else "")


def _why(entry: dict[str, Any]) -> str:
    return f"; {printable(entry['why'])}" if entry.get("why") else ""
