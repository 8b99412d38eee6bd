"""Redacts secrets from texts for the UI: values of the environment, tokens, and passwords and signatures in URLs."""

import os
import re

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
