"""Failures of push and pull: of the network, of the disk, of processes; s3 is moto, behind a proxy that injects faults."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dev2pro.artifacts import backends, store
from dev2pro.errors import ConfigError, SpaceError, TryAgainError
from tests.servers import environment, s3_environment
from tests.stores import files, refusal

ROOT = Path(__file__).resolve().parents[3]

# ---- transient and permanent failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "cut", 500, 503, 429])
def test_faults_here_and_there_are_overcome(artifact, proxy, fault):
    proxy.rule = lambda _method, _path, number: fault if number % 3 == 0 else None
    address = store.push(artifact.uri, "s3://store")
    assert files(store.pull(address)) == files(artifact.uri)


@pytest.mark.parametrize("fault", ["reset", 500])
@pytest.mark.parametrize("after", [0, 6, 13])
def test_a_store_that_fails_in_the_middle_is_told_and_gone_on_with(artifact, proxy, fault, after):
    proxy.rule = lambda _method, _path, number: fault if number >= after else None
    error = refusal(TryAgainError, lambda: store.push(artifact.uri, "s3://store"))
    assert f"s3://store/{artifact.id}/" in error
    assert "in 7 tries" in error
    proxy.rule = None
    assert store.read_record(f"s3://store/{artifact.id}") is None
    sent = {path for method, path in proxy.requests if method == "PUT"}
    proxy.requests.clear()
    address = store.push(artifact.uri, "s3://store")
    again = {path for method, path in proxy.requests if method == "PUT"} & sent
    assert len(again) <= 1, "only what did not arrive is sent again"
    assert files(store.pull(address)) == files(artifact.uri)


def test_an_object_of_the_right_size_that_nobody_vouches_for_is_sent_again(artifact, proxy, moto_store):
    moto_store.put(f"{artifact.id}/transformer/weights.bin", b"half us")
    moto_store.client.put_object(Bucket="store", Key=f"{artifact.id}/config.json", Body=b"x", Metadata={"sha256": artifact.files[0]["sha256"]})
    assert files(store.pull(store.push(artifact.uri, "s3://store"))) == files(artifact.uri)


@pytest.mark.parametrize("fault", ["reset", 500, "cut"])
def test_a_pull_that_failed_in_the_middle_goes_on_where_it_was(artifact, proxy, fault, monkeypatch):
    address = store.push(artifact.uri, "s3://store")
    monkeypatch.setattr(backends, "CHUNK", 50_000)
    monkeypatch.setattr(backends, "CONCURRENCY", 1)
    proxy.requests.clear()
    proxy.rule = lambda _method, path, number: fault if path.endswith("model.bin") and number > 4 else None
    assert "in 7 tries" in refusal(TryAgainError, lambda: store.pull(address))
    proxy.rule = None
    proxy.requests.clear()
    assert files(store.pull(address)) == files(artifact.uri)
    assert 0 < sum(path.endswith("model.bin") for _, path in proxy.requests) < 6
    assert not any("config.json" in path or path.endswith("empty") for _, path in proxy.requests), "what had come is not fetched again"


def test_what_was_begun_and_went_bad_is_fetched_anew(artifact, store_url):
    address = store.push(artifact.uri, store_url)
    partial = Path(f"runs/cache/artifacts/{artifact.id}.partial")
    (partial / "transformer").mkdir(parents=True)
    (partial / "model.bin.partial").write_bytes(bytes(1000))
    (partial / "empty.partial").write_bytes(b"not empty")
    (partial / "transformer/weights.bin").write_bytes(b"WEIGHTS")
    (partial / "stranger").touch()
    assert files(store.pull(address)) == files(artifact.uri)


def test_without_a_bucket_credentials_or_permission_it_is_said_at_once(artifact, proxy):
    assert "there is no such bucket" in refusal(ConfigError, lambda: store.push(artifact.uri, "s3://no-such-bucket/x"))
    assert "is no finished artifact" in refusal(ConfigError, lambda: store.pull(f"s3://store/{'0' * 64}"))
    for fault in (403, 401):
        proxy.requests.clear()
        proxy.rule = lambda *_, fault=fault: fault
        if fault == 403:
            assert "AWS_ACCESS_KEY_ID" in refusal(ConfigError, lambda: store.push(artifact.uri, "s3://store"))
            assert len(proxy.requests) == 1
    with environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None):
        assert "NoCredentialsError" in refusal(ConfigError, lambda: store.push(artifact.uri, "s3://store"))


def test_a_store_that_is_not_reached_is_told_without_secrets(artifact, proxy):
    with environment(**s3_environment("http://127.0.0.1:1"), AWS_MAX_ATTEMPTS="1"):
        for work in (lambda: store.push(artifact.uri, "s3://store"), lambda: store.pull(f"s3://store/{artifact.id}")):
            assert "EndpointConnectionError" in refusal(TryAgainError, work)


def test_a_full_disk_is_told_before_anything_is_fetched(artifact, store_url, monkeypatch):
    address = store.push(artifact.uri, store_url)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: os.terminal_size((1, 1)) and type("Usage", (), {"free": 1000})())
    assert "GB are free" in refusal(SpaceError, lambda: store.pull(address))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_told(artifact, tmp_path, proxy):
    published = tmp_path / "store" / artifact.id
    published.mkdir(parents=True)
    (published / "model.bin.partial").symlink_to("/dev/full")
    assert "model.bin could not be written: no room is left" in refusal(SpaceError, lambda: store.push(artifact.uri, str(published.parent)))
    (published / "model.bin.partial").unlink()
    assert files(store.push(artifact.uri, str(published.parent))) == files(artifact.uri)


# ---- killed and concurrent processes --------------------------------------------------------------------------------------------------------


def started(*args: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "dev2pro.artifacts", *args], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def killed_at(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("puts", [1, 4, 7])
def test_a_push_that_is_killed_publishes_nothing_and_is_gone_on_with(artifact, proxy, puts):
    proxy.rule = lambda method, _path, _number: 0.3 if method == "PUT" else None
    child = started("push", artifact.uri, "s3://store")
    proxy.wait("PUT", puts)
    killed_at(child)
    proxy.rule = None
    there = store.read_record(f"s3://store/{artifact.id}")
    assert there is None or puts == 7  # the seventh is the record
    assert files(store.pull(store.push(artifact.uri, "s3://store"))) == files(artifact.uri)


@pytest.mark.parametrize("gets", [2, 5])
def test_a_pull_that_is_killed_leaves_nothing_that_looks_whole(artifact, proxy, gets):
    address = store.push(artifact.uri, "s3://store")
    proxy.requests.clear()
    proxy.rule = lambda method, _path, _number: 0.3 if method == "GET" else None
    child = started("pull", address)
    proxy.wait("GET", gets)
    killed_at(child)
    proxy.rule = None
    assert not Path(f"runs/cache/artifacts/{artifact.id}").exists()
    assert files(store.pull(address)) == files(artifact.uri)


def test_pulls_at_once_fetch_once(artifact, proxy):
    address = store.push(artifact.uri, "s3://store")
    proxy.requests.clear()
    proxy.rule = lambda *_: 0.1
    children = [started("pull", address) for _ in range(2)]
    ends = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    assert {out.strip() for out, _ in ends} == {f"runs/cache/artifacts/{artifact.id}"}
    assert proxy.count("GET") == len(artifact.files)  # the record, and of the files all but the empty one
    assert files(f"runs/cache/artifacts/{artifact.id}") == files(artifact.uri)


def test_pushes_at_once_are_harmless(artifact, store_url):
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: store.push(artifact.uri, store_url), range(3)))) == 1
    assert files(store.pull(f"{store_url}/{artifact.id}")) == files(artifact.uri)
