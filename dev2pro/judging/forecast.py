"""How long an evaluation will take: counted in forward passes of one picture, timed from the first batch on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Forecast:
    """What is to be sampled, on `ranks` ranks that are equally fast; `pictures` are all of them, `done` those that are there."""

    def __init__(self, pictures: int, done: int, forwards: int, ranks: int) -> None:
        self.pictures, self.done, self.left, self.ranks = pictures, done, forwards, ranks
        self._seconds, self._timed = 0.0, 0

    @property
    def seconds(self) -> float:
        """The time that is left, as fast as this rank has been; 0 before it has sampled anything."""
        return self._seconds / self._timed * self.left / self.ranks if self._timed else 0.0

    @contextmanager
    def timed(self, forwards: int) -> Iterator[None]:
        """Times one batch of this rank, of so many forward passes of one picture."""
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began
        self._timed += forwards

    def count(self, pictures: int, forwards: int) -> None:
        """Counts what all ranks have sampled meanwhile."""
        self.done += pictures
        self.left -= forwards


def in_words(seconds: float) -> str:
    """A duration: 40 s, 12 min, 6 h 50 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
