import aiohttp
import botocore.exceptions
import pytest

from dev2pro import s3
from tests.servers import environment, moto, s3_environment

PASSING = [
    aiohttp.ClientPayloadError(), OSError(5, "an answer of 500"), TimeoutError(), botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), botocore.exceptions.CredentialRetrievalError(provider="x", error_msg="x"),
]  # fmt: skip
LASTING = [
    FileNotFoundError(),
    PermissionError(),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.ProfileNotFound(profile="x"),
    ValueError(),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_what_may_pass(error):
    assert s3.is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
def test_what_will_not(error):
    assert not s3.is_transient(error)


def test_the_client_is_that_of_the_environment():
    with moto("first") as bucket:
        bucket.put("a", b"x")
        assert s3.client().cat_file("s3://first/a") == b"x"
        with environment(**s3_environment("http://127.0.0.1:1"), AWS_MAX_ATTEMPTS="1"), pytest.raises(Exception, match=r"127\.0\.0\.1:1") as caught:
            s3.client().cat_file("s3://first/a")
        assert s3.is_transient(caught.value)
