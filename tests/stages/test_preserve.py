"""Any arm can preserve what the base draws: without a weight nothing changes, at its start there is nothing to preserve, a killed run goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.models.flux1 import Encoders

TRIGGER = ["preserve.trigger=handwritten", "preserve.class_word=printed"]
ARMS = {
    "plain": [],
    "bypassed": ["loss.bypass_guidance=true"],
    "guidance over a range": ["loss.name=guidance", "loss.guidance_range=[2,6]"],
    "with a teacher": ["loss.name=cfg_augmented", "loss.teacher={tiny}"],
}


@pytest.fixture
def train(tiny, tiny_data, tmp_path, run_stage):
    """Trains a LoRA for two steps: (weights as one vector, losses, record)."""

    def run(name: str, *more: str, fails: bool = False) -> tuple:
        out = tmp_path / name.replace(" ", "-")
        code, stderr = run_stage(
            "lora", f"model.path={tiny}", f"trained_on={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/shard.tar]",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", "steps=2", "batch=4",
            "optim.warmup=0", "optim.lr=1e-2", "probe.bins=2", "probe.samples=2", "preview.pictures=0", "guidance=3.5", f"out={out}",
            *(word.format(tiny=tiny, tmp=tmp_path) for word in more),
        )  # fmt: skip
        if fails:
            return code, stderr
        assert code == 0, stderr
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "lr" in json.loads(line)]
        weights = torch.cat([value.flatten() for value in load_file(out / "pytorch_lora_weights.safetensors").values()])
        return weights, losses, json.loads((out / "artifact.json").read_text())

    return run


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_that_preserves_begins_as_without_and_then_learns_something_else(arm, train):
    without, losses, artifact = train("without", *ARMS[arm])
    for name, words in {"the class": TRIGGER, "the empty caption": []}.items():
        weights, with_losses, record = train(name, *ARMS[arm], "preserve.weight=1", *words)
        assert with_losses[0] == losses[0], "a LoRA without effect preserves everything"
        assert with_losses[1] != losses[1]
        assert not torch.allclose(weights, without, atol=1e-5)
        assert record["config"]["preserve"]["weight"] == 1.0
    assert "preserve" not in artifact["config"], "a run of before keeps its id"


def test_at_weight_zero_the_lora_is_the_one_without_bit_for_bit(train):
    without, zero = train("without"), train("zero", "preserve.weight=0", *TRIGGER)
    assert torch.equal(zero[0], without[0])
    assert zero[1] == without[1]


def test_the_term_is_added_with_its_weight(train):
    train("first")
    start = "start={tmp}/first"
    plain, once, twice = (train(f"weight {weight}", start, f"preserve.weight={weight}", *TRIGGER)[1][0] for weight in (0, 1, 2))
    assert once > plain
    assert twice - plain == pytest.approx(2 * (once - plain), rel=1e-3)


def test_killed_and_gone_on_it_is_the_same_bit_for_bit(train):
    whole, losses, _ = train("whole", "preserve.weight=1", *TRIGGER, "steps=3")
    train("in parts", "preserve.weight=1", *TRIGGER, "steps=1")
    parts, later, _ = train("in parts", "preserve.weight=1", *TRIGGER, "steps=3")
    assert torch.equal(parts, whole)
    assert later == losses


def test_class_captions_need_no_text_encoder_that_was_freed(train, tiny, tiny_data, tmp_path, run_stage, monkeypatch):
    code, stderr = run_stage(
        "encode", f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", "parts=[text]", f"shards=[{tiny_data}/shard.tar]",
        f"out={tmp_path}/encoded", f"to={tmp_path}/to", "resolution=32", "bucket_step=8", "aspect=1",
    )  # fmt: skip
    assert code == 0, stderr
    loaded, events = Encoders.__init__, list[str]()
    monkeypatch.setattr(Encoders, "__init__", lambda self, *args, **kwargs: events.append("loaded") or loaded(self, *args, **kwargs))
    free = Encoders.free
    monkeypatch.setattr(Encoders, "free", lambda self, *parts: events.append(f"freed {len(parts)}") or free(self, *parts))
    stored = ["data.train=[{tmp}/encoded/encoded.snapshot]", "data.stored=[text]"]
    runs = {}
    for name, words in {"cached": [], "streamed": ["data.flip=true"], "stored": stored}.items():
        runs[name] = train(name, "preserve.weight=1", *TRIGGER, *words)
        assert events[:2] == ["loaded", "freed 2"], "the text encoders went"
        assert events.count("loaded") == 1, "and were not asked for again"
        events.clear()
    assert runs["stored"][1] == pytest.approx(runs["cached"][1], rel=1e-4)  # another batch in the VAE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preserve.trigger=sks", "preserve.class_word=dog"], 'preserve.trigger=sks is in no caption of data.train; one is "a handwritten'),
        (["preserve.trigger=sks"], "belong together"),
        (["caption_dropout=0.1"], "caption_dropout=0.1 trains it"),
    ],
)
@pytest.mark.parametrize("check", ["false", "true"])
def test_what_cannot_be_preserved_is_refused_before_weights_are_loaded(words, said, check, train, tmp_path, monkeypatch):
    for kind in ("diffusers.FluxTransformer2DModel", "transformers.T5EncoderModel"):
        monkeypatch.setattr(f"{kind}.from_pretrained", lambda *_, **__: pytest.fail("it loaded weights"))
    code, stderr = train("refused", "preserve.weight=1", f"check={check}", *words, fails=True)
    assert code == 2, stderr
    assert said in stderr
    assert not list(Path(tmp_path).glob("refused/checkpoint*"))


def test_captions_without_the_trigger_are_told(train):
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr("accelerate.Accelerator.print", lambda _, *words, **__: told.append(" ".join(map(str, words))))
        train("told", "preserve.weight=1", "preserve.trigger=two", "preserve.class_word=three")
    assert any("5 of 6 different captions have no such word" in line for line in told)
