"""The s3 of the environment: its client, what its errors mean, and addresses shown without secrets."""

import os
import re
from typing import Any

import botocore.exceptions
import fsspec

from dev2pro.escape import printable

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
CURE = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL for other stores than Amazon's."  # what to check


def client() -> Any:
    """The s3 of the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...), and at Amazon's of whichever region a bucket lies in."""
    amazon = not os.environ.get("AWS_ENDPOINT_URL")
    return fsspec.filesystem("s3", cache_regions=amazon, config_kwargs={"signature_version": "s3v4"})  # newer stores and buckets know no older one


def is_transient(error: Exception) -> bool:
    """Whether an error of the client may not come again: the store was not reached, or could not answer, or not to the end."""
    from s3fs.core import S3_RETRYABLE_ERRORS  # an import that takes a moment, and whoever has an error has made it

    kinds = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError, botocore.exceptions.CredentialRetrievalError, OSError)
    return isinstance(error, (*kinds, *S3_RETRYABLE_ERRORS)) and not isinstance(error, (FileNotFoundError, PermissionError))


def redact_url(url: str) -> str:
    """The place for messages: without password, query and fragment, and without characters that a terminal would obey."""
    if ADDRESS.match(url):
        scheme, rest = url.split("://", 1)
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        if re.match(r"[^/]*(@|:(?!\d*(/|$)))", rest):  # a name or a password, which may itself hold a slash
            rest = rest.rpartition("@")[2]
        url = f"{scheme}://{rest}"
    return printable(url)
