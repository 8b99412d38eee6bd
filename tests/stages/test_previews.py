"""Previews of a training stage: a sheet at every measurement, the same after a resume, without an effect on training."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def args(tiny, tiny_data, tmp_path) -> list[str]:
    """Two steps, and a measurement at every one."""
    return [
        f"out={tmp_path}/out", f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/folder]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", f"data.read.cache={tmp_path}/cache",
        "data.read.workers=0", "data.name=x", "steps=2", "batch=4", "optim.warmup=0", "optim.schedule=constant", "probe.bins=2", "probe.every=2",
        "preview.steps=2",
    ]  # fmt: skip


def sheets(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("previews/*")}


@pytest.mark.parametrize("stage", ["recover", "lora", "distill"])
def test_a_sheet_at_every_measurement_and_the_same_artifact_without_them(stage, args, tiny, tmp_path, run_stage, monkeypatch):
    more = {"recover": [], "lora": [f"trained_on={tiny}"], "distill": [f"teacher={tiny}"]}[stage]
    assert run_stage(stage, *args, *more, "steps=3")[0] == 0
    assert sorted(sheets(tmp_path / "out")) == ["000000.jpg", "000002.jpg", "000003.jpg"]
    monkeypatch.setattr("dev2pro.models.flux1.load_vae", lambda *_: pytest.fail("it was loaded"))
    assert run_stage(stage, *args, *more, "steps=3", "preview.pictures=0", f"out={tmp_path}/blind")[0] == 0
    assert not (tmp_path / "blind/previews").exists()
    previewed, blind = (json.loads((tmp_path / name / "artifact.json").read_text()) for name in ("out", "blind"))
    assert {f["path"] for f in previewed["files"]} - {f["path"] for f in blind["files"]} == {f"previews/{name}" for name in sheets(tmp_path / "out")}
    assert previewed["id"] == blind["id"]
    assert previewed["metrics"]["curve"] == blind["metrics"]["curve"]


def test_a_run_that_goes_on_draws_what_is_to_come_and_ends_with_the_same_sheets(args, tmp_path, run_stage):
    assert run_stage("recover", *args)[0] == 0
    drawn = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/previews").iterdir()}
    shutil.copy(tmp_path / "out/previews/000000.jpg", tmp_path / "out/previews/000004.jpg")  # as if killed after another one,
    (tmp_path / "out/preview.partial").write_bytes(b"half")  # and in the middle of one
    assert run_stage("recover", *args, "steps=5")[0] == 0
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn
    assert run_stage("recover", *args, "steps=5", f"out={tmp_path}/whole")[0] == 0
    assert sheets(tmp_path / "out") == sheets(tmp_path / "whole")
    assert sorted(sheets(tmp_path / "out")) == [f"{step:06d}.jpg" for step in (0, 2, 4, 5)]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_sheets_hold_no_folder_for_a_run_that_made_nothing_else(args, tmp_path, run_stage):
    stray = tmp_path / "out/previews/000250.jpg"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of a run that was killed before its first checkpoint")
    assert run_stage("recover", *args, "seed=1")[0] == 0
    assert not stray.exists()


@pytest.mark.parametrize(("word", "cure"), [("preview.pictures=-1", "0, which is off, to 16"), ("preview.pictures=17", "0, which is off, to 16"),
                                            ("preview.steps=0", "1 or more")])  # fmt: skip
def test_what_cannot_be_drawn_is_told(args, run_stage, word, cure):
    code, stderr = run_stage("recover", *args, word)
    assert (code, f"{word} cannot work. Choose {cure}." in stderr) == (2, True)
