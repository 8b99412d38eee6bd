"""s3: the client, configured by the environment; transient errors; URLs without secrets."""

import os
import re
from typing import Any

import botocore.exceptions
import fsspec

from dev2pro.escape import printable

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
CURE = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL for other stores than Amazon's."  # what to check


def client() -> Any:
    """The s3 client of the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...); at Amazon, for buckets in any region."""
    amazon = not os.environ.get("AWS_ENDPOINT_URL")
    return fsspec.filesystem("s3", cache_regions=amazon, config_kwargs={"signature_version": "s3v4"})  # newer stores reject older signatures


def is_transient(error: Exception) -> bool:
    """Whether an error of the client is transient: the store was unreachable, overloaded, or closed the connection."""
    from s3fs.core import S3_RETRYABLE_ERRORS  # a slow import, already done by a caller that has an error

    kinds = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError, botocore.exceptions.CredentialRetrievalError, OSError)
    return isinstance(error, (*kinds, *S3_RETRYABLE_ERRORS)) and not isinstance(error, (FileNotFoundError, PermissionError))


def redact_url(url: str) -> str:
    """A URL or path for messages: without password, query and fragment, and with control characters escaped."""
    if ADDRESS.match(url):
        scheme, rest = url.split("://", 1)
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        if re.match(r"[^/]*(@|:(?!\d*(/|$)))", rest):  # a user name or a password, which may itself contain a slash
            rest = rest.rpartition("@")[2]
        url = f"{scheme}://{rest}"
    return printable(url)
