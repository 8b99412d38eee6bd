import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.artifacts import record
from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.models import flux1, model_folder, vae
from dev2pro.models.flux1 import Conditioning, Encoders, ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny pipeline, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def encoders(tiny) -> Encoders:
    return Encoders(ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8), torch.float32, CPU)


def change(config: Path, **values: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def refusal(check, path: Path | str) -> str:
    """The message of a ConfigError: one paragraph that names the path."""
    with pytest.raises(ConfigError) as caught:
        check(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- paths that hold no model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [model_folder.check_transformer, model_folder.check_pipeline, flux1.load_transformer])
@pytest.mark.parametrize("path", ["/nowhere/FLUX.1-dev", "runs/demo/recover", "data/miniature/nothing", "FLUX.1-dev", "a/b/c"])
def test_a_path_that_does_not_exist(check, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(check, path)
    assert "does not exist" in message
    assert "hub id such as black-forest-labs/FLUX.1-dev" in message


def test_a_hub_id_without_a_network_can_be_tried_again():
    with pytest.raises(TryAgainError, match=r"nobody/nothing is no local folder and could not be fetched.*hf auth login"):
        model_folder.check_transformer("nobody/nothing")


def test_a_file(tmp_path):
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"")
    for check in (model_folder.check_transformer, model_folder.check_pipeline):
        assert "is a file. Give a folder in diffusers layout" in refusal(check, tmp_path / "flux1-dev.safetensors")


def test_a_folder_without_a_pipeline(tmp_path):
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"")
    for check in (model_folder.check_transformer, model_folder.check_pipeline):
        assert "no diffusers pipeline folder" in refusal(check, tmp_path)


def test_a_stage_s_folder_counts_only_once_it_is_finished(model):
    (model / record.CONFIG).write_text("{}")
    for check in (model_folder.check_transformer, model_folder.check_pipeline):
        message = refusal(check, model)
        assert "no finished artifact" in message
        assert "Run the stage that makes it" in message


