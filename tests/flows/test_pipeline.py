"""The main path end to end: real Prefect server, real stage processes, the bundled miniature, a few steps of everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel

from dev2pro import draws
from dev2pro.artifacts import record
from dev2pro.artifacts.record import ROOT

BASE = str(ROOT / "data/miniature/pipeline")
OUT, KILLED = "runs/test-pipeline", "runs/test-pipeline-killed"
ARMS = ("base@1", "recovered@1", "teacher@1")


def environment(home: Path) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PREFECT_HOME": str(home)}


def start(*args: str, home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flows.pipeline", *args]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=600, check=False)


def start_and_kill(*args: str, home: Path) -> None:
    """Kills the flow, with -9 and without a word to its stages, once recover has trained a step."""
    command = [sys.executable, "-m", "flows.pipeline", *args]
    child = subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    rows = ROOT / KILLED / "recover/metrics.jsonl"
    while not (rows.exists() and rows.read_text()):
        assert child.poll() is None
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def first(home):
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    yield start("plan=smoke", f"out={OUT}", home=home)
    shutil.rmtree(ROOT / OUT, ignore_errors=True)


def test_it_ends_well_and_leaves_every_artifact(first):
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Report: " in first.stdout
    for folder in ("recover", *(f"lora/chalk/{arm}" for arm in ARMS), "evaluate"):
        artifact = record.read(str(ROOT / OUT / folder))
        assert artifact.stage == folder.split("/")[0]
        assert artifact.parents


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_flow_s_stage_has_saved_the_next_flow_goes_on_and_a_third_skips_everything(home):
    shutil.rmtree(ROOT / KILLED, ignore_errors=True)
    try:
        start_and_kill("plan=smoke", f"out={KILLED}", home=home)
        second = start("plan=smoke", f"out={KILLED}", home=home)
        assert second.returncode == 0, second.stdout + second.stderr
        assert "going on after step" in second.stdout + second.stderr or "recover: finished before, skipped" in second.stdout + second.stderr
        before = {p: p.stat().st_mtime_ns for p in (ROOT / KILLED).rglob("artifact.json")}
        third = start("plan=smoke", f"out={KILLED}", home=home)
        assert third.returncode == 0, third.stdout + third.stderr
        assert (third.stdout + third.stderr).count("skipped") == len(before) == 5
        assert {p: p.stat().st_mtime_ns for p in before} == before
    finally:
        shutil.rmtree(ROOT / KILLED, ignore_errors=True)


def test_progress_is_shown(first):
    assert "recover (dev2pro): 6/6" in first.stdout + first.stderr


def test_recovery_reports_the_way_to_the_teacher(first):
    metrics = record.read(str(ROOT / OUT / "recover")).metrics
    assert metrics["guidance"] == 1.0
    assert [row["step"] for row in metrics["curve"]] == [0, 3, 6]
    assert metrics["curve"][0]["teacher_distance"] > metrics["curve"][-1]["teacher_distance"]
    assert 0 < metrics["share_outside"] < 1
    assert metrics["steps_per_second"] > 0


def test_evaluation_holds_every_cell(first):
    metrics = json.loads((ROOT / OUT / "evaluate/metrics.json").read_text())
    cells = {(c["arm"], c["inference"]) for c in metrics["cells"]}
    assert cells == {(a, i) for a in ("none", *ARMS) for i in ("base", "recovered")} | {("ideal", "teacher")}
    assert {g["rival"] for g in metrics["gains"]} == {"base@1"}
    assert (ROOT / OUT / "evaluate/report.html").stat().st_size > 20_000
    assert list((ROOT / OUT / "evaluate/sheets").glob("*.png"))


@pytest.mark.slow
@pytest.mark.ci
def test_a_failing_stage_fails_the_flow_and_keeps_its_exit_code(home):
    bad = ROOT / "conf/pipeline/test-bad.yaml"
    plan = yaml.safe_load((ROOT / "conf/pipeline/smoke.yaml").read_text())
    arms = {"recovered@1": plan["arms"]["recovered@1"]}
    bad.write_text(yaml.safe_dump({**plan, "arms": arms, "recover": {"data.name": "nowhere"}}))
    try:
        ended = start("plan=test-bad", f"out={OUT}-bad", home=home)
    finally:
        bad.unlink()
        shutil.rmtree(ROOT / f"{OUT}-bad", ignore_errors=True)
    assert ended.returncode == 3
    assert "nowhere" in ended.stderr


@pytest.mark.parametrize("args", [("plan=../../etc",), ("out=/etc/run",), ("out=runs/../x",), ("seed=many",), ("sed=1",), ("plan=nobody",)])
def test_bad_parameters_are_refused_before_anything_starts(args, monkeypatch, capsys):
    from flows import pipeline

    monkeypatch.setattr(pipeline, "pipeline", lambda form: pytest.fail("it started"))
    assert pipeline.main(list(args)) == 2
    assert args[0].split("=")[0] in capsys.readouterr().err


def test_stock_diffusers_loads_what_was_written_and_draws_the_same(first):
    """The transformer and the LoRA through diffusers alone: the same pictures as evaluate's, within 1e-3 of a pixel's range."""
    from dev2pro.judging.cells import Inference
    from dev2pro.judging.sampler import Sampler
    from dev2pro.models.flux1 import ModelConfig
    from dev2pro.models.sampling import SamplingConfig

    loaded = FluxTransformer2DModel.from_pretrained(ROOT / OUT / "recover", subfolder="transformer", dtype=torch.float32)
    style = str(ROOT / OUT / "lora/chalk/recovered@1")
    for transformer, path, guidance in ((None, BASE, 3.5), (loaded, str(ROOT / OUT / "recover"), 1.0)):
        sampler = Sampler(
            ModelConfig(path=BASE, usual_guidance=3.5, max_sequence_length=8), SamplingConfig(steps=4, cfg_scale=3.5, batch=8),
            ["a handwritten two", "a handwritten six"], seeds=1, seed=7, resolution=32, dtype=torch.float32,
            encoder_dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        sampler.apply(Inference("x", path, guidance, 1.0), style)
        ours = sampler.sample(range(2))
        stock = FluxPipeline.from_pretrained(BASE, dtype=torch.float32, **({"transformer": transformer} if transformer else {}))
        stock.set_progress_bar_config(disable=True)
        stock.load_lora_weights(style)
        noise = torch.stack([draws.normal(7, "picture", 0, [p], (16, 16))[0] for p in range(2)])
        theirs = stock(
            ["a handwritten two", "a handwritten six"], height=32, width=32, num_inference_steps=4, guidance_scale=guidance, latents=noise,
            max_sequence_length=8, output_type="pt",
        ).images  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
