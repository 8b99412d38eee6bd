"""Statistics of paired runs: medians, ratios and spreads, and the load of the machine."""

import os
import statistics
import time
from collections.abc import Sequence

from data.commands import cores


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of paired runs: the median of the ratios, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def spread(values: Sequence[float]) -> str:
    return f"{median(values):8,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def machine() -> None:
    """Prints the load of the machine, and the variation in the time of a fixed short task."""
    load, block, took = os.getloadavg()[0], os.urandom(1 << 20), []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            block.count(0)
        took.append(time.perf_counter() - start)
    fast, slow = min(took) / median(took), max(took) / median(took)
    print(f"machine: {cores()} cores, load {load:.1f}; the same work, done 20 times, takes {fast:.2f} to {slow:.2f} times its median")
