"""Models are trained with the loss that is asked for: every loss of a stage runs, another one trains other weights, and the record says which."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.models import flux1, lora

ARMS = {
    "plain": ["guidance=3.5"],
    "range": ["guidance=3.5", "loss.guidance_range=[2,6]"],
    "bypassed": ["guidance=3.5", "loss.bypass_guidance=true"],
    "guidance": ["guidance=3.5", "loss.name=guidance"],
    "guidance over a range": ["guidance=3.5", "loss.name=guidance", "loss.guidance_range=[2,6]"],
    "cfg augmented": ["guidance=3.5", "loss.name=cfg_augmented"],
    "another's empty caption": ["guidance=3.5", "loss.name=guidance", "loss.teacher={other}"],
    "model guidance": ["guidance=3.5", "loss.name=model_guidance", "loss.teacher={other}"],
    "redistilled": ["guidance=3.5", "loss.name=distillation", "loss.guidance_range=[2,6]", "loss.teacher={other}"],
}


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory) -> Path:
    """A model of the base's shape with other weights, as a recovered one is."""
    folder = tmp_path_factory.mktemp("other")
    model = flux1.load_transformer(str(tiny))
    with torch.no_grad():
        model.proj_out.weight.mul_(1.5)
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def train(tiny, tiny_data, other, tmp_path, run_stage):
    """Trains an arm for two steps: (weights, losses, record)."""

    def run(name: str, *more: str, fails: bool = False) -> tuple:
        out = tmp_path / name.replace(" ", "-").replace("'", "")
        code, stderr = run_stage(
            "lora", f"model.path={tiny}", f"trained_on={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", "steps=2", "batch=4",
            "optim.warmup=0", "optim.lr=1e-2", "probe.bins=2", "probe.samples=2", "preview.pictures=0", f"out={out}",
            *(word.format(other=other) for word in (*ARMS.get(name, ARMS["redistilled"] if "redistilled" in name else []), *more)),
            *([f"trained_on={other}"] if name == "on the other" else []),
        )  # fmt: skip
        if fails:
            return code, stderr
        assert code == 0, stderr
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "lr" in json.loads(line)]
        return load_file(out / "pytorch_lora_weights.safetensors"), losses, json.loads((out / "artifact.json").read_text())

    return run


def test_every_arm_trains_weights_of_its_own_and_is_on_record(train, other):
    runs = {name: train(name) for name in ARMS}
    weights = {name: torch.cat([value.flatten() for value in run[0].values()]) for name, run in runs.items()}
    one_loss = {"guidance", "cfg augmented"}  # at one guidance, but for the size of the gradient
    for name, flat in weights.items():
        assert torch.isfinite(flat).all()
        assert not any(torch.allclose(flat, weights[rival], atol=1e-5) for rival in ARMS if rival != name and {rival, name} != one_loss), name
    assert runs["cfg augmented"][1][0] == pytest.approx(runs["guidance"][1][0] / 3.5**2, rel=1e-4)
    for name, (_, _, artifact) in runs.items():
        assert ("loss" in artifact["config"]) == (name != "plain"), "a run of before keeps its id"
        assert artifact["inference"]["training_guidance"] == ([2.0, 6.0] if "range" in name or name == "redistilled" else 3.5)
    parents = {parent["role"]: parent["uri"] for parent in runs["another's empty caption"][2]["parents"]}
    assert parents["teacher"] == str(other)
    assert "teacher" not in {parent["role"] for parent in runs["guidance"][2]["parents"]}


