"""Untrusted records: forged, hostile, or none at all."""

from pathlib import Path

import pytest

from dev2pro.artifacts import backends, record, store
from dev2pro.errors import ConfigError, DataError
from tests.stores import files, forge, overwrite, refusal


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(kind="lora"), lambda r: r["config"].update(steps=4), lambda r: r["parents"][0].update(id="0" * 64),
        lambda r: r["files"][0].update(bytes=3), lambda r: r["files"].pop(0), lambda r: r.update(id="0" * 64), lambda r: r.update(parents=[]),
        lambda r: r["files"].append({"path": "evil.py", "bytes": 0, "sha256": "0" * 64}),
    ],
)  # fmt: skip
def test_a_forged_record_is_refused(artifact, store_url, change):
    address = store.push(artifact.uri, store_url)
    forge(address, change)
    assert f"{address}/artifact.json: " in refusal(DataError, lambda: store.pull(address))
    assert not Path(f"runs/cache/artifacts/{artifact.id}").exists()
    assert store.push(artifact.uri, store_url) == address  # which repairs it
    assert files(store.pull(address)) == files(artifact.uri)


def test_a_whole_artifact_at_another_s_address_is_refused(artifact, tmp_path, store_url):
    address = store.push(artifact.uri, store_url)
    text = backends.open_backend(address).read_small("artifact.json")
    (tmp_path / "record").write_bytes(text)
    other = f"{store_url}/{'0' * 64}"
    backends.open_backend(other).put(tmp_path / "record", {"path": "artifact.json", "bytes": len(text), "sha256": "0" * 64}, lambda _done: None)
    assert f"it is that of {artifact.id[:12]}" in refusal(DataError, lambda: store.pull(other))


HOSTILE = ["../evil", "a/../../evil", "/tmp/evil", "", ".", "a//b", "a/", "./a", "artifact.json", "checkpoint-1/x", "x.lock", "a\x00b", "a\nb",
           "a\\b", "\ud800", "\x1b[2J", 7, None, ["a"], {"a": 1}]  # fmt: skip


@pytest.mark.parametrize("store_url", ["folder"], indirect=True)  # the same code parses records of both backends
@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_are_refused_wherever_a_record_is_read(artifact, store_url, name, tmp_path):
    address = store.push(artifact.uri, store_url)
    forge(address, lambda record: record["files"].append({"path": name, "bytes": 7, "sha256": artifact.files[-1]["sha256"]}))
    assert "artifact.json is damaged" in refusal(DataError, lambda: store.pull(address))
    (tmp_path / "local").mkdir()
    (tmp_path / "local/artifact.json").write_bytes(backends.open_backend(address).read_small("artifact.json"))
    assert "artifact.json is damaged" in refusal(ConfigError, lambda: record.read(str(tmp_path / "local")))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("store_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["files"].append(r["files"][0]), lambda r: r["files"].append({**r["files"][0], "path": "model.bin/x"}),
        lambda r: r["files"].append(7), lambda r: r["files"][0].update(bytes=-1), lambda r: r["files"][0].update(bytes=True),
        lambda r: r["files"][0].update(sha256="../x"), lambda r: r["files"][0].pop("sha256"), lambda r: r.update(files={}),
        lambda r: r.update(parents=[7]), lambda r: r.update(parents=[{"role": "a"}]), lambda r: r.update(id="../../evil"),
        lambda r: r.update(kind=7), lambda r: r.update(metrics=[]), lambda r: r.update(more=1), lambda r: r.pop("kind"),
        lambda r: r.update(schema=2), lambda r: r.clear(),
    ],
)  # fmt: skip
def test_records_of_another_form_are_refused(artifact, store_url, change):
    address = store.push(artifact.uri, store_url)
    forge(address, change)
    assert "artifact.json" in refusal(DataError, lambda: store.pull(address))


NO_RECORDS = {"empty": b"", "a list": b"[]", "cut": b"{", "bytes": b"\xff", "deep": b"[" * 100_000, "a number": b'{"schema": ' + b"9" * 9999 + b"}",
              "long": b" " * (17 << 20)}  # fmt: skip


@pytest.mark.parametrize("text", NO_RECORDS.values(), ids=NO_RECORDS)
def test_what_is_no_record_is_refused(artifact, store_url, text):
    address = store.push(artifact.uri, store_url)
    overwrite(address, "artifact.json", text)
    assert f"{address}/artifact.json" in refusal(DataError, lambda: store.pull(address))
    assert store.push(artifact.uri, store_url) == address
    assert files(store.pull(address)) == files(artifact.uri)
