"""Whether the Prefect server can be reached, found out in seconds before a flow begins."""

import json
import tempfile
import urllib.request
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_HOME, temporary_settings

from dev2pro.errors import ConfigError, SpaceError, TryAgainError, out_of_space
from dev2pro.escape import printable
from dev2pro.redact import redact, redact_url

SECONDS = 5.0
HTML = "what answers is no Prefect server, whose address ends in /api"


def check() -> None:
    """Raises TryAgainError unless a server answers at PREFECT_API_URL. Without that setting Prefect starts a server of its own here."""
    home = PREFECT_HOME.value()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        if out_of_space(error):
            raise SpaceError(f"PREFECT_HOME={home} has no space left, and Prefect writes there. Make room, or choose another folder.") from error
        why = f"cannot be written ({error.strerror}), and Prefect writes there"
        raise ConfigError(f"PREFECT_HOME={home} {why}. Choose another folder for it.") from error
    if not (url := PREFECT_API_URL.value()):
        try:
            get_client(sync_client=True)  # the flow finds it started
        except (RuntimeError, OSError) as error:
            raise TryAgainError(
                f"Prefect could not start a server on this machine ({printable(str(error))}). See to {home}, and try again."
            ) from error
        return
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: SECONDS}), get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            client.read_flows(limit=1)
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        raise unreachable(cause, url) from error


def unreachable(error: BaseException, url: str | None = None) -> TryAgainError:
    """An error of Prefect's client in one paragraph."""
    url = url or PREFECT_API_URL.value() or ""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    via = f" through the proxy {redact_url(proxy)}" if proxy and not urllib.request.proxy_bypass(parts.netloc) else ""
    return TryAgainError(
        f"The Prefect server {redact_url(url) or 'on this machine'} cannot be used{via}: {_reason(error)}. Start it, or correct "
        "PREFECT_API_URL, or unset it: then this command starts a server of its own."
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        if code in (401, 403):
            return f"it refuses the password ({code}); PREFECT_API_AUTH_STRING must be the server's"
        return f"{HTML} ({code})" if code in (404, 405) else f"it answers {code}"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {SECONDS:.0f} s"
    if isinstance(error, json.JSONDecodeError):
        return HTML
    return redact(printable(" ".join(str(error).split()).rstrip(".") or type(error).__name__))