def test_a_stage_s_finished_folder_is_a_model(tiny, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copytree(tiny / "transformer", tmp_path / "transformer", dirs_exist_ok=True)
    assert model_folder.check_transformer(str(tmp_path))["guidance_embeds"] is True
    assert "model_index.json" in refusal(model_folder.check_pipeline, tmp_path)  # but no complete pipeline


# ---- folders that hold another model -------------------------------------------------------------------------------------------------


def test_a_pruned_model(tiny, tmp_path):
    shutil.copytree(tiny / "transformer", tmp_path / "recovered/transformer")
    (tmp_path / "recovered/pruned.json").write_text('{"files": ["transformer/diffusion_pytorch_model.safetensors"]}')
    assert "recovered were removed to make room; only its record is left" in refusal(model_folder.check_transformer, tmp_path / "recovered")


def test_another_transformer(model):
    change(model / "transformer/config.json", _class_name="SD3Transformer2DModel")
    message = refusal(model_folder.check_transformer, model)
    assert "SD3Transformer2DModel, not a FluxTransformer2DModel" in message
    assert "FLUX.1-dev" in message


def test_another_pipeline(model):
    change(model / "model_index.json", _class_name="StableDiffusion3Pipeline")
    message = refusal(model_folder.check_pipeline, model)
    assert "StableDiffusion3Pipeline, not a FluxPipeline" in message
    assert "model.path" in message


def test_a_transformer_without_a_guidance_input(model):
    change(model / "transformer/config.json", guidance_embeds=False)
    message = refusal(model_folder.check_transformer, model)
    assert "no guidance input" in message
    assert "FLUX.1-dev" in message


@pytest.mark.parametrize("damage", ["config gone", "config unreadable", "weights gone", "weights cut off", "a weight missing"])
def test_a_damaged_transformer(model, damage):
    config, weights = model / "transformer/config.json", model / "transformer/diffusion_pytorch_model.safetensors"
    {
        "config gone": config.unlink,
        "config unreadable": lambda: config.write_text("{"),
        "weights gone": weights.unlink,
        "weights cut off": lambda: weights.write_bytes(weights.read_bytes()[:-1000]),
        "a weight missing": lambda: save_file({k: v for k, v in load_file(weights).items() if k != "proj_out.weight"}, weights),
    }[damage]()
    message = refusal(flux1.load_transformer, model)
    assert "cannot be read" in message
    assert "Download or convert it again" in message


@pytest.mark.parametrize(
    "part", ["vae/config.json", "text_encoder_2/model.safetensors", "scheduler/scheduler_config.json", "tokenizer", "tokenizer_2/tokenizer.json"]
)
def test_a_pipeline_with_a_part_missing(model, part):
    shutil.rmtree(model / part) if (model / part).is_dir() else (model / part).unlink()
    message = refusal(lambda path: Encoders(ModelConfig(path=path, usual_guidance=3.5, max_sequence_length=8), torch.float32, CPU), model)
    assert "cannot be read" in message


# ---- calling the parts ---------------------------------------------------------------------------------------------------------------


def conditioning(count: int) -> Conditioning:
    return Conditioning(torch.randn(count, 8, 64), torch.randn(count, 64), torch.zeros(8, 3), flux1.image_ids(4, 4, CPU, torch.float32))


def test_a_prediction_has_the_shape_of_the_latents_and_knows_each_row(tiny):
    transformer, inputs = flux1.load_transformer(str(tiny)).eval(), conditioning(3)
    x, t, guidance = torch.randn(3, 16, 16), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([1.0, 3.5, 6.0])
    with torch.no_grad():
        whole = flux1.predict(transformer, x, t, inputs, guidance)
        assert whole.shape == x.shape
        for row in range(3):
            one = Conditioning(inputs.prompt[row, None], inputs.pooled[row, None], inputs.text_ids, inputs.image_ids)
            alone = flux1.predict(transformer, x[row, None], t[row, None], one, guidance[row].item())
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
        for other in (
            flux1.predict(transformer, x + 0.1, t, inputs, guidance),
            flux1.predict(transformer, x, t / 2, inputs, guidance),
            flux1.predict(transformer, x, t, conditioning(3), guidance),
            flux1.predict(transformer, x, t, inputs, 1.0)[1:],
        ):
            assert (other - whole[-len(other) :]).abs().max() > 1e-3


def test_a_prediction_in_the_precision_of_the_model(tiny):
    transformer, inputs = flux1.load_transformer(str(tiny), torch.bfloat16).eval(), conditioning(2)
    half = Conditioning(*(getattr(inputs, name).bfloat16() for name in ("prompt", "pooled", "text_ids", "image_ids")))
    with torch.no_grad():
        velocity = flux1.predict(transformer, torch.randn(2, 16, 16), torch.tensor([0.2, 0.7]), half, 3.5)
    assert velocity.dtype == torch.bfloat16


def test_weights_are_read_in_the_precision_asked_for(tiny):
    assert {p.dtype for p in flux1.load_transformer(str(tiny)).parameters()} == {torch.float32}
    assert {p.dtype for p in flux1.load_transformer(str(tiny), torch.bfloat16).parameters()} == {torch.bfloat16}


# ---- text and pictures -----------------------------------------------------------------------------------------------------------------


def test_text_has_a_state_per_token_and_one_pooled(encoders):
    prompt, pooled = encoders.encode_text(["", "a handwritten one", "a handwritten two"])
    assert (prompt.shape, pooled.shape) == ((3, 8, 64), (3, 64))
    alone, pooled_alone = encoders.encode_text(["a handwritten one"])
    torch.testing.assert_close(prompt[1], alone[0])
    torch.testing.assert_close(pooled[1], pooled_alone[0])
    assert not torch.equal(prompt[1], prompt[2])
    assert not torch.equal(pooled[1], pooled[2])


def test_a_caption_has_the_same_bits_in_any_company_and_place(encoders):
    """Of one call, of a full one and of several, because a call has always as many rows."""
    captions = [f"the digit {number} written by hand" for number in range(2 * flux1.TEXT_BATCH + 1)]
    straight, reverse = encoders.encode_text(captions), encoders.encode_text(captions[::-1])
    for i, caption in enumerate(captions):
        for tensors, place in ((encoders.encode_text([caption]), 0), (reverse, len(captions) - 1 - i)):
            assert all(torch.equal(tensor[place], expected[i]) for tensor, expected in zip(tensors, straight, strict=True)), caption


def test_the_text_encoders_are_always_called_with_as_many_rows(encoders, monkeypatch):
    rows, encode = [], encoders.pipeline.encode_prompt
    monkeypatch.setattr(encoders.pipeline, "encode_prompt", lambda prompts, *a, **k: rows.append(len(prompts)) or encode(prompts, *a, **k))
    for count in (1, flux1.TEXT_BATCH, flux1.TEXT_BATCH + 1):
        assert len(encoders.encode_text(["a"] * count)[0]) == count
    assert rows == [flux1.TEXT_BATCH] * 4


def test_int8_halves_t5_and_hardly_changes_what_it_says(encoders, tiny):
    from torchao.quantization import Int8Tensor

    model = flux1.ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)
    small = flux1.Encoders(model, torch.float32, torch.device("cpu"), int8=True)
    assert small.weights("text_encoder_2") == encoders.weights("text_encoder_2")
    captions = ["a handwritten one", "the digit two written by hand"]
    (prompt, pooled), (exact, exact_pooled) = small.encode_text(captions), encoders.encode_text(captions)
    linear = [m for m in small.pipeline.text_encoder_2.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) > 10
    assert {type(m.weight.data) for m in linear} == {Int8Tensor}
    assert {m.weight.qdata.dtype for m in linear} == {torch.int8}
    assert torch.equal(pooled, exact_pooled)  # CLIP is small
    assert not torch.equal(prompt, exact)
    assert torch.nn.functional.cosine_similarity(prompt, exact, dim=-1).min() > 0.999
    with pytest.raises(AssertionError, match="rounded already"):
        small.weights("text_encoder_2")


