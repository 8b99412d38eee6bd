"""Retries transient failures with exponential, jittered pauses."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LONGEST_PAUSE = 30.0  # seconds between two tries
RNG = random.SystemRandom()  # independent of the generators used in training, different in every process


class TransientError(Exception):
    """A failure that may not recur; `pause`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def with_retries(operation: Callable[[], T], retries: int) -> T:
    """Returns what `operation` returns. Retries it up to `retries` times after a TransientError, with pauses, then raises that."""
    for attempt in range(retries):
        try:
            return operation()
        except TransientError as error:
            time.sleep(max(error.pause, RNG.uniform(0.1, 1) * min(LONGEST_PAUSE, 0.5 * 2**attempt)))
    return operation()
