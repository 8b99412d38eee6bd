import dataclasses
import json
from pathlib import Path

import pytest

from dev2pro.artifacts import record, verify
from dev2pro.errors import DataError
from tests.records import Config, make


@pytest.fixture
def artifact(tmp_path, parents) -> record.Artifact:
    return make(Config(str(tmp_path / "out")), parents)


def test_what_is_whole_has_no_problems(artifact):
    progress: list[int] = []
    assert list(verify.find_problems(artifact, progress.append)) == []
    assert progress[-1] == sum(one["bytes"] for one in artifact.files)
    assert not verify.untracked_files(artifact)
    verify.check(artifact)


def test_every_problem_names_its_file_and_a_cure(artifact):
    folder = Path(artifact.uri)
    (folder / "transformer/weights.bin").write_bytes(b"WEIGHTS")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").write_bytes(b"{}")
    problems = list(verify.find_problems(dataclasses.replace(artifact, kind="other")))
    assert len(problems) == 4
    assert problems[0].startswith(f"{folder}/artifact.json: its contents give the id ")
    assert problems[1].startswith(f"{folder}/config.json: has 2 bytes, not ")
    assert problems[2].startswith(f"{folder}/metrics.jsonl: is missing. ")
    assert problems[3].startswith(f"{folder}/transformer/weights.bin: has other contents")
    assert all(verify.CURE in one or "bring the old one back" in one for one in problems)
    with pytest.raises(DataError, match="3 more of its files"):
        verify.check(dataclasses.replace(artifact, kind="other"))


def test_files_that_are_no_part_of_it_are_told_apart_from_leftovers_and_artifacts_within(artifact, parents, tmp_path):
    folder = Path(artifact.uri)
    for name in ("notes.txt", "transformer/more.bin", "checkpoint-3/state", "x.lock", "y.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    make(Config(str(folder / "inner")), parents)
    assert verify.untracked_files(artifact) == ["notes.txt", "transformer/more.bin"]


def test_the_id_is_that_of_the_contents(artifact):
    written = json.loads((Path(artifact.uri) / "artifact.json").read_text())
    assert record.compute_id(written["kind"], written["stage"], written["config_digest"], written["parents"], written["files"]) == artifact.id
    assert not verify.record_mismatch(artifact)
    for change in ({"kind": "x"}, {"stage": "x"}, {"config": {}}, {"config_digest": "0" * 64}, {"parents": []}, {"files": artifact.files[1:]}):
        assert verify.record_mismatch(dataclasses.replace(artifact, **change))
    for hearsay in ({"metrics": {}}, {"step": 7}, {"created": ""}, {"inference": {}}):  # not part of the id
        assert not verify.record_mismatch(dataclasses.replace(artifact, **hearsay))
