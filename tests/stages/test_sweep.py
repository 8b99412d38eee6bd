"""Sweeps: real ones, of stages on the miniature and on six pictures."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev2pro.artifacts import record
from dev2pro.sweeps.sweep import Sweep

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSE = ["experiment=miniature", "probe.bins=2"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def lora(tiny, tiny_data, tmp_path) -> list[str]:
    """A quick LoRA on six pictures."""
    return [
        f"model.path={tiny}", f"trained_on={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/folder]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", f"data.read.cache={tmp_path}/cache",
        "data.read.workers=0", "batch=4", "optim.warmup=0", "probe.bins=2", "probe.samples=2", "preview.pictures=0",
    ]  # fmt: skip


def test_a_sweep_goes_on_after_a_failed_job_and_a_finished_one_is_skipped(tmp_path, run_stage):
    sweep = tmp_path / "sweep"
    words = ["-m", *DIAGNOSE, "probe.samples=4,2", "line=[2,6],[7,2]", f"out={sweep}"]
    code, stderr = run_stage("diagnose", *words)
    assert code == 2
    assert "line=[7.0, 2.0] is no line." in stderr
    assert "diagnose: 2 of 4 jobs failed: line=_7_2_,probe.samples=4-" in stderr

    table = rows(sweep)
    assert list(table[0]) == ["probe.samples", "line", "loss", "loss_usual", "response", "acts_like", "exit_code", "out"]
    assert [(row["line"], row["exit_code"]) for row in table] == [("[2,6]", "0")] * 2 + [("[7,2]", "2")] * 2
    losses = [float(row["loss"]) for row in table[:2]]
    assert losses == sorted(losses)
    assert losses[0] != losses[1]
    assert table[2]["loss"] == ""
    done = [record.read(row["out"]) for row in table[:2]]
    assert sorted(path.name for path in sweep.iterdir()) == sorted(["sweep.csv", *(Path(one.uri).name for one in done)])

    alone = [word for word in done[0].command if not word.startswith("out=")]
    assert run_stage("diagnose", *alone, f"out={tmp_path}/alone")[0] == 0
    assert record.read(f"{tmp_path}/alone").id == done[0].id  # the same bits as without a sweep

    written = [(Path(one.uri) / record.RECORD).stat().st_mtime_ns for one in done]
    assert run_stage("diagnose", *words)[0] == 2
    assert [(Path(one.uri) / record.RECORD).stat().st_mtime_ns for one in done] == written
    assert rows(sweep) == table


def test_loras_of_a_sweep_have_their_losses_and_speeds(lora, tmp_path, run_stage):
    words = [*lora, "steps=2", "adapter.rank=2,4", "optim.lr=1e-3", "arm=r${adapter.rank}"]
    code, stderr = run_stage("lora", "--multirun", *words, f"out={tmp_path}/sweep")
    assert (code, "failed" in stderr) == (0, False)
    table = rows(tmp_path / "sweep")
    assert {row["adapter.rank"] for row in table} == {"2", "4"}
    for row in table:
        artifact = record.read(row["out"])
        assert Path(row["out"]) == tmp_path / "sweep" / f"adapter.rank={row['adapter.rank']}"
        assert float(row["held_out_loss"]) == artifact.metrics["curve"][-1]["loss"]
        assert float(row["steps_per_second"]) == artifact.metrics["steps_per_second"]
        assert artifact.inference["arm"] == f"r{row['adapter.rank']}"


def test_texts_are_swept_too_and_alike_ones_have_folders_of_their_own(lora, tmp_path, run_stage, tiny):
    (tmp_path / "a").mkdir()
    for name in ("a/b", "a_b"):
        (tmp_path / name).symlink_to(tiny)
    bases = f"trained_on={tmp_path}/a/b,{tmp_path}/a_b"
    assert run_stage("lora", "-m", *lora, bases, "steps=1", f"out={tmp_path}/sweep")[0] == 0
    assert {row["trained_on"] for row in rows(tmp_path / "sweep")} == {f"{tmp_path}/a/b", f"{tmp_path}/a_b"}
    assert len({record.read(row["out"]).uri for row in rows(tmp_path / "sweep")}) == 2


@pytest.mark.parametrize(("only", "code"), [("check=true", 2), ("plan=true", 0)])
def test_nothing_is_written_by_a_check_or_a_plan(lora, tmp_path, run_stage, only, code):
    swept = "adapter.rank=4,0" if code else "adapter.rank=4,2"
    assert run_stage("lora", "-m", *lora, swept, only, f"out={tmp_path}/sweep")[0] == code
    assert not (tmp_path / "sweep").exists()


def test_a_signal_stops_the_sweep_as_a_single_run_and_the_same_command_goes_on(lora, tmp_path, run_stage):
    words = ["-m", *lora, "steps=40", "seed=1,2", f"out={tmp_path}/sweep"]
    child = subprocess.Popen([sys.executable, "-m", "stages.lora", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, end = tmp_path / "sweep/seed=1/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < end and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 130, stderr
    assert "asked to stop (SIGTERM): finishing the step and saving" in stderr
    assert "the sweep was stopped" in stderr
    assert "failed" not in stderr
    assert list((tmp_path / "sweep/seed=1").glob("checkpoint-*"))
    assert not (tmp_path / "sweep/seed=2").exists()
    assert {row["seed"]: row["exit_code"] for row in rows(tmp_path / "sweep")} == {"1": "130", "2": ""}

    assert run_stage("lora", *words)[0] == 0
    assert [row["exit_code"] for row in rows(tmp_path / "sweep")] == ["0", "0"]


def test_a_job_that_is_killed_ends_alone():
    sweep = Sweep("lora", [])
    assert sweep._in_child(lambda: os.kill(os.getpid(), signal.SIGKILL), []) == 137
    assert sweep._in_child(lambda: 5, []) == 5
    assert sweep._in_child(lambda: print(sys.argv[1:]) or sys.argv[1:] != ["a=1"], ["a=1"]) == 0
    assert sys.argv[1:] != ["a=1"]


def test_what_a_sweep_cannot_do_is_refused_before_any_job(lora, tmp_path, run_stage, monkeypatch):
    def refused(*words: str) -> str:
        code, stderr = run_stage("lora", "-m", *lora, *words)
        assert code == 2
        assert "Traceback" not in stderr
        return stderr

    assert "adapter.rank" in refused("adapter.rank=4,many", f"out={tmp_path}/out")
    assert "These values are required and were not given: out." in refused("seed=1,2")
    assert "Give one out= for the whole sweep." in refused("seed=1,2", f"out={tmp_path}/out-${{seed}}", "steps=0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot be a rank of torchrun" in refused("seed=1,2", f"out={tmp_path}/out")
    monkeypatch.undo()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / record.CONFIG).write_text("{}")
    assert "holds a run of its own" in refused("seed=1,2", f"out={tmp_path}/taken")
    assert not (tmp_path / "out").exists()
    assert "The sweep has seed=1 more than once." in refused("seed=1,1", f"out={tmp_path}/out")
