"""How long a stop takes: the step under way and one checkpoint, from the state's size at first, then as measured. Warns where less is granted."""

import time

from dev2pro.schedulers import Limit

RATE = 0.5e9  # bytes a second that are copied, hashed and written by all ranks together; assumed until a checkpoint has been measured
SPARE = 1.5  # the next checkpoint may take so many times what the last one took
UNSURE = 4.0  # what is only assumed may take so many times longer (a network disk); to be cut short would cost all steps so far
SHORTEST = 30.0  # seconds of a derived grace, however small the state


class StopTime:
    """The times of a run whose checkpoints have `state_bytes`; `given` is the grace in seconds if its user chose it.

    The step counted is the longest, measurements included, since the checkpoint before the last.
    """

    def __init__(self, state_bytes: int, given: float | None) -> None:
        self.state_bytes, self.given = state_bytes, given
        self._written: float | None = None  # seconds that the last checkpoint took
        self._since: float | None = None  # when the one that is being written was begun
        self._steps, self._mark = [0.0, 0.0], time.monotonic()  # the longest before and after the last checkpoint

    def resume(self) -> None:
        """Call when a step begins that does not follow the last `end_step` at once."""
        self._mark = time.monotonic()

    def end_step(self) -> None:
        """Call at the end of a step."""
        now = time.monotonic()
        self._steps[1], self._mark = max(self._steps[1], now - self._mark), now

    def begin_checkpoint(self) -> None:
        """Call before the state is copied."""
        self._steps = [self._steps[1], 0.0]
        self._since = time.monotonic()

    def end_checkpoint(self) -> None:
        """Call when it is written, from whatever thread."""
        assert self._since is not None
        self._written, self._since = time.monotonic() - self._since, None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self._steps)

    @property
    def checkpoint(self) -> float:
        """Seconds of a checkpoint."""
        return self.state_bytes / RATE if self._written is None else self._written

    @property
    def needed(self) -> float:
        """Seconds of a stop that finds no checkpoint being written."""
        return self.checkpoint + 2 * self.step if self._written is None else SPARE * self.checkpoint + self.step

    def grace(self) -> float:
        """Seconds that a stop is given if it is asked for now: it waits for a checkpoint that is being written, and then writes its own."""
        if self.given is not None:
            return self.given
        limit = self.needed + (SPARE * self.checkpoint if self._since else 0.0)
        return max(SHORTEST, limit if self._written else UNSURE * limit)

    def describe(self) -> str:
        """One line for the start of a run."""
        step = " and the step under way" if not self.step else ""
        return f"a checkpoint is {self.state_bytes / 1e9:.3g} GB, takes about {self.checkpoint:.0f} s; a stop needs about {self.needed:.0f} s{step}"

    def warning(self, limit: Limit) -> str:
        """One paragraph if the limit is too short for a stop; else empty."""
        if limit.seconds >= self.needed:
            return ""
        return (
            f"A stop needs about {self.needed:.0f} s (the step under way and a checkpoint of {self.state_bytes / 1e9:.3g} GB), and {limit.who} "
            f"gives {limit.seconds:.0f} s: a run that is stopped would lose the steps since its last checkpoint. {limit.cure}."
        )
