import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dev2pro import artifact, claim
from dev2pro.errors import ConfigError

COMMAND = ["out=there", "steps=3"]


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1


@dataclass(frozen=True)
class Config:
    """Shaped like a stage's."""

    out: str
    steps: int = 3
    names: list[str] = field(default_factory=lambda: ["a"])
    optim: Optim = Optim()


@pytest.fixture
def parents(tmp_path) -> dict[str, str]:
    """A model folder, a picture folder and a hub id."""
    for name in ("model/transformer", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model/transformer/config.json").write_text("{}")
    (tmp_path / "pictures/a.txt").write_text("a cat")
    return {"base": str(tmp_path / "model"), "data": str(tmp_path / "pictures"), "judge": "openai/clip"}


def make(config: Config, parents: dict[str, str], **what) -> artifact.Artifact:
    """What a stage does: claim, make files, record."""
    assert claim.begin(config.out, "test", config, parents) is None
    (Path(config.out) / "transformer").mkdir(exist_ok=True)
    (Path(config.out) / "transformer" / "weights.bin").write_bytes(b"weights")
    (Path(config.out) / "metrics.jsonl").write_text(what.pop("rows", '{"step": 1}\n'))
    return artifact.write(config.out, "test", "thing", config, parents, **{"step": 3, "metrics": {"loss": 0.5}, **what})


def refusal(config: Config, parents: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        claim.begin(config.out, "test", config, parents)
    assert config.out in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- begin, write, read ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_found_finished(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    made = make(config, parents, inference={"arm": "x"})
    assert artifact.read(config.out) == made
    assert claim.begin(config.out, "test", config, parents) == made
    assert (made.kind, made.stage, made.step, made.metrics, made.inference) == ("thing", "test", 3, {"loss": 0.5}, {"arm": "x"})
    assert made.config == {"steps": 3, "names": ["a"], "optim": {"lr": 0.1}}
    assert [f["path"] for f in made.files] == ["config.json", "metrics.jsonl", "transformer/weights.bin"]
    assert {p["role"]: p["uri"] for p in made.parents} == parents
    assert made.packages["torch"]
    record = json.loads((tmp_path / "out" / "artifact.json").read_text())
    assert "uri" not in record
    assert {f["path"]: f["bytes"] for f in record["files"]}["transformer/weights.bin"] == len(b"weights")


def test_a_half_done_run_goes_on_and_a_claim_that_made_nothing_is_taken_over(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    assert claim.begin(config.out, "test", config, parents) is None
    (tmp_path / "out" / "metrics.jsonl").write_text("{}\n")
    other = replace(config, steps=4)
    assert claim.begin(config.out, "test", other, parents) is None  # nothing was made yet
    (tmp_path / "out" / "weights.bin").write_bytes(b"half")
    assert claim.begin(config.out, "test", other, parents) is None
    assert "steps is 4 there and 3 here" in refusal(config, parents)


def test_another_configuration_is_refused_by_name_and_values(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    assert "steps is 3 there and 7 here" in refusal(replace(config, steps=7), parents)
    assert "optim.lr is 0.1 there and 0.2 here" in refusal(replace(config, optim=Optim(0.2)), parents)
    assert "names is ['a'] there and ['a', 'b'] here" in refusal(replace(config, names=["a", "b"]), parents)
    (tmp_path / "pictures" / "a.txt").write_text("a dog")
    assert "parents.data is" in refusal(config, parents)


def test_many_differences_are_counted(tmp_path, parents):
    make(Config(str(tmp_path / "out")), parents)
    said = refusal(Config(str(tmp_path / "out"), steps=1, names=[], optim=Optim(1.0)), {"base": parents["base"], "data": "other/data"})
    assert said.count(" there and ") == 3
    assert "and 2 more" in said


def test_another_stage_is_refused(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    with pytest.raises(ConfigError, match="stage is test there and lora here"):
        claim.begin(config.out, "lora", config, parents)


def test_a_folder_of_someone_else_is_refused_and_untouched(tmp_path, parents):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years")
    assert "not empty" in refusal(Config(str(tmp_path / "out")), parents)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("damage", ["shorter", "same length", "gone"])
def test_a_damaged_file_is_not_finished(tmp_path, parents, damage):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    weights = tmp_path / "out" / "transformer" / "weights.bin"
    {"shorter": lambda: weights.write_bytes(b"wei"), "same length": lambda: weights.write_bytes(b"weighed"), "gone": weights.unlink}[damage]()
    assert claim.begin(config.out, "test", config, parents) is None
    make(config, parents)
    assert claim.begin(config.out, "test", config, parents)


# ---- the id ------------------------------------------------------------------------------------------------------------------


def test_the_id_depends_on_what_was_made_and_not_on_where_or_when(tmp_path, parents, monkeypatch):
    first = make(Config(str(tmp_path / "one")), parents)
    monkeypatch.setattr("time.strftime", lambda *_: "another day")
    second = make(Config(str(tmp_path / "two")), parents, rows='{"step": 1, "seconds": 2.0}\n', metrics={"seconds": 2.0})
    assert second.created == "another day"
    assert second.id == first.id
    assert second.config_digest == first.config_digest


def test_the_id_changes_with_config_contents_and_parents(tmp_path, parents):
    ids = [make(Config(str(tmp_path / "one")), parents).id, make(Config(str(tmp_path / "two"), steps=4), parents).id]
    config = Config(str(tmp_path / "three"))
    make(config, parents)
    (tmp_path / "three" / "transformer" / "weights.bin").write_bytes(b"weighed")
    ids.append(artifact.write(config.out, "test", "thing", config, parents, step=3, metrics={}).id)
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"a": 1}')
    ids.append(make(Config(str(tmp_path / "four")), parents).id)
    assert len(set(ids)) == 4


def test_fingerprints_see_names_and_contents_but_not_places(tmp_path, parents):
    first = artifact.fingerprint(parents["base"])
    shutil.copytree(parents["base"], tmp_path / "elsewhere")
    assert artifact.fingerprint(str(tmp_path / "elsewhere")) == first
    (tmp_path / "elsewhere/transformer/config.json").rename(tmp_path / "elsewhere/transformer/other.json")
    assert artifact.fingerprint(str(tmp_path / "elsewhere")) != first
    assert artifact.fingerprint("openai/clip") == "openai/clip"
    made = make(Config(str(tmp_path / "out")), parents)
    assert artifact.fingerprint(made.uri) == made.id
    assert artifact.fingerprint(str(tmp_path / "pictures/a.txt")) != artifact.fingerprint(str(tmp_path / "pictures"))


def test_digests_do_not_depend_on_the_order_of_keys():
    assert artifact.digest({"a": 1, "b": [1, 2]}) == artifact.digest({"b": [1, 2], "a": 1})
    assert artifact.digest([1, 2]) != artifact.digest([2, 1])


# ---- the record --------------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_written_is_no_record(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    with pytest.raises(TypeError):
        make(config, parents, metrics={"loss": object()})
    assert not (tmp_path / "out" / "artifact.json").exists()
    with pytest.raises(ConfigError, match="no finished artifact"):
        artifact.read(config.out)


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    made = make(config, parents)
    with pytest.raises(TypeError):
        artifact.write(config.out, "test", "thing", config, parents, step=4, metrics={"loss": object()})
    assert artifact.read(config.out) == made


def test_what_a_killed_writer_left_does_not_spoil_the_next_record(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    with pytest.raises(TypeError):  # as far as a process gets that is killed while it writes the record
        make(config, parents, metrics={"loss": object()})
    made = make(config, parents)
    assert claim.begin(config.out, "test", config, parents) == made


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "kind": "thing", "more": 1}', "\xff"])
def test_an_unreadable_record_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "artifact.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"artifact\.json"):
        artifact.read(str(tmp_path))


def test_a_record_of_another_schema_is_refused(tmp_path, parents):
    made = make(Config(str(tmp_path / "out")), parents)
    record = tmp_path / "out" / "artifact.json"
    record.write_text(record.read_text().replace(f'"schema": {made.schema}', '"schema": 99'))
    with pytest.raises(ConfigError, match="schema 99; this version reads schema 1"):
        artifact.read(made.uri)


def test_an_unreadable_claim_is_an_error_that_names_it(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        claim.begin(config.out, "test", config, parents)


def test_origin_is_none_for_what_no_stage_made(tmp_path, parents):
    assert artifact.origin(parents["base"]) is None
    assert artifact.origin("openai/clip") is None
    made = make(Config(str(tmp_path / "out")), parents)
    assert artifact.origin(made.uri) == made


# ---- stands: what a flow may skip ----------------------------------------------------------------------------------------------


@pytest.fixture
def standing(tmp_path, parents, monkeypatch) -> artifact.Artifact:
    monkeypatch.setattr(sys, "argv", ["stage", "hydra.run.dir=.", "hydra/job_logging=disabled", *COMMAND])
    return make(Config(str(tmp_path / "out")), parents)


def test_the_same_command_stands(standing):
    assert standing.command == COMMAND
    assert claim.stands(standing.uri, COMMAND) == standing


def test_another_command_does_not_stand(standing):
    assert claim.stands(standing.uri, [*COMMAND, "seed=1"]) is None
    assert claim.stands(standing.uri, COMMAND[::-1]) is None


def test_nothing_stands_where_nothing_is_finished(tmp_path):
    assert claim.stands(str(tmp_path / "nowhere"), COMMAND) is None
    (tmp_path / "empty").mkdir()
    assert claim.stands(str(tmp_path / "empty"), COMMAND) is None


def test_a_changed_or_vanished_parent_does_not_stand(standing, tmp_path, parents):
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"changed": true}')
    assert claim.stands(standing.uri, COMMAND) is None
    shutil.rmtree(parents["base"])
    assert claim.stands(standing.uri, COMMAND) is None


def test_a_damaged_file_does_not_stand(standing):
    (Path(standing.uri) / "transformer" / "weights.bin").write_bytes(b"weighed")
    assert claim.stands(standing.uri, COMMAND) is None


def test_a_changed_conf_does_not_stand(standing, tmp_path, monkeypatch):
    (tmp_path / "root" / "conf").mkdir(parents=True)
    (tmp_path / "root" / "conf" / "recover.yaml").write_text("steps: 1\n")
    monkeypatch.setattr(artifact, "ROOT", tmp_path / "root")
    assert claim.stands(standing.uri, COMMAND) is None
