"""Every stage refuses a model that it cannot use before it encodes or samples anything, whichever setting names it."""

import json
import shutil
from pathlib import Path

import pytest

TRAINING = ("recover", "lora", "distill")


@pytest.fixture
def quantised(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "quantised"))
    config = json.loads((folder / "text_encoder_2/config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "text_encoder_2/config.json").write_text(json.dumps(config))
    config = json.loads((folder / "transformer/config.json").read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def args(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a training; reading any weights, or acquiring the folder of the run, fails."""
    for name in ("AutoencoderKL", "FluxPipeline", "FluxTransformer2DModel"):
        monkeypatch.setattr(f"dev2pro.models.flux1.{name}.from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr("dev2pro.artifacts.run_folder.acquire", lambda *_: pytest.fail("it went on"))
    return [
        f"out={tmp_path}/out", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/folder]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "model", "setting"),
    [
        ("recover", "quantised", None), ("recover", "tiny", "start"), ("recover", "tiny", "teacher"), ("lora", "quantised", "trained_on"),
        ("lora", "tiny", "trained_on"), ("distill", "quantised", None), ("distill", "tiny", "teacher"),
    ],
)  # fmt: skip
def test_a_quantised_model(stage, model, setting, args, tiny, quantised, tmp_path, run_stage):
    others = {"recover": {}, "lora": {"trained_on": tiny}, "distill": {"teacher": tiny}}[stage]
    others |= {setting: quantised} if setting and model == "tiny" else {}
    code, stderr = run_stage(
        stage, *args, f"model.path={tiny if model == 'tiny' else quantised}", *(f"{key}={value}" for key, value in others.items())
    )
    assert code == 2, stderr
    assert f"The model in {quantised} cannot be read: " in stderr
    assert "is that of a quantised model" in stderr
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_of_encode(args, quantised, tiny_data, tmp_path, run_stage):
    words = [word for word in args if not word.startswith("data.")]
    code, stderr = run_stage("encode", *words, f"model.path={quantised}", f"shards=[{tiny_data}/heldout.tar]", f"to={tmp_path}/to", "resolution=32",
                             "bucket_step=8")  # fmt: skip
    assert code == 2, stderr
    assert "text_encoder_2/config.json is that of a quantised model (bitsandbytes)" in stderr


def test_the_cure_of_a_variant_works(args, tiny, quantised, tmp_path, run_stage, monkeypatch):
    model = Path(shutil.copytree(tiny, tmp_path / "fp16"))
    for file in ("transformer/diffusion_pytorch_model", "text_encoder_2/model"):
        (model / f"{file}.safetensors").rename(model / f"{file}.fp16.safetensors")
    code, stderr = run_stage("lora", *args, f"model.path={tiny}", f"trained_on={model}")
    assert (code, "model.variant=fp16" in stderr) == (2, True)
    monkeypatch.undo()
    words = ["steps=1", "batch=2", "optim.warmup=0", "probe.bins=2", "probe.samples=2", "preview.pictures=0", "model.variant=fp16"]
    code, stderr = run_stage("lora", *args, *words, f"model.path={tiny}", f"trained_on={model}")
    assert code == 0, stderr
    code, stderr = run_stage("lora", *args, *words, f"model.path={model}", f"trained_on={tiny}", f"out={tmp_path}/two")
    assert code == 0, stderr
