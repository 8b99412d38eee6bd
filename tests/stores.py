"""Helpers for tests of stores: read, damage and forge artifacts in one, and check errors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from dev2pro.artifacts import backends
from dev2pro.errors import StageError
from tests.servers import SECRET

SECRETS = (SECRET, "AKIA", "Signature", "X-Amz")


def files(folder: str | Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def refusal(kind: type[StageError], work: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    return str(caught.value)


def overwrite(address: str, name: str, content: bytes) -> None:
    """Puts other bytes in a store, with the metadata of the old ones."""
    url = f"{address}/{name}"
    if not url.startswith("s3://"):
        Path(url).write_bytes(content)
        return
    client, (bucket, _, key) = _client(), url[5:].partition("/")
    metadata = client.head_object(Bucket=bucket, Key=key)["Metadata"]
    client.put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata)


def remove(address: str, name: str) -> None:
    backends.open_backend(address).delete(name)


def _client() -> Any:
    return boto3.session.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def forge(address: str, change: Callable[[dict], Any]) -> None:
    values = json.loads(backends.open_backend(address).read_small("artifact.json") or b"")
    change(values)
    overwrite(address, "artifact.json", json.dumps(values).encode())
