import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dev2pro.artifacts import lineage, record, store
from tests.records import Config, make
from tests.servers import environment, s3_environment


@pytest.fixture
def artifact(tmp_path, monkeypatch, parents) -> record.Artifact:
    """A lora on a recovered model on a base; with a snapshot, a hub id, and a watched file."""
    monkeypatch.chdir(tmp_path)
    make(Config("recovered"), {"base": "model"})
    save_file({"a": np.zeros(1)}, "train.snapshot", {"head": json.dumps({"id": "5" * 64})})
    Path("shard.tar").write_bytes(b"tar")
    return make(
        Config("lora"),
        {"trained_on": "recovered", "judge": "openai/clip", "data.train": ("train.snapshot", "5" * 64), "base": "model"},
        watched=["shard.tar"],
    )


def states(artifact: record.Artifact) -> dict[str, tuple[str, str]]:
    return {parent.role: (parent.state, parent.location) for parent in lineage.parents(artifact)}


def test_what_is_as_it_was_is_there(artifact):
    assert states(artifact) == {
        "trained_on": ("there", "recovered"), "judge": ("by name", "openai/clip"), "data.train": ("there", "train.snapshot"),
        "base": ("there", "model"),
    }  # fmt: skip
    ancestor = next(lineage.parents(artifact)).artifact
    assert ancestor == record.read("recovered")
    assert not list(lineage.changed_inputs(artifact))


def test_what_is_another_is_changed_and_what_is_not_there_is_gone(artifact):
    (Path("recovered") / "transformer/weights.bin").write_bytes(b"WEIGHTS")
    record.write("recovered", "test", "thing", Config("recovered"), {"base": "model"}, step=3, metrics={})
    (Path("model") / "transformer/config.json").write_text('{"a": 1}')
    save_file({"a": np.zeros(1)}, "train.snapshot", {"head": json.dumps({"id": "6" * 64})})
    Path("shard.tar").write_bytes(b"another tar")
    assert {role: state for role, (state, _) in states(artifact).items()} == {
        "trained_on": "changed", "judge": "by name", "data.train": "changed", "base": "changed",
    }  # fmt: skip
    assert list(lineage.changed_inputs(artifact)) == [("shard.tar", "changed")]
    for name in ("recovered", "model"):
        shutil.rmtree(name)
    Path("train.snapshot").write_bytes(b"no snapshot")
    assert states(artifact)["data.train"][0] == "changed"
    Path("train.snapshot").unlink()
    Path("shard.tar").unlink()
    assert {role: state for role, (state, _) in states(artifact).items()} == {
        "trained_on": "gone", "judge": "by name", "data.train": "gone", "base": "gone",
    }  # fmt: skip
    assert list(lineage.changed_inputs(artifact)) == [("shard.tar", "gone")]


def test_what_was_pruned_is_known_by_its_record(artifact):
    record.write_json(Path("recovered/pruned.json"), {"files": ["transformer/weights.bin"]})
    (Path("recovered") / "transformer/weights.bin").unlink()
    above = next(lineage.parents(artifact))
    assert (above.state, above.location, above.artifact) == ("pruned", "recovered", record.read("recovered"))
    assert next(lineage.parents(artifact, {above.id: record.read("recovered")})).state == "pruned"


def test_a_record_that_became_unreadable_is_another_one(artifact):
    (Path("recovered") / "artifact.json").write_text("{")
    assert states(artifact)["trained_on"][0] == "changed"


def test_a_parent_is_found_by_its_id_beside_the_artifact_and_in_the_cache(artifact):
    above = record.read("recovered")
    for one in (artifact.uri, "recovered"):
        store.push(one, "store")
    store.pull(f"store/{above.id}")
    shutil.rmtree("recovered")
    assert states(artifact)["trained_on"] == ("there", f"{store.CACHE}/{above.id}")
    assert states(record.read(f"store/{artifact.id}"))["trained_on"] == ("there", f"store/{above.id}")
    assert states(record.read(f"store/{artifact.id}"))["base"] == ("there", "model")


def test_parents_in_s3_are_looked_at_and_told_apart_from_stores_that_are_not_reached(artifact, proxy):
    above = store.push("recovered", "s3://store/models")
    child = make(Config("child"), {"trained_on": above, "base": f"s3://store/models/{'0' * 64}"})
    assert states(child) == {"trained_on": ("there", above), "base": ("gone", f"s3://store/models/{'0' * 64}")}
    ancestor = next(lineage.parents(child)).artifact
    assert ancestor is not None
    assert ancestor.id == record.read("recovered").id
    with environment(**s3_environment("http://127.0.0.1:1"), AWS_MAX_ATTEMPTS="1"):
        assert states(child)["trained_on"] == ("not reached", above)
        store_folder = f"{store.CACHE}/{ancestor.id}"
        shutil.copytree("recovered", store_folder)
        assert states(child)["trained_on"] == ("there", store_folder)