def test_a_part_moves_to_the_device_at_its_first_use(tiny):
    model = flux1.ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)
    encoders = flux1.Encoders(model, torch.float32, torch.device("meta"))  # a device that keeps no numbers, but says where they would be
    devices = lambda: [getattr(encoders.pipeline, part).device.type for part in ("text_encoder", "text_encoder_2", "vae")]  # noqa: E731
    assert devices() == ["cpu"] * 3
    encoders.encode_images(torch.zeros(1, 3, 32, 32))
    assert devices() == ["cpu", "cpu", "meta"]


@pytest.mark.parametrize(
    ("size", "count"), [((1024, 1024), 1), ((1536, 1024), 1), ((768, 768), 1), ((512, 512), 4), ((256, 256), 16), ((32, 32), 1024)]
)
def test_the_vae_takes_a_megapixel_at_once(size, count):
    assert vae.pictures_per_call(*size) == count


def test_pictures_go_through_the_vae_in_chunks_both_ways(encoders, monkeypatch):
    vae, seen = encoders.pipeline.vae, []
    whole = vae.encode, vae.decode
    monkeypatch.setattr(vae, "encode", lambda pixels: seen.append(tuple(pixels.shape)) or whole[0](pixels))
    monkeypatch.setattr(vae, "decode", lambda latents, **k: seen.append(tuple(latents.shape)) or whole[1](latents, **k))
    pixels = torch.rand(5, 3, 512, 512) * 2 - 1
    mean, std = encoders.encode_images(pixels)
    decoded = encoders.decode(mean, 512, 512)
    assert seen == [(4, 3, 512, 512), (1, 3, 512, 512), (4, 4, 128, 128), (1, 4, 128, 128)]
    for i in (0, 4):
        torch.testing.assert_close(encoders.encode_images(pixels[i, None])[0][0], mean[i])
        torch.testing.assert_close(encoders.decode(mean[i, None], 512, 512)[0], decoded[i])
    assert std.shape == mean.shape


@pytest.mark.parametrize("side", [32, 64])
def test_pictures_become_tokens(encoders, side):
    assert encoders.pixels_per_token == 8
    shape = ((side // 8) ** 2, 16)
    assert encoders.token_shape((side, side)) == shape
    mean, std = encoders.encode_images(torch.rand(2, 3, side, side) * 2 - 1)
    assert mean.shape == std.shape == (2, *shape)
    assert (std > 0).all()
    assert encoders.decode(mean, side, side).shape == (2, 3, side, side)


def test_latents_are_normalised_and_packed_as_the_stock_pipeline_wants_them(encoders):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = encoders.pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        straight = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    mean, std = encoders.encode_images(pixels)
    torch.testing.assert_close(encoders.decode(mean, 32, 32), straight)
    top_left = ((posterior.mean[:, :, :2, :2] - 0.3) * 0.7).flatten(1)  # one token: 2x2 latents, channels first
    torch.testing.assert_close(mean[:, 0], top_left)
    torch.testing.assert_close(std[:, 0], (posterior.std[:, :, :2, :2] * 0.7).flatten(1))


def test_decoded_pixels_stay_in_range(encoders):
    pixels = encoders.decode(100 * torch.randn(1, 16, 16), 32, 32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.1


def test_positions_of_tokens_are_row_and_column():
    ids = flux1.image_ids(2, 3, CPU, torch.float32)
    assert ids.tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_scheduler_settings(tiny):
    settings = flux1.scheduler_settings(str(tiny))
    assert {k: settings[k] for k in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")} == {
        "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    }  # fmt: skip
