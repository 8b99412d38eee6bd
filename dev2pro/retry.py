"""What may pass is tried again, with growing, jittered pauses."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LONGEST_PAUSE = 30.0  # seconds between two tries
DICE = random.SystemRandom()  # draws from no generator that training uses, and other numbers in every process


class TransientError(Exception):
    """A failure that the next try may not meet; `pause` is what the server asked for, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def with_retries(operation: Callable[[], T], retries: int) -> T:
    """What `once` returns; a Passing failure is met with a pause and another try, and raised when `retries` of them did not help."""
    for attempt in range(retries):
        try:
            return operation()
        except TransientError as error:
            time.sleep(max(error.pause, DICE.uniform(0.1, 1) * min(LONGEST_PAUSE, 0.5 * 2**attempt)))
    return operation()
