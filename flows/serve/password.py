"""The password of `make serve`: from the environment, or generated at the first start and stored in a file that only its owner can read."""

import os
import secrets
import sys
from pathlib import Path

from dev2pro.errors import ConfigError

SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"  # USER:PASSWORD, as the server requires it and as its clients send it
NONE = "DEV2PRO_NO_PASSWORD"  # disables the password, for a single-user machine
FILE = "password"  # in PREFECT_HOME
EXAMPLE = "choose-a-password"  # as .env.example has it


def configure() -> str:
    """Sets USER:PASSWORD in the environment for the server, runners and runs of this process. Returns a message for the operator. Raises ConfigError.

    The message contains the password only if it was just generated and stdout is a terminal: others read logs.
    """
    given, without = os.environ.get(SERVER), os.environ.get(NONE, "false").lower()
    if without not in ("true", "false"):
        raise ConfigError(f"{NONE}={without} is neither true nor false. Write one of them, or take the line out.")
    if EXAMPLE in (given or ""):
        raise ConfigError("the password in .env is the one of .env.example, which everybody knows. Choose another: `openssl rand -hex 24`.")
    if given is not None and not all(given.partition(":")):
        raise ConfigError(f"{SERVER} is no USER:PASSWORD. Write one into .env, or take the line out: then make serve makes one.")
    if given and without == "true":
        raise ConfigError(f"{SERVER} and {NONE} are both set. Take one of them out of .env.")
    if without == "true":
        return f"There is no password ({NONE}): every user of this machine can use the UI and the API."
    if given:
        os.environ[CLIENT] = given
        return "The UI asks for USER:PASSWORD as .env has it."
    path = Path(os.environ["PREFECT_HOME"]).expanduser() / FILE
    is_new = not path.exists()
    credentials = os.environ[SERVER] = os.environ[CLIENT] = _make(path) if is_new else _read(path)
    if is_new and sys.stdout.isatty():
        return f"The UI asks for USER:PASSWORD. This one was made just now; paste the whole line:\n\n    {credentials}\n\nIt is kept in {path}."
    return f"The UI asks for USER:PASSWORD: paste the line in {path}."


def _make(path: Path) -> str:
    credentials = f"admin:{secrets.token_urlsafe(24)}"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(credentials + "\n")
    partial.rename(path)
    return credentials


def _read(path: Path) -> str:
    """USER:PASSWORD from the file. Raises ConfigError if other users can read it, if another user owns it, or if it holds no password."""
    stat = path.stat()
    if stat.st_mode & 0o077 or stat.st_uid != os.getuid():
        raise ConfigError(f"{path} can be read by other users, so its password is no secret. Remove the file; the next start makes another.")
    credentials = path.read_text().strip()
    if not all(credentials.partition(":")) or len(credentials.split()) != 1:
        raise ConfigError(f"{path} holds no USER:PASSWORD. Remove the file; the next start makes another.")
    return credentials
