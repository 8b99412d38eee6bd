"""Every exit code of the README's table, each from a run that really ends that way; and what it leaves behind."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from dev2pro import errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def args(tiny, tiny_data, tmp_path) -> list[str]:
    """Arguments of a quick recover run on six pictures."""
    return [
        f"out={tmp_path}/out", f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/folder]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", f"data.read.cache={tmp_path}/cache",
        "data.read.workers=0", "steps=4", "batch=4", "optim.warmup=0", "probe.bins=2", "probe.every=2", "checkpoint.every=2", "save_dtype=float32",
    ]  # fmt: skip


def test_0_done(args, run_stage):
    assert run_stage("recover", *args)[0] == 0


def test_2_a_bad_configuration_starts_nothing(args, tmp_path, run_stage):
    code, stderr = run_stage("recover", *args, "optim.schedule=sawtooth")
    assert (code, "optim.schedule=sawtooth is unknown" in stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_3_bad_data(args, tmp_path, run_stage):
    (tmp_path / "shard.tar").write_bytes(b"no tar at all")
    code, stderr = run_stage("recover", *args, f"data.train=[{tmp_path}/shard.tar]")
    assert (code, "is not indexed" in stderr) == (3, True)


def test_4_no_room_for_a_checkpoint(args, tiny, disk, run_stage, monkeypatch):
    monkeypatch.setattr("dev2pro.training.checkpoint_space.check", lambda *_, **__: None)  # others have filled the disk since
    mount = disk(1)
    code, stderr = run_stage("lora", *[word for word in args if not word.startswith("save_dtype")], f"out={mount}/out", f"trained_on={tiny}")
    assert code == 4
    assert re.search(r"A checkpoint could not be written into .*A checkpoint needs [\d.]+ GB in .*, and [\d.]+ GB are free\. Make room", stderr)
    assert (mount / "out/metrics.jsonl").read_text().count("\n") >= 2
    assert not list(mount.rglob("*.partial"))


@pytest.mark.parametrize("stage", ["recover", "lora", "distill"])
def test_4_no_room_is_told_before_anything_is_encoded(stage, args, tiny, disk, run_stage, monkeypatch):
    monkeypatch.setattr("dev2pro.training.feed.prepare", lambda *_: pytest.fail("it went on"))
    words = [word for word in args if not word.startswith("save_dtype")] if stage == "lora" else args
    more = {"recover": [], "lora": [f"trained_on={tiny}"], "distill": [f"teacher={tiny}"]}[stage]
    code, stderr = run_stage(stage, *words, *more, f"out={disk(1)}/out")
    assert code == 4
    assert re.search(r"This run needs [\d.]+ GB in .*/out: up to 2 checkpoints of [\d.]+ GB .* Make room, or choose another out=\.", stderr)


def test_5_a_loss_that_is_not_finite(args, tmp_path, run_stage):
    code, stderr = run_stage("recover", *args, "optim.lr=1", "optim.weight_decay=10", "guard.spike=0", "guard.collapse=0", "checkpoint.every=1")
    assert code == 5
    assert re.search(r"of step [1-3] is not finite", stderr)
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")]  # and the last good one is there


def test_5_a_held_out_loss_that_collapses(args, run_stage):
    code, stderr = run_stage("recover", *args, "optim.lr=1", "guard.collapse=1.5")
    assert (code, "more than guard.collapse=1.5 times the lowest" in stderr) == (5, True)


def test_75_a_server_that_is_away(args, run_stage):
    code, stderr = run_stage("recover", *args, "data.train=['http://127.0.0.1:1/0.tar']", "data.read.retries=0")
    assert (code, "could not be read in 1 tries" in stderr) == (75, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_130_asked_to_stop_it_saves_and_the_same_command_goes_on(args, tmp_path, run_stage, number):
    many = [*args, "steps=3000", "probe.every=3000", "checkpoint.every=3000"]
    rows = tmp_path / "out/metrics.jsonl"

    def ask() -> None:
        while not rows.exists() or not rows.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    code, stderr = run_stage("recover", *many)
    asking.join()
    assert code == 130
    step = int(re.search(r"interrupted after step (\d+) of 3000\. The same command goes on from there", stderr)[1])
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    code, stderr = run_stage("recover", *args, f"steps={step}", "probe.every=3000", "checkpoint.every=3000")
    assert (code, f"steps is 3000 there and {step} here" in stderr) == (2, True)


def test_the_readme_has_them_all():
    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.StageError)}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)}
    assert listed == codes | {0}
