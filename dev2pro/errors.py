"""Expected failures of a stage, each with an exit code for a shell, a scheduler or a flow."""

from dev2pro.escape import lines


class StageError(Exception):
    """Names the thing, the place and the cure in one paragraph. `exit_code` is the process's exit code.

    Its text is safe to print: it escapes quoted names, captions and messages of libraries and servers.
    """

    exit_code = 1

    def __str__(self) -> str:
        return lines(super().__str__())


class ConfigError(StageError):
    """An invalid value, path or combination of them; nothing was started."""

    exit_code = 2


class DataError(StageError):
    """A data set, shard, picture or caption that cannot be used."""

    exit_code = 3


class SpaceError(StageError):
    """The disk that the stage writes to is full."""

    exit_code = 4


class DivergedError(StageError):
    """The loss or the gradient diverged, or every way to use a LoRA has collapsed; earlier checkpoints are kept."""

    exit_code = 5


class TryAgainError(StageError):
    """Something outside (a network, a hub) failed; the same command may succeed later. 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


INTERRUPTED = 130  # SIGINT or SIGTERM: the stage stopped; the same command resumes from the last checkpoint


class InterruptedRun(StageError):
    """A signal stopped the run after it saved a checkpoint."""

    exit_code = INTERRUPTED


LOST = 76  # of a rank that ends only because another one ended or hangs; `dev2pro.ranks` makes 75 of it where no rank on its machine says why

FULL = ("No space left on device", "Disk quota exceeded", "os error 28")  # the last: Rust libraries


def out_of_space(error: BaseException) -> bool:
    """Whether an error of the system or of a library means that the disk is full."""
    return isinstance(error, SpaceError) or any(message in str(error) for message in FULL)
