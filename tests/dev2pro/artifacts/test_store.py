"""Artifacts go into stores and come back whole; what is not whole is refused. s3 is moto, behind a proxy that counts."""

import os
from pathlib import Path

import pytest

from dev2pro.artifacts import backends, record, store
from dev2pro.errors import ConfigError, DataError
from tests.records import Config
from tests.stores import files, overwrite, refusal, remove

# ---- there and back -------------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_bit_by_bit(made, place):
    address = store.push(made.uri, place)
    assert address == f"{place}/{made.id}"
    folder = store.pull(address)
    assert folder == f"runs/cache/artifacts/{made.id}"
    assert files(folder) == files(made.uri)
    assert record.read(folder).id == record.fingerprint(folder) == made.id
    assert sorted(os.listdir("runs/cache/artifacts")) == [made.id, f"{made.id}.lock"]


def test_pushing_twice_and_pulling_twice_transfers_nothing(made, proxy):
    address = store.push(made.uri, "s3://store/models")
    assert proxy.count("PUT", "POST") == len(made.files) + 1
    store.pull(address)
    proxy.requests.clear()
    assert store.push(made.uri, "s3://store/models/") == address
    assert proxy.count("PUT", "POST", "DELETE") == 0
    assert proxy.count("HEAD", "GET") == len(made.files) + 2  # of the record also the text
    proxy.requests.clear()
    assert store.resolve(address) == store.pull(address)
    assert not proxy.requests


def test_another_run_with_the_same_id_changes_nothing_that_is_published(made, place, tmp_path, parents):
    address = store.push(made.uri, place)
    before = files(store.pull(address, "one"))
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1, "seconds": 99.0}\n')
    config = Config(str(tmp_path / "out"))
    again = record.write(config.out, "test", "thing", config, parents, step=3, metrics={"loss": 0.5})
    assert again.id == made.id
    assert store.push(again.uri, place) == address
    assert files(store.pull(address, "two")) == before


def test_large_files_go_in_parts(made, proxy, tmp_path, monkeypatch, parents):
    (tmp_path / "out/large.bin").write_bytes(os.urandom(11 << 20))
    config = Config(made.uri)
    made = record.write(config.out, "test", "thing", config, parents, step=3, metrics={})
    monkeypatch.setattr(backends, "PIECE", 5 << 20)
    monkeypatch.setattr(store, "LONG", 1)
    address = store.push(made.uri, "s3://store")
    assert proxy.count("POST") == 2
    assert files(store.pull(address)) == files(made.uri)
    proxy.requests.clear()
    store.push(made.uri, "s3://store")
    assert proxy.count("PUT", "POST") == 0


def test_paths_and_addresses_are_resolved(made, place, tmp_path):
    address = store.push(made.uri, place)
    assert record.fingerprint(address) == made.id
    assert store.resolve(made.uri) == made.uri
    assert store.resolve("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert store.resolve(f"file://{made.uri}") == made.uri
    if address.startswith("s3"):
        assert store.resolve(address + "/") == f"runs/cache/artifacts/{made.id}"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://me:hush@host/x", "ftp://host/x is no place for artifacts"), ("https://host/x?X-Amz-Signature=hush", "https://host/x is no place"),
        ("s3://me:hush@store/x", "s3://store/x holds a password"), ("s3://store/x?versionId=hush", "s3://store/x holds a password or a query"),
        ("s3:///x", "names no bucket"), ("s3://store/recovered", "names no artifact in a store"), ("pipe://cat", "is no place for artifacts"),
    ],
)  # fmt: skip
def test_other_addresses_are_refused(address, words):
    said = refusal(ConfigError, lambda: store.resolve(address))
    assert words in said
    assert "hush" not in said


# ---- what is not whole is refused -------------------------------------------------------------------------------------------------------


def test_a_damaged_artifact_is_not_pushed(made, place):
    weights = Path(made.uri) / "transformer/weights.bin"
    weights.write_bytes(b"weighed")
    assert "weights.bin: has other contents" in refusal(DataError, lambda: store.push(made.uri, place))
    weights.unlink()
    assert "weights.bin: is missing" in refusal(DataError, lambda: store.push(made.uri, place))
    weights.write_bytes(b"weights")
    record = Path(made.uri) / "artifact.json"
    record.write_text(record.read_text().replace('"steps": 3', '"steps": 4'))
    assert "its configuration is not the one" in refusal(DataError, lambda: store.push(made.uri, place))
    assert "no finished artifact" in refusal(ConfigError, lambda: store.push(f"{made.uri}/transformer", place))
    assert store.read_record(f"{place}/{made.id}") is None


def test_an_artifact_that_is_written_to_meanwhile_is_not_published(made, proxy):
    def meddle(method, path, _number):
        if method == "PUT" and path.endswith("weights.bin"):
            (Path(made.uri) / "transformer/weights.bin").write_bytes(b"WEIGHTS")

    proxy.rule = meddle
    assert "changed while it was pushed" in refusal(DataError, lambda: store.push(made.uri, "s3://store"))
    assert store.read_record(f"s3://store/{made.id}") is None


@pytest.mark.parametrize("content", [b"WEIGHTS", b"weight", b"weights and more"], ids=["a bit", "shorter", "longer"])
def test_a_file_that_changed_in_the_store_is_refused_or_cut_to_what_was_meant(made, place, content):
    address = store.push(made.uri, place)
    overwrite(address, "transformer/weights.bin", content)
    if content.startswith(b"weights"):
        assert files(store.pull(address)) == files(made.uri)
        return
    said = refusal(DataError, lambda: store.pull(address))
    assert f"{address}/transformer/weights.bin has " in said
    assert not Path(f"runs/cache/artifacts/{made.id}").exists()
    overwrite(address, "transformer/weights.bin", b"weights")
    assert files(store.pull(address)) == files(made.uri)


def test_a_file_that_is_missing_in_the_store_is_told_and_comes_back_with_the_next_push(made, place):
    address = store.push(made.uri, place)
    remove(address, "transformer/weights.bin")
    assert "weights.bin is missing: the artifact is not whole" in refusal(DataError, lambda: store.pull(address))
    assert store.push(made.uri, place) == address
    assert files(store.pull(address)) == files(made.uri)


def test_files_that_nobody_named_are_not_pulled(made, place):
    address = store.push(made.uri, place)
    backends.open_backend(address).put(Path(made.uri) / "config.json", {"path": "evil.py", "bytes": 1, "sha256": "0" * 64}, lambda _done: None)
    assert files(store.pull(address)) == files(made.uri)


def test_links_lead_nowhere(made, tmp_path, proxy):
    address = store.push(made.uri, str(tmp_path / "store"))
    (tmp_path / "secret").write_bytes(b"weights")
    weights = Path(address) / "transformer/weights.bin"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    assert "leads out of the folder" in refusal(DataError, lambda: store.push(address, "s3://store"))
