"""Pictures whose form or size hardly fits what is trained on: enlarged many times, or mostly cropped away."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.loading.order import Order
from data.loading.read import Reader
from data.storage.transport import ReadConfig
from dev2pro.errors import DataError

NAMES = 3  # pictures that are named, the worst ones
SAID = {"enlarge": 4.0, "crop": 0.5}  # beyond these a picture is told
WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "enlarge": ("enlarged", lambda value: f"{value:.3g} times"), "crop": ("cropped", lambda value: f"by {value:.1%}"),
}  # fmt: skip
CURES = {"enlarge": "lower data.resolution, give larger pictures", "crop": "raise data.aspect, cut the pictures"}


@dataclass(frozen=True)
class Extremes:
    """The rows (N,) of pictures beyond `limit` of a kind, enlarge (factor) or crop (share of the area), the worst first, and their `values` (N,)."""

    kind: str
    limit: float
    rows: np.ndarray
    values: np.ndarray


def extremes(order: Order, limits: dict[str, float | None]) -> list[Extremes]:
    """The pictures of an order beyond the limit of each kind; None has none."""
    found = []
    for kind, limit in limits.items():
        values = order.enlarged() if kind == "enlarge" else order.cropped()
        rows = np.flatnonzero(values > (np.inf if limit is None else limit))
        rows = rows[np.argsort(-values[rows], kind="stable")]
        found.append(Extremes(kind, limit or 0.0, rows, values[rows]))
    return [one for one in found if len(one.rows)]


def check(order: Order, limits: dict[str, float | None], what: str, config: ReadConfig) -> list[str]:
    """A line for each kind of extreme pictures, with the first names. Raises DataError for pictures beyond a limit; `what` names their setting."""

    def told(one: Extremes) -> str:
        reader, (verb, amount) = Reader(order.snapshot, config, ("picture",)), WORDS[one.kind]
        names = [f"{reader.key(int(row))} ({amount(value)})" for row, value in zip(one.rows[:NAMES], one.values, strict=False)]
        listed, are = ", ".join([*names, *["..."] * (len(one.rows) > NAMES)]), "picture is" if len(one.rows) == 1 else "pictures are"
        return f"{what}: {len(one.rows):,} {are} {verb} more than {amount(one.limit)}: {listed}"

    for one in extremes(order, limits):
        raise DataError(f"{told(one)}. Take them out, {CURES[one.kind]}, or raise data.max_{one.kind}={one.limit:g} (null for no limit).")
    return [told(one) for one in extremes(order, {**SAID})]
