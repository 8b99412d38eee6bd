import dataclasses
import json
from pathlib import Path

import pytest

from dev2pro.artifacts import record, verify
from dev2pro.errors import DataError
from tests.records import Config, make


@pytest.fixture
def made(tmp_path, parents) -> record.Artifact:
    return make(Config(str(tmp_path / "out")), parents)


def test_what_is_whole_has_no_faults(made):
    told: list[int] = []
    assert list(verify.find_problems(made, told.append)) == []
    assert told[-1] == sum(one["bytes"] for one in made.files)
    assert not verify.untracked_files(made)
    verify.check(made)


def test_every_fault_is_told_with_its_file_and_a_cure(made):
    folder = Path(made.uri)
    (folder / "transformer/weights.bin").write_bytes(b"WEIGHTS")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").write_bytes(b"{}")
    said = list(verify.find_problems(dataclasses.replace(made, kind="other")))
    assert len(said) == 4
    assert said[0].startswith(f"{folder}/artifact.json: its contents give the id ")
    assert said[1].startswith(f"{folder}/config.json: has 2 bytes, not ")
    assert said[2].startswith(f"{folder}/metrics.jsonl: is missing. ")
    assert said[3].startswith(f"{folder}/transformer/weights.bin: has other contents")
    assert all(verify.CURE in one or "bring the old one back" in one for one in said)
    with pytest.raises(DataError, match="3 more of its files"):
        verify.check(dataclasses.replace(made, kind="other"))


def test_files_that_are_no_part_of_it_are_told_apart_from_leftovers_and_artifacts_within(made, parents, tmp_path):
    folder = Path(made.uri)
    for name in ("notes.txt", "transformer/more.bin", "checkpoint-3/state", "x.lock", "y.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    make(Config(str(folder / "inner")), parents)
    assert verify.untracked_files(made) == ["notes.txt", "transformer/more.bin"]


def test_the_id_is_that_of_the_contents(made):
    written = json.loads((Path(made.uri) / "artifact.json").read_text())
    assert record.compute_id(written["kind"], written["stage"], written["config_digest"], written["parents"], written["files"]) == made.id
    assert not verify.record_mismatch(made)
    for change in ({"kind": "x"}, {"stage": "x"}, {"config": {}}, {"config_digest": "0" * 64}, {"parents": []}, {"files": made.files[1:]}):
        assert verify.record_mismatch(dataclasses.replace(made, **change))
    for hearsay in ({"metrics": {}}, {"step": 7}, {"created": ""}, {"inference": {}}):  # it is no part of the id
        assert not verify.record_mismatch(dataclasses.replace(made, **hearsay))
