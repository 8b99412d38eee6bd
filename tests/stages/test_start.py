"""recover goes on from what an earlier recover made: its weights, with a lineage that says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.artifacts import record, store

SMALL = ["steps=2", "batch=4", "optim.warmup=0", "probe.bins=2", "probe.samples=2", "save_dtype=float32", "seed=3"]


@pytest.fixture
def args(tiny, tiny_data, tmp_path) -> list[str]:
    return [
        f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", *SMALL,
    ]  # fmt: skip


def written(folder: Path) -> dict:
    return json.loads((folder / "artifact.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def test_it_goes_on_from_the_weights_and_says_so(args, tiny, tmp_path, run_stage):
    one, two, alone = (tmp_path / name for name in ("one", "two", "alone"))
    for out, start, teacher in ((one, "null", "null"), (two, one, one), (alone, "null", one)):
        more = ["optim.lr=1e-3"] if out == one else ["optim.lr=2e-3"]
        assert run_stage("recover", *args, *more, f"teacher={teacher}", f"start={start}", f"out={out}")[0] == 0
    first, second, third = map(written, (one, two, alone))
    assert [(p["role"], p["uri"]) for p in second["parents"]][:3] == [("base", str(tiny)), ("start", str(one)), ("teacher", str(one))]
    assert second["parents"][1]["id"] == first["id"]
    report = second["metrics"]["data"]["report"]
    assert json.loads((two / "data.json").read_text())["pictures"] == report["pictures"]
    assert (two / "data.html").is_file()
    assert report["pictures"] == second["metrics"]["data"]["samples"]
    assert "start" not in [parent["role"] for parent in first["parents"]]
    assert second["metrics"]["curve"][0]["loss"] == pytest.approx(first["metrics"]["curve"][-1]["loss"], rel=1e-5)
    assert second["metrics"]["curve"][0]["loss"] != third["metrics"]["curve"][0]["loss"]
    assert second["metrics"]["recovered"] is None, "it is the share of the base's distance, and this began elsewhere"
    assert third["metrics"]["recovered"] is not None
    assert any(not torch.equal(value, weights(alone)[key]) for key, value in weights(two).items())
    code, stderr = run_stage("recover", *args, "optim.lr=2e-3", f"teacher={one}", f"out={two}")
    assert code == 2
    assert "start is " in stderr
    assert "there and None here" in stderr


def test_its_start_may_lie_in_a_store(args, tmp_path, run_stage):
    assert run_stage("recover", *args, f"out={tmp_path}/one")[0] == 0
    address = store.push(str(tmp_path / "one"), str(tmp_path / "store"))
    assert run_stage("recover", *args, f"start={address}", f"out={tmp_path}/far")[0] == 0
    assert run_stage("recover", *args, f"start={tmp_path}/one", f"out={tmp_path}/near")[0] == 0
    far, near = written(tmp_path / "far"), written(tmp_path / "near")
    assert [parent["id"] for parent in far["parents"]] == [parent["id"] for parent in near["parents"]]
    assert all(torch.equal(value, weights(tmp_path / "near")[key]) for key, value in weights(tmp_path / "far").items())


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("other", "has another shape than the base"),
        ("nowhere", "does not exist"),
        ("pruned", "were removed to make room; only its record is left"),
        ("begun", "no finished artifact"),
    ],
)
def test_a_start_that_is_none_is_told_before_anything_is_begun(start, message, args, tiny, tmp_path, run_stage):
    config = json.loads((tiny / "transformer/config.json").read_text())
    for name in ("other", "pruned", "begun"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        written = config | {"num_layers": config["num_layers"] + 1, "_diffusers_version": "0.1"} if name == "other" else config
        (tmp_path / name / "transformer/config.json").write_text(json.dumps(written))
    record.write_json(tmp_path / "pruned/pruned.json", {"files": ["transformer/diffusion_pytorch_model.safetensors"]})
    record.write_json(tmp_path / "begun/config.json", {})
    code, stderr = run_stage("recover", *args, f"start={tmp_path}/{start}", f"out={tmp_path}/out")
    assert (code, message in stderr) == (2, True), stderr
    assert not (tmp_path / "out").exists()


def test_the_ledger_is_told_of_a_run_that_was_killed_before_it_could_be(args, tmp_path, run_stage):
    args = [*args, f"ledger={tmp_path}/ledger.jsonl", f"out={tmp_path}/one"]
    assert run_stage("recover", *args)[0] == 0
    (tmp_path / "ledger.jsonl").unlink()
    assert run_stage("recover", *args)[0] == 0
    assert json.loads((tmp_path / "ledger.jsonl").read_text())["run"] == written(tmp_path / "one")["id"]
