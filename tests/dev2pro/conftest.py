import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from tests.proxies import Proxy
from tests.records import Config, make
from tests.servers import Bucket, environment, moto, s3_environment


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, str]:
    """A model folder, a picture folder and a hub id."""
    for name in ("model/transformer", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model/transformer/config.json").write_text("{}")
    (tmp_path / "pictures/a.txt").write_text("a cat")
    return {"base": str(tmp_path / "model"), "data": str(tmp_path / "pictures"), "judge": "openai/clip"}


@pytest.fixture(scope="module")
def moto_store() -> Iterator[Bucket]:
    with moto("store") as bucket:
        yield bucket


@pytest.fixture
def proxy(moto_store: Bucket, monkeypatch, tmp_path) -> Iterator[Proxy]:
    """A proxy in front of an empty bucket. Changes into the test's folder and shortens the pauses between retries."""
    for one in moto_store.client.list_objects_v2(Bucket="store").get("Contents", []):
        moto_store.client.delete_object(Bucket="store", Key=one["Key"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dev2pro.retry.LONGEST_PAUSE", 0.02)
    with Proxy(moto_store.client.meta.endpoint_url) as between, environment(**s3_environment(between.url), AWS_MAX_ATTEMPTS="1"):
        yield between


@pytest.fixture
def artifact(tmp_path, parents) -> Artifact:
    """An artifact with a file of several chunks, an empty one, and one whose name s3 must not misread."""
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    (tmp_path / "out/model.bin").write_bytes(os.urandom(300_000))
    (tmp_path / "out/empty").touch()
    (tmp_path / "out/sheets").mkdir()
    (tmp_path / "out/sheets/a b+%41 &=é.png").write_bytes(b"picture")
    return record.write(config.out, "test", "thing", config, parents, step=3, metrics={"loss": 0.5})


@pytest.fixture(params=["s3", "folder"])
def store_url(request, proxy, tmp_path) -> str:
    return "s3://store/models" if request.param == "s3" else str(tmp_path / "store")
