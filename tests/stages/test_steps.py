"""LoRAs of intermediate steps: what a run that ends there would save, the same after a kill, hashed on record and without a part in its id."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.artifacts import record, verify
from dev2pro.models import lora

STEPS = ["000002", "000004", "000006"]


@pytest.fixture
def train(tiny, tiny_data, tmp_path, run_stage):
    """Trains a LoRA into a folder below tmp_path."""

    def run(name: str, *more: str, steps: int = 7) -> tuple[int, str]:
        return run_stage(
            "lora", f"model.path={tiny}", f"trained_on={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", f"steps={steps}", "batch=4",
            "optim.warmup=0", "optim.schedule=constant", "optim.lr=1e-2", "probe.bins=2", "probe.samples=2", "preview.pictures=0", "adapter.rank=4",
            "adapter.alpha=8", "checkpoint.every=3", f"out={tmp_path}/{name}", *more,
        )  # fmt: skip

    return run


def files(out: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in (out / "steps").rglob("*.safetensors")}


def test_a_step_is_what_a_run_that_ends_there_would_save_and_the_artifact_keeps_its_id(train, tmp_path):
    assert train("out", "checkpoint.loras=2") == (0, "")
    whole = files(tmp_path / "out")
    assert sorted(whole) == STEPS
    assert train("short", "checkpoint.loras=2", steps=4) == (0, "")
    assert train("without") == (0, "")
    step, short = (load_file(tmp_path / path / lora.WEIGHTS) for path in ("out/steps/000004", "short"))
    assert step.keys() == short.keys()
    assert all(torch.equal(step[key], short[key]) for key in short)
    contract, kept = lora.read(str(tmp_path / "out/steps/000004"))[1], record.read(str(tmp_path / "out"))
    assert contract == kept.inference | {"step": 4}
    assert kept.id == record.read(str(tmp_path / "without")).id
    names = {entry["path"] for entry in kept.files}
    assert names >= {f"steps/{step}/{lora.WEIGHTS}" for step in STEPS}
    assert not list(verify.find_problems(kept))
    (tmp_path / "out/steps/000004" / lora.WEIGHTS).write_bytes(whole["000002"])
    assert [problem for problem in verify.find_problems(kept) if "steps/000004" in problem], "its hash is on record"
    assert train("short", "checkpoint.loras=2") == (0, "")  # now longer
    assert files(tmp_path / "short") == whole


def test_a_run_killed_while_it_writes_a_step_ends_with_the_same_files(train, tmp_path, monkeypatch):
    assert train("whole", "checkpoint.loras=2") == (0, "")
    written, fsync = list[int](), os.fsync

    def killed(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(f"steps/000006/{lora.WEIGHTS}.partial"):
            written.append(handle)
            raise RuntimeError("killed")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        code, stderr = train("out", "checkpoint.loras=2")
    assert (code, "killed" in stderr, len(written)) == (1, True, 1)
    out = tmp_path / "out"
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert sorted(files(out)) == STEPS[:2]
    assert train("out", "checkpoint.loras=2") == (0, "")
    assert [row["step"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == list(range(1, 8)), "it went on from step 3"
    assert files(out) == files(tmp_path / "whole")
    assert (out / lora.WEIGHTS).read_bytes() == (tmp_path / "whole" / lora.WEIGHTS).read_bytes()
    assert not list(out.rglob("*.partial"))


def test_steps_that_a_run_has_passed_are_told(train, monkeypatch):
    said: list[str] = []
    assert train("out", steps=6) == (0, "")
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    assert train("out", "checkpoint.loras=2", steps=6) == (0, "")
    assert train("out", "checkpoint.loras=4") == (0, "")
    told = [line.split(", as")[0] for line in said if line.startswith("checkpoint.loras=")]
    assert told == ["checkpoint.loras=2: 3 of them, of steps 2 to 6, are not kept", "checkpoint.loras=4: that of step 4 is not kept"]


def test_only_a_lora_has_them(tiny, run_stage, tmp_path):
    code, stderr = run_stage("recover", f"model.path={tiny}", f"out={tmp_path}/out", "checkpoint.loras=2")
    assert (code, "loras" in stderr) == (2, True)
