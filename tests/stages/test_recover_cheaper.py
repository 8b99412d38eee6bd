"""recover of some weights, with more noise, or up to a plateau: what each does, costs and records; without them nothing changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.artifacts import record
from tests.dev2pro.planning.configs import composed, planned

SMALL = ["steps=3", "batch=4", "optim.warmup=0", "optim.lr=1e-3", "probe.bins=2", "probe.samples=2", "preview.pictures=0", "save_dtype=float32"]
ATTENTION = "trainable=[*.attn.*]"


@pytest.fixture
def recover(tiny, tiny_data, tmp_path, run_stage):
    """Runs recover into a folder of this name: (exit code, stderr)."""

    def run(name: str, *words: str) -> tuple[int, str]:
        return run_stage(
            "recover", f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", *SMALL, *words,
            f"out={tmp_path}/{name}",
        )  # fmt: skip

    return run


def written(folder: Path) -> dict:
    return json.loads((folder / "artifact.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def test_a_subset_moves_and_the_rest_is_the_base_bit_for_bit(recover, tiny, tmp_path):
    assert recover("all")[0] == 0
    assert recover("attention", ATTENTION)[0] == 0
    base, every, some = weights(tiny), weights(tmp_path / "all"), weights(tmp_path / "attention")
    assert {name for name in base if not torch.equal(base[name], some[name])} == {name for name in base if ".attn." in name}
    assert sum(not torch.equal(base[name], every[name]) for name in base) > 0.9 * len(base)
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("checkpoint-3/*.safetensors")) for name in ("all", "attention")]
    assert sizes[1] < 0.5 * sizes[0], "what is frozen is in no checkpoint"
    assert written(tmp_path / "attention")["config"]["trainable"] == ["*.attn.*"]
    assert not {"trainable", "logit_mean", "stop"} & set(written(tmp_path / "all")["config"]), "a run of before keeps its id"
    code, stderr = recover("attention", "trainable=[*.ff.*]")
    assert code == 2
    assert "trainable is ['*.attn.*'] there" in stderr


def test_a_glob_without_a_weight_ends_before_anything_is_begun(recover, tmp_path):
    for plan in ("false", "true"):
        code, stderr = recover("none", "trainable=[*.attn.*,layers.7.*]", f"plan={plan}", "hardware.card_gb=80")
        assert (code, "trainable=layers.7.* matches no weight of" in stderr) == (2, True), stderr
    assert not (tmp_path / "none").exists()


def test_the_plan_counts_the_smaller_state():
    plans = {words: planned("recover", composed("recover", "experiment=miniature", *words)) for words in ((), (ATTENTION,))}
    every, some = plans.values()
    for part in ("gradients", "moments", "average"):
        assert 0 < some.gpu["train"][part] < 0.5 * every.gpu["train"][part], part
    assert some.gpu["train"]["weights"] == every.gpu["train"]["weights"]
    assert some.state < 0.5 * every.state
    assert some.disk["the result"] == every.disk["the result"], "the whole model is saved"
    assert some.flops["a step"] < every.flops["a step"]
    sharded = [planned("recover", composed("recover", "experiment=miniature", "hardware.shard=true", "hardware.ranks=2", *words)) for words in plans]
    assert sharded[1].gpu["train"]["a block's gradients"] < 0.5 * sharded[0].gpu["train"]["a block's gradients"]


def test_more_noise_is_another_training_measured_as_ever(recover, tmp_path):
    for name, words in (("usual", []), ("zero", ["logit_mean=0"]), ("more", ["logit_mean=1"])):
        assert recover(name, *words)[0] == 0
    usual, zero, more = (written(tmp_path / name) for name in ("usual", "zero", "more"))
    assert zero["id"] == usual["id"]
    assert more["config"]["logit_mean"] == 1.0
    assert more["metrics"]["curve"][0] == usual["metrics"]["curve"][0], "the base is measured at the same times"
    assert more["metrics"]["curve"][-1]["loss"] != usual["metrics"]["curve"][-1]["loss"]
    code, stderr = recover("far", "logit_mean=6")
    assert (code, "logit_mean=6" in stderr) == (2, True)


STOP = ["steps=120", "probe.every=4", "checkpoint.every=8", "checkpoint.keep=99", "optim.schedule=constant", "ema=0.9", "stop=0.5"]


def test_a_run_ends_at_its_plateau_and_says_why_also_after_a_kill(recover, tmp_path):
    assert recover("whole", *STOP)[0] == 0
    whole, out = written(tmp_path / "whole"), tmp_path / "whole"
    done, stopped = whole["step"], whole["metrics"]["stopped"]
    assert done < 120
    assert whole["metrics"]["curve"][-1]["step"] == done
    assert stopped["of_steps"] == 120
    assert 0 <= stopped["could_gain"] < 0.5 * stopped["gained"]
    assert (out / f"checkpoint-{done}").is_dir()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == done
    bits = weights(out)
    for lost in ((), (done,)):  # killed while it saved the result, or before its last checkpoint was there
        (out / record.RECORD).unlink()
        shutil.rmtree(out / "transformer")
        for step in lost:
            shutil.rmtree(out / f"checkpoint-{step}")
        assert recover("whole", *STOP)[0] == 0
        assert written(out)["id"] == whole["id"]
        assert all(torch.equal(value, bits[name]) for name, value in weights(out).items())


def test_with_more_steps_it_is_judged_anew_from_where_it_ended(recover, tmp_path):
    assert recover("run", *STOP)[0] == 0
    done = written(tmp_path / "run")["step"]
    assert recover("run", *STOP, "steps=128")[0] == 0
    assert done <= written(tmp_path / "run")["step"] <= 128
    assert written(tmp_path / "run")["config"]["steps"] == 128


def test_the_ledger_is_told_of_the_steps_that_were_made(recover, tmp_path):
    assert recover("run", *STOP, f"ledger={tmp_path}/ledger.jsonl")[0] == 0
    artifact = written(tmp_path / "run")
    told = json.loads((tmp_path / "ledger.jsonl").read_text())
    assert told["epochs"] == pytest.approx(artifact["step"] / artifact["metrics"]["data"]["steps_per_epoch"], rel=1e-3)
