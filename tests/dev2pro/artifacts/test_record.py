import json
import shutil

import pytest

from dev2pro.artifacts import record
from dev2pro.errors import ConfigError
from tests.records import Config, make

# ---- write, read ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    artifact = make(config, parents, inference={"arm": "x"})
    assert record.read(config.out) == artifact
    assert (artifact.kind, artifact.stage, artifact.step, artifact.metrics, artifact.inference) == ("thing", "test", 3, {"loss": 0.5}, {"arm": "x"})
    assert artifact.config == {"steps": 3, "names": ["a"], "optim": {"lr": 0.1}}
    assert [f["path"] for f in artifact.files] == ["config.json", "metrics.jsonl", "transformer/weights.bin"]
    assert {p["role"]: p["uri"] for p in artifact.parents} == parents
    assert artifact.packages["torch"]
    path = json.loads((tmp_path / "out" / "artifact.json").read_text())
    assert "uri" not in path
    assert {f["path"]: f["bytes"] for f in path["files"]}["transformer/weights.bin"] == len(b"weights")


# ---- the id ------------------------------------------------------------------------------------------------------------------


def test_the_id_depends_on_what_was_made_and_not_on_where_or_when(tmp_path, parents, monkeypatch):
    first = make(Config(str(tmp_path / "one")), parents)
    monkeypatch.setattr("time.strftime", lambda *_: "another day")
    second = make(Config(str(tmp_path / "two")), parents, rows='{"step": 1, "seconds": 2.0}\n', metrics={"seconds": 2.0})
    assert second.created == "another day"
    assert second.id == first.id
    assert second.config_digest == first.config_digest


def test_the_id_does_not_depend_on_what_was_shown_meanwhile(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    first = make(config, parents)
    ids = []
    for name in ("previews/000500.jpg", "sheets/000500.jpg"):
        (tmp_path / "out" / name).parent.mkdir()
        (tmp_path / "out" / name).write_bytes(b"picture")
        artifact = record.write(config.out, "test", "thing", config, parents, step=3, metrics={})
        assert name in [f["path"] for f in artifact.files]
        ids.append(artifact.id)
    assert ids[0] == first.id
    assert ids[1] != first.id  # which is what somebody made


def test_the_id_changes_with_config_contents_and_parents(tmp_path, parents):
    ids = [make(Config(str(tmp_path / "one")), parents).id, make(Config(str(tmp_path / "two"), steps=4), parents).id]
    config = Config(str(tmp_path / "three"))
    make(config, parents)
    (tmp_path / "three" / "transformer" / "weights.bin").write_bytes(b"weighed")
    ids.append(record.write(config.out, "test", "thing", config, parents, step=3, metrics={}).id)
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"a": 1}')
    ids.append(make(Config(str(tmp_path / "four")), parents).id)
    assert len(set(ids)) == 4


def test_fingerprints_see_names_and_contents_but_not_places(tmp_path, parents):
    first = record.fingerprint(parents["base"])
    shutil.copytree(parents["base"], tmp_path / "elsewhere")
    assert record.fingerprint(str(tmp_path / "elsewhere")) == first
    (tmp_path / "elsewhere/transformer/config.json").rename(tmp_path / "elsewhere/transformer/other.json")
    assert record.fingerprint(str(tmp_path / "elsewhere")) != first
    assert record.fingerprint("openai/clip") == "openai/clip"
    artifact = make(Config(str(tmp_path / "out")), parents)
    assert record.fingerprint(artifact.uri) == artifact.id
    assert record.fingerprint(str(tmp_path / "pictures/a.txt")) != record.fingerprint(str(tmp_path / "pictures"))


def test_digests_do_not_depend_on_the_order_of_keys():
    assert record.digest({"a": 1, "b": [1, 2]}) == record.digest({"b": [1, 2], "a": 1})
    assert record.digest([1, 2]) != record.digest([2, 1])


# ---- the record --------------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_written_is_no_record(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    with pytest.raises(TypeError):
        make(config, parents, metrics={"loss": object()})
    assert not (tmp_path / "out" / "artifact.json").exists()
    with pytest.raises(ConfigError, match="no finished artifact"):
        record.read(config.out)


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    artifact = make(config, parents)
    with pytest.raises(TypeError):
        record.write(config.out, "test", "thing", config, parents, step=4, metrics={"loss": object()})
    assert record.read(config.out) == artifact


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "kind": "thing", "more": 1}', "\xff"])
def test_an_unreadable_record_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "artifact.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"artifact\.json"):
        record.read(str(tmp_path))


def test_a_record_of_another_schema_is_refused(tmp_path, parents):
    artifact = make(Config(str(tmp_path / "out")), parents)
    path = tmp_path / "out" / "artifact.json"
    path.write_text(path.read_text().replace(f'"schema": {artifact.schema}', '"schema": 99'))
    with pytest.raises(ConfigError, match="schema 99; this version reads schema 1"):
        record.read(artifact.uri)


def test_read_if_artifact_is_none_for_what_no_stage_made(tmp_path, parents):
    assert record.read_if_artifact(parents["base"]) is None
    assert record.read_if_artifact("openai/clip") is None
    artifact = make(Config(str(tmp_path / "out")), parents)
    assert record.read_if_artifact(artifact.uri) == artifact
