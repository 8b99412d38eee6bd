"""Takes secrets out of texts: credentials in URLs, tokens, and secret values of the environment."""

import os
import re

from dev2pro.escape import printable

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HIDDEN = "********"
NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH|WEBHOOK|DATABASE_CONNECTION", re.IGNORECASE)
MIN_SECRET_LENGTH = 6  # characters; shorter values are not redacted
FORMS = (
    (re.compile(r"\b(hf_)[A-Za-z0-9]{16,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{4})[A-Z0-9]{12}\b"), rf"\1{HIDDEN}"),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"([?&](?:X-Amz-[A-Za-z-]+|AWSAccessKeyId|Signature|sig|token|key|password)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization:\s*(?:bearer|basic)\s+)\S+", re.IGNORECASE), rf"\1{HIDDEN}"),
)  # fmt: skip


def redact_url(url: str) -> str:
    """A URL or path for messages: without password, query and fragment, and with control characters escaped."""
    if URL.match(url):
        scheme, rest = url.split("://", 1)
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        if re.match(r"[^/]*(@|:(?!\d*(/|$)))", rest):  # a user name or a password, which may itself contain a slash
            rest = rest.rpartition("@")[2]
        url = f"{scheme}://{rest}"
    return printable(url)


def redact(text: str) -> str:
    """The text with secrets replaced by `HIDDEN`."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    for form, instead in FORMS:
        text = form.sub(instead, text)
    return text


def _values() -> list[str]:
    """Values of environment variables with secret names, the longest first, without paths and numbers."""
    values = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= MIN_SECRET_LENGTH}
    return sorted((value for value in values if not value.startswith("/") and not value.isdigit()), key=len, reverse=True)
