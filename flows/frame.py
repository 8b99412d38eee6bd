"""The frame around the flows' commands: arguments in, exit code out."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx
import yaml
from pydantic import ValidationError

from dev2pro.errors import ConfigError, StageError
from dev2pro.escape import printable
from flows.form_fields import Group
from flows.forms import mistakes
from flows.processes import reach
from flows.processes.launch import StageFailed

F = TypeVar("F", bound=Group)


def run(name: str, form: type[F], args: Sequence[str], work: Callable[[F], None], *, lists: Sequence[str] = ()) -> int:
    """Fills the form from `key=value` arguments, and does the work if a Prefect server can be reached. Returns the exit code."""
    try:
        filled = form.model_validate(nested(args, lists))
        work(filled)
        return 0
    except ValidationError as error:
        message, code = "\n".join(f"{name}: {line}" for line in mistakes(error, form)), ConfigError.exit_code
    except (StageError, StageFailed) as error:
        message, code = f"{name}: {error}", error.exit_code if error.exit_code > 0 else 128 - error.exit_code  # of a kill: as in a shell
    except httpx.TransportError as error:  # the server is gone in the middle of it
        lost = reach.unreachable(error)
        message, code = f"{name}: {lost}", lost.exit_code
    print("\n".join(map(printable, message.splitlines())), file=sys.stderr, flush=True)
    return code


def nested(args: Sequence[str], lists: Sequence[str] = ()) -> dict[str, Any]:
    """`a.b=c` arguments as the form's nested values. A value that begins with [ is a list; a single path of `lists` becomes a list of one."""
    values: dict[str, Any] = {}
    for arg in args:
        key, _, value = arg.partition("=")
        *above, last = key.split(".")
        group = values
        for part in above:
            if not isinstance(group := group.setdefault(part, {}), dict):
                raise ConfigError(f"{arg}: {part} has a value already. Give one or the other.")
        try:
            group[last] = yaml.safe_load(value) if value.startswith("[") else [value] if key in lists else value
        except yaml.YAMLError as error:
            raise ConfigError(f"{arg} is no list. Write it as in {key}=[one,two], and what has braces in quotes.") from error
    return values
