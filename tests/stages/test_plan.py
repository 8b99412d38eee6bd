"""`plan=true` for every stage: a table and an exit code, and nothing is written or loaded."""

import pytest
import torch

from dev2pro.planning import plan

MODEL = "data/miniature/pipeline"
DATA = ("experiment=miniature", "data.train=[nowhere]", "data.heldout=[nowhere]")
COMMANDS = {
    "recover": DATA,
    "lora": (*DATA, f"trained_on={MODEL}"),
    "distill": (*DATA, "teacher=data/miniature/teacher"),
    "encode": ("model=miniature", "hardware=cpu", "to=nowhere", "shards=[nowhere]", "resolution=32", "bucket_step=8"),
    "evaluate": ("experiment=miniature", "loras=[nowhere]"),
    "tune": ("experiment=miniature", "lora=nowhere"),
}
PHASES = {
    "recover": ("encode text", "encode pictures", "load", "train", "measure", "sample", "checkpoint", "save"),
    "encode": ("encode latents",),
    **dict.fromkeys(("evaluate", "tune"), ("encode", "load", "sample", "decode", "judge")),
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_plan_true_says_what_it_needs_and_ends(stage, run_stage, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("diffusers.FluxTransformer2DModel.from_pretrained", lambda *_, **__: pytest.fail("it read weights"))
    shown: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: shown.append(" ".join(map(str, words))))
    rates = ["hardware.tflops=100", "hardware.price=2", "hardware.card_gb=24"]
    code, _ = run_stage(stage, *COMMANDS[stage], f"out={tmp_path}/out", "plan=true", *rates)
    table = "\n".join(shown)
    assert code == 0, table
    for phase in PHASES.get(stage, PHASES["recover"]):
        assert f"\n  {phase:16}" in table
    assert "at 100 TFLOP/s" in table
    assert "It fits." in table
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", COMMANDS)
def test_what_does_not_fit_ends_with_the_code_of_a_bad_configuration(stage, run_stage, tmp_path):
    code, stderr = run_stage(stage, *COMMANDS[stage], f"out={tmp_path}/out", "plan=true", "hardware.card_gb=0.5")
    assert (code, f"{stage} needs " in stderr, " GB of a GPU that has 0.5, in " in stderr) == (2, True, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["hardware.int8_base=true"], "hardware.int8_base is for a frozen base"),
        (["hardware.dtype=bfloat16", "optim.name=adamw"], "rounded away"),
        (["hardware.step_in_backward=true", "hardware.micro_batch=4"], "Set batch=4"),
    ],
    ids=str,
)
def test_what_a_run_would_refuse_is_not_planned(keys, message, run_stage, tmp_path):
    code, stderr = run_stage("recover", *COMMANDS["recover"], f"out={tmp_path}/out", "plan=true", *keys)
    assert (code, message in stderr) == (2, True), stderr


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(run_stage, tmp_path):
    code, stderr = run_stage("recover", *COMMANDS["recover"], f"out={tmp_path}/out", "hardware.card_gb=0.5")
    assert (code, "recover needs " in stderr) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run on a GPU is always planned")
def test_a_run_on_a_cpu_is_not_planned(run_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "estimate", lambda *_: pytest.fail("it was planned"))
    code, stderr = run_stage("recover", *COMMANDS["recover"], f"out={tmp_path}/out")
    assert (code, "nowhere" in stderr) != (0, False)