def test_a_distilled_lora_begins_from_its_teacher_s_and_names_all_it_came_from(tiny, other, train, tmp_path):
    _, _, first = train("on the other")
    theirs = tmp_path / "on-the-other"
    weights, losses, artifact = train("redistilled from it", f"start={theirs}", f"loss.teacher_lora={theirs}")
    parents = {parent["role"]: parent["id"] for parent in artifact["parents"]}
    assert parents["start"] == parents["teacher_lora"] == first["id"]
    assert losses[0] != pytest.approx(train("redistilled")[1][0], rel=1e-3)
    started = load_file(theirs / "pytorch_lora_weights.safetensors")
    steps = {key: (weights[key] - started[key]).abs().max().item() for key in started}
    assert 0 < max(steps.values()) < 0.1, "two steps from where it began"

    merged = flux1.load_transformer(str(other))
    lora.merge(merged, str(theirs))
    loaded = flux1.load_transformer(str(other))
    lora.load_lora(loaded, str(theirs))
    draw = torch.Generator().manual_seed(0)
    x, prompt, pooled = (torch.randn(1, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
    at = x, torch.tensor([0.5]), flux1.build_conditioning(prompt, pooled, (4, 4)), 1.0
    torch.testing.assert_close(flux1.predict(merged, *at), flux1.predict(loaded, *at), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(flux1.predict(merged, *at), flux1.predict(flux1.load_transformer(str(other)), *at), atol=1e-3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start={lora}", "adapter.rank=3"], "has other layers or another rank than adapter.rank=3"),
        (["start={lora}", "adapter.targets=all"], "adapter.targets=all make"),
        (["loss.name=distillation", "loss.teacher={tiny}", "loss.teacher_lora={lora}"], "was trained on"),
        (["start=nowhere"], "nowhere"),
        (["loss.name=distillation", "loss.teacher={other}", "loss.teacher_lora={foreign}"], "does not fit this transformer"),
    ],
)
def test_a_lora_that_does_not_belong_is_refused(more, said, tiny, other, train, tmp_path):
    train("on the other")
    foreign = tmp_path / "foreign.safetensors"
    save_file({f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.ones(3, 3) for half in "AB"}, foreign)
    words = (word.format(lora=tmp_path / "on-the-other", tiny=tiny, other=other, foreign=foreign) for word in more)
    code, stderr = train("refused", *words, fails=True)
    assert code == 2, stderr
    assert said in stderr
    assert not (tmp_path / "refused").exists(), "it is known before anything is begun"


def test_with_the_whole_recovery_as_its_training_adapter_a_lora_is_trained_as_on_the_recovered_model(tiny, other, train, tmp_path, run_stage):
    code, stderr = run_stage("extract", f"model.path={tiny}", f"recovered={other}", "rank=1000", "hardware=cpu", f"out={tmp_path}/adapter")
    assert code == 0, stderr
    extracted = json.loads((tmp_path / "adapter/artifact.json").read_text())
    assert max(extracted["metrics"]["lost"].values()) < 1e-5
    on_other, losses, _ = train("on the other", "guidance=1")
    merged, same_losses, artifact = train("with an adapter", "guidance=1", f"training_adapter={tmp_path}/adapter")
    assert losses == pytest.approx(same_losses, rel=1e-4)
    for key, value in on_other.items():
        torch.testing.assert_close(merged[key], value, atol=2e-3, rtol=2e-2)
    assert {parent["role"]: parent["id"] for parent in artifact["parents"]}["training_adapter"] == extracted["id"]
    code, stderr = train("refused", "guidance=1", f"training_adapter={tmp_path}/adapter", f"trained_on={other}", fails=True)
    assert code == 2
    assert "was made for another base than trained_on=" in stderr
    code, stderr = train("refused", "guidance=3.5", f"training_adapter={tmp_path}/adapter", fails=True)
    assert code == 2
    assert "knows no other" in stderr


def test_a_lora_trained_on_the_base_at_guidance_1_is_a_training_adapter(tiny, train, tmp_path):
    """Recovery as a LoRA: merged into the base it is the model that another LoRA is then trained on, and no part of that one."""
    _, _, recovery = train("recovery", "guidance=1", "adapter.targets=all", "caption_dropout=0.1")
    file, whole = tmp_path / "recovery", flux1.load_transformer(str(tiny))
    lora.merge(whole, str(file))
    whole.save_pretrained(tmp_path / "merged/transformer")
    expected, losses, _ = train("on the merged model", "guidance=1", f"trained_on={tmp_path}/merged")
    found, same_losses, artifact = train("through the adapter", "guidance=1", f"training_adapter={file}")
    assert same_losses == losses
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert {parent["role"]: parent["id"] for parent in artifact["parents"]}["training_adapter"] == recovery["id"]
    _, without, _ = train("without it", "guidance=1")
    assert without != losses
    code, stderr = train("refused", "guidance=1", f"training_adapter={file}", f"trained_on={tmp_path}/merged", fails=True)
    assert code == 2
    assert "was made for another base than trained_on=" in stderr
    code, stderr = train("refused", "guidance=3.5", f"training_adapter={file}", fails=True)
    assert code == 2
    assert "guidance=3.5, but" in stderr
    assert not (tmp_path / "refused").exists()


def test_a_training_adapter_that_was_trained_over_a_range_is_for_guidances_within_it(train, tmp_path):
    train("range")
    adapter = f"training_adapter={tmp_path}/range"
    for words in (["guidance=1"], ["guidance=3.5", "loss.guidance_range=[1,4]"], ["guidance=3.5", "loss.guidance_range=[2,6.5]"]):
        code, stderr = train("refused", *words, adapter, fails=True)
        assert code == 2, words
        assert "was recovered at guidances from 2.0 to 6.0 and knows no other" in stderr
    assert not (tmp_path / "refused").exists()
    train("plain", adapter)
    train("within", "guidance=1", "loss.guidance_range=[3,6]", adapter)
    train("recovery", "guidance=1")
    code, stderr = train("refused", "guidance=1", "loss.guidance_range=[1,4]", f"training_adapter={tmp_path}/recovery", fails=True)
    assert code == 2
    assert "loss.guidance_range=[1.0, 4.0], but" in stderr
    assert "Set guidance=1.0 instead" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.name=mse"], "loss.name=mse is unknown. Choose flow_matching, guidance, cfg_augmented, distillation or model_guidance."),
        (["loss.nam=guidance"], "nam"),
        (["loss.name=guidance", "loss.teacher=nowhere/at/all/x"], "nowhere/at/all/x"),
        (["loss.guidance_range=[-1,3]"], "guidance_range"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_before_anything_is_read(words, said, tiny, tmp_path, run_stage):
    code, stderr = run_stage("lora", f"model.path={tiny}", f"trained_on={tiny}", "hardware=cpu", f"out={tmp_path}/out", "data.train=[x]",
                             "data.heldout=[y]", *words)  # fmt: skip
    assert code == 2, stderr
    assert said in stderr
    assert not (tmp_path / "out").exists()


def test_distill_in_pairs_trains_other_weights_and_is_on_record(tiny, tiny_data, other, tmp_path, run_stage):
    found = {}
    for pairs in ("false", "true"):
        out = tmp_path / pairs
        code, stderr = run_stage(
            "distill", f"model.path={tiny}", f"teacher={other}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", "steps=2", "batch=4",
            "optim.warmup=0", "probe.bins=2", "probe.samples=2", "preview.pictures=0", "save_dtype=float32", f"pairs={pairs}", f"out={out}",
        )  # fmt: skip
        assert code == 0, stderr
        found[pairs] = load_file(out / "transformer/diffusion_pytorch_model.safetensors"), json.loads((out / "artifact.json").read_text())["config"]
    assert found["true"][1].get("pairs") is True
    assert "pairs" not in found["false"][1], "a run of before keeps its id"
    assert any(not torch.equal(found["true"][0][name], value) for name, value in found["false"][0].items())
