import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dev2pro.artifacts import record, run_folder
from dev2pro.errors import ConfigError
from tests.records import Config, Optim, make

COMMAND = ["out=there", "steps=3"]


def refusal(config: Config, parents: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        run_folder.acquire(config.out, "test", config, parents)
    assert config.out in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- acquire ---------------------------------------------------------------------------------------------------------------


def test_what_was_made_is_found_finished(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    artifact = make(config, parents, inference={"arm": "x"})
    assert run_folder.acquire(config.out, "test", config, parents) == artifact


def test_a_half_done_run_goes_on_and_a_claim_that_made_nothing_is_taken_over(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    assert run_folder.acquire(config.out, "test", config, parents) is None
    (tmp_path / "out" / "metrics.jsonl").write_text("{}\n")
    other = replace(config, steps=4)
    assert run_folder.acquire(config.out, "test", other, parents) is None  # no output yet
    (tmp_path / "out" / "weights.bin").write_bytes(b"half")
    assert run_folder.acquire(config.out, "test", other, parents) is None
    assert "steps is 4 there and 3 here" in refusal(config, parents)


def test_another_configuration_is_refused_by_name_and_values(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    assert "steps is 3 there and 2 here" in refusal(replace(config, steps=2), parents)
    assert "optim.lr is 0.1 there and 0.2 here" in refusal(replace(config, optim=Optim(0.2)), parents)
    assert "names is ['a'] there and ['a', 'b'] here" in refusal(replace(config, names=["a", "b"]), parents)
    (tmp_path / "pictures" / "a.txt").write_text("a dog")
    assert "parents.data is" in refusal(config, parents)


def test_many_differences_are_counted(tmp_path, parents):
    make(Config(str(tmp_path / "out")), parents)
    message = refusal(Config(str(tmp_path / "out"), steps=1, names=[], optim=Optim(1.0)), {"base": parents["base"], "data": "other/data"})
    assert message.count(" there and ") == 3
    assert "and 2 more" in message


def test_another_stage_is_refused(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    with pytest.raises(ConfigError, match="stage is test there and lora here"):
        run_folder.acquire(config.out, "lora", config, parents)


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
    assert run_folder.acquire(config.out, "test", config, parents) is None
    make(config, parents)
    assert run_folder.acquire(config.out, "test", config, parents)


def test_an_unreadable_claim_is_an_error_that_names_it(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    make(config, parents)
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        run_folder.acquire(config.out, "test", config, parents)


def test_what_a_killed_writer_left_does_not_spoil_the_next_record(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    with pytest.raises(TypeError):  # as far as a process gets that is killed while it writes the record
        make(config, parents, metrics={"loss": object()})
    artifact = make(config, parents)
    assert run_folder.acquire(config.out, "test", config, parents) == artifact


def test_more_steps_are_the_same_run_as_long_as_it_can_go_on(tmp_path, parents, capfd):
    config = Config(str(tmp_path / "out"))
    artifact = make(config, parents)
    longer = replace(config, steps=7)
    assert "has finished 3 steps, and the checkpoint it would go on from was removed" in refusal(longer, parents)
    assert run_folder.acquire(config.out, "test", config, parents) == artifact  # which the refusal left as it was
    (tmp_path / "out" / "checkpoint-3").mkdir()
    assert run_folder.acquire(config.out, "test", longer, parents) is None
    assert "extending the finished run from 3 to 7 steps" in capfd.readouterr().out
    assert "steps is 7 there and 3 here" in refusal(config, parents)
    assert "steps is 7 there and 8 here" in refusal(replace(longer, steps=8, optim=Optim(0.2)), parents)


def test_what_was_killed_before_it_made_anything_claims_nothing(tmp_path, parents):
    config = Config(str(tmp_path / "out"))
    run_folder.acquire(config.out, "test", config, parents)
    for leftover in ("train.snapshot.12-34.partial", "metrics.partial", "metrics.jsonl", "heldout.snapshot"):
        (tmp_path / "out" / leftover).touch()
    (tmp_path / "out/previews").mkdir()
    assert not run_folder.has_output(config.out)
    assert run_folder.acquire(config.out, "other", config, parents) is None
    (tmp_path / "out" / "checkpoint-1").mkdir()
    assert run_folder.has_output(config.out)


# ---- up_to_date: what a flow may skip------------------------------------------------------------------------------------------


@pytest.fixture
def finished_artifact(tmp_path, parents, monkeypatch) -> record.Artifact:
    monkeypatch.setattr(sys, "argv", ["stage", "hydra.run.dir=.", "hydra/job_logging=disabled", *COMMAND])
    return make(Config(str(tmp_path / "out")), parents)


def test_the_same_command_is_up_to_date(finished_artifact):
    assert finished_artifact.command == COMMAND
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND) == finished_artifact


def test_another_command_does_not_stand(finished_artifact):
    assert run_folder.up_to_date(finished_artifact.uri, [*COMMAND, "seed=1"]) is None
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND[::-1]) is None


@pytest.mark.parametrize("word", ["ledger=ledger.jsonl", "publish=s3://bucket/store"])
def test_whether_more_than_an_artifact_is_done_only_the_stage_knows(word, tmp_path, parents, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", *COMMAND, word])
    artifact = make(Config(str(tmp_path / "out")), parents)
    assert run_folder.up_to_date(artifact.uri, [*COMMAND, word]) is None


def test_nothing_is_up_to_date_where_nothing_is_finished(tmp_path):
    assert run_folder.up_to_date(str(tmp_path / "nowhere"), COMMAND) is None
    (tmp_path / "empty").mkdir()
    assert run_folder.up_to_date(str(tmp_path / "empty"), COMMAND) is None


def test_a_changed_or_vanished_parent_does_not_stand(finished_artifact, tmp_path, parents):
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"changed": true}')
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND) is None
    shutil.rmtree(parents["base"])
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND) is None


def test_a_damaged_file_does_not_stand(finished_artifact):
    (Path(finished_artifact.uri) / "transformer" / "weights.bin").write_bytes(b"weighed")
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND) is None


def test_a_changed_conf_does_not_stand(finished_artifact, tmp_path, monkeypatch):
    (tmp_path / "root" / "conf").mkdir(parents=True)
    (tmp_path / "root" / "conf" / "recover.yaml").write_text("steps: 1\n")
    monkeypatch.setattr(record, "ROOT", tmp_path / "root")
    assert run_folder.up_to_date(finished_artifact.uri, COMMAND) is None
