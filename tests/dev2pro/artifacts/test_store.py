"""Artifacts are pushed and pulled unchanged; damaged ones are refused. s3 is moto, behind a proxy that counts requests."""

import os
from pathlib import Path

import pytest

from dev2pro.artifacts import backends, record, store
from dev2pro.errors import ConfigError, DataError
from tests.records import Config
from tests.stores import files, overwrite, refusal, remove

# ---- push and pull --------------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_bit_by_bit(artifact, store_url):
    address = store.push(artifact.uri, store_url)
    assert address == f"{store_url}/{artifact.id}"
    folder = store.pull(address)
    assert folder == f"runs/cache/artifacts/{artifact.id}"
    assert files(folder) == files(artifact.uri)
    assert record.read(folder).id == record.fingerprint(folder) == artifact.id
    assert sorted(os.listdir("runs/cache/artifacts")) == [artifact.id, f"{artifact.id}.lock"]


def test_pushing_twice_and_pulling_twice_transfers_nothing(artifact, proxy):
    address = store.push(artifact.uri, "s3://store/models")
    assert proxy.count("PUT", "POST") == len(artifact.files) + 1
    store.pull(address)
    proxy.requests.clear()
    assert store.push(artifact.uri, "s3://store/models/") == address
    assert proxy.count("PUT", "POST", "DELETE") == 0
    assert proxy.count("HEAD", "GET") == len(artifact.files) + 2  # of the record also the text
    proxy.requests.clear()
    assert store.resolve(address) == store.pull(address)
    assert not proxy.requests


def test_another_run_with_the_same_id_changes_nothing_that_is_published(artifact, store_url, tmp_path, parents):
    address = store.push(artifact.uri, store_url)
    before = files(store.pull(address, "one"))
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1, "seconds": 99.0}\n')
    config = Config(str(tmp_path / "out"))
    again = record.write(config.out, "test", "thing", config, parents, step=3, metrics={"loss": 0.5})
    assert again.id == artifact.id
    assert store.push(again.uri, store_url) == address
    assert files(store.pull(address, "two")) == before


def test_large_files_go_in_parts(artifact, proxy, tmp_path, monkeypatch, parents):
    (tmp_path / "out/large.bin").write_bytes(os.urandom(11 << 20))
    config = Config(artifact.uri)
    artifact = record.write(config.out, "test", "thing", config, parents, step=3, metrics={})
    monkeypatch.setattr(backends, "CHUNK", 5 << 20)
    monkeypatch.setattr(store, "PROGRESS_FROM", 1)
    address = store.push(artifact.uri, "s3://store")
    assert proxy.count("POST") == 2
    assert files(store.pull(address)) == files(artifact.uri)
    proxy.requests.clear()
    store.push(artifact.uri, "s3://store")
    assert proxy.count("PUT", "POST") == 0


def test_paths_and_addresses_are_resolved(artifact, store_url, tmp_path):
    address = store.push(artifact.uri, store_url)
    assert record.fingerprint(address) == artifact.id
    assert store.resolve(artifact.uri) == artifact.uri
    assert store.resolve("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert store.resolve(f"file://{artifact.uri}") == artifact.uri
    if address.startswith("s3"):
        assert store.resolve(address + "/") == f"runs/cache/artifacts/{artifact.id}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://me:hush@host/x", "ftp://host/x is no place for artifacts"), ("https://host/x?X-Amz-Signature=hush", "https://host/x is no place"),
        ("s3://me:hush@store/x", "s3://store/x holds a password"), ("s3://store/x?versionId=hush", "s3://store/x holds a password or a query"),
        ("s3:///x", "names no bucket"), ("s3://store/recovered", "names no artifact in a store"), ("pipe://cat", "is no place for artifacts"),
    ],
)  # fmt: skip
def test_other_addresses_are_refused(address, message):
    error = refusal(ConfigError, lambda: store.resolve(address))
    assert message in error
    assert "hush" not in error


# ---- damaged artifacts are refused ------------------------------------------------------------------------------------------------------


def test_a_damaged_artifact_is_not_pushed(artifact, store_url):
    weights = Path(artifact.uri) / "transformer/weights.bin"
    weights.write_bytes(b"weighed")
    assert "weights.bin: has other contents" in refusal(DataError, lambda: store.push(artifact.uri, store_url))
    weights.unlink()
    assert "weights.bin: is missing" in refusal(DataError, lambda: store.push(artifact.uri, store_url))
    weights.write_bytes(b"weights")
    record = Path(artifact.uri) / "artifact.json"
    record.write_text(record.read_text().replace('"steps": 3', '"steps": 4'))
    assert "its configuration is not the one" in refusal(DataError, lambda: store.push(artifact.uri, store_url))
    assert "no finished artifact" in refusal(ConfigError, lambda: store.push(f"{artifact.uri}/transformer", store_url))
    assert store.read_record(f"{store_url}/{artifact.id}") is None


def test_an_artifact_that_is_written_to_meanwhile_is_not_published(artifact, proxy):
    def meddle(method, path, _number):
        if method == "PUT" and path.endswith("weights.bin"):
            (Path(artifact.uri) / "transformer/weights.bin").write_bytes(b"WEIGHTS")

    proxy.rule = meddle
    assert "changed while it was pushed" in refusal(DataError, lambda: store.push(artifact.uri, "s3://store"))
    assert store.read_record(f"s3://store/{artifact.id}") is None


@pytest.mark.parametrize("content", [b"WEIGHTS", b"weight", b"weights and more"], ids=["a bit", "shorter", "longer"])
def test_a_file_that_changed_in_the_store_is_refused_or_cut_to_what_was_meant(artifact, store_url, content):
    address = store.push(artifact.uri, store_url)
    overwrite(address, "transformer/weights.bin", content)
    if content.startswith(b"weights"):
        assert files(store.pull(address)) == files(artifact.uri)
        return
    error = refusal(DataError, lambda: store.pull(address))
    assert f"{address}/transformer/weights.bin has " in error
    assert not Path(f"runs/cache/artifacts/{artifact.id}").exists()
    overwrite(address, "transformer/weights.bin", b"weights")
    assert files(store.pull(address)) == files(artifact.uri)


def test_a_file_that_is_missing_in_the_store_is_told_and_comes_back_with_the_next_push(artifact, store_url):
    address = store.push(artifact.uri, store_url)
    remove(address, "transformer/weights.bin")
    assert "weights.bin is missing: the artifact is not whole" in refusal(DataError, lambda: store.pull(address))
    assert store.push(artifact.uri, store_url) == address
    assert files(store.pull(address)) == files(artifact.uri)


def test_files_that_nobody_named_are_not_pulled(artifact, store_url):
    address = store.push(artifact.uri, store_url)
    backends.open_backend(address).put(Path(artifact.uri) / "config.json", {"path": "evil.py", "bytes": 1, "sha256": "0" * 64}, lambda _done: None)
    assert files(store.pull(address)) == files(artifact.uri)


def test_links_lead_nowhere(artifact, tmp_path, proxy):
    address = store.push(artifact.uri, str(tmp_path / "store"))
    (tmp_path / "secret").write_bytes(b"weights")
    weights = Path(address) / "transformer/weights.bin"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    assert "leads out of the folder" in refusal(DataError, lambda: store.push(address, "s3://store"))
