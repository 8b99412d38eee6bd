"""The ways a stage can fail that are not bugs, each with the exit code that a shell, a scheduler or a flow can act on."""

from dev2pro.escape import lines


class StageError(Exception):
    """Names the thing, the place and the cure in one paragraph. `exit_code` is what the process ends with.

    Its text is safe to show wherever it comes out: it quotes names, captions, and what libraries and servers say.
    """

    exit_code = 1

    def __str__(self) -> str:
        return lines(super().__str__())


class ConfigError(StageError):
    """A value, a path or a combination of them that cannot work; nothing was started."""

    exit_code = 2


class DataError(StageError):
    """A data set, shard, picture or caption that cannot be used."""

    exit_code = 3


class SpaceError(StageError):
    """No room left where the stage writes."""

    exit_code = 4


class DivergedError(StageError):
    """The loss or the gradient stopped being finite; what was saved before is kept."""

    exit_code = 5


class TryAgainError(StageError):
    """Something outside (a network, a hub) failed; the same command may succeed later. 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


INTERRUPTED = 130  # SIGINT or SIGTERM: the stage stopped; the same command goes on from the last checkpoint


class InterruptedRun(StageError):
    """Asked to stop, and saved."""

    exit_code = INTERRUPTED


FULL = ("No space left on device", "Disk quota exceeded", "os error 28")  # the last is how Rust's libraries spell it


def out_of_space(error: BaseException) -> bool:
    """Whether the system or a library says that the disk is full, each in its own way."""
    return isinstance(error, SpaceError) or any(words in str(error) for words in FULL)
