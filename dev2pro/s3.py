"""s3: the client, configured by the environment, and which of its errors are transient."""

import os
from typing import Any

import botocore.exceptions
import fsspec

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
