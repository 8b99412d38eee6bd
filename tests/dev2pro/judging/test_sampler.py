"""The pictures of a cell, on a whole tiny pipeline of random weights."""

from pathlib import Path

import pytest
import torch

from dev2pro.errors import ConfigError
from dev2pro.judging import sampler
from dev2pro.judging.cells import Inference
from dev2pro.judging.sampler import Sampler
from dev2pro.models import flux1, lora, sampling
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.lora import AdapterConfig
from dev2pro.models.offload import OffloadedLinear
from dev2pro.models.sampling import SamplingConfig

PROMPTS = ["a handwritten one", "a handwritten two", "a handwritten six"]


@pytest.fixture
def made(tiny: Path):
    def make(batch: int = 6, seed: int = 0, offloaded_blocks: int = 0, int8: bool = False) -> Sampler:
        model = ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)
        config = SamplingConfig(steps=2, cfg_scale=2.0, batch=batch)
        return Sampler(
            model, config, PROMPTS, seeds=2, seed=seed, resolution=32, dtype=torch.float32, encoder_dtype=torch.float32, device=torch.device("cpu"),
            offloaded_blocks=offloaded_blocks, int8_base=int8, int8_encoders=int8,
        )  # fmt: skip

    return make


@pytest.fixture
def inference(tiny: Path) -> Inference:
    return Inference("base", str(tiny), 3.5, 2.0)


def test_a_picture_is_the_same_in_any_batch_and_no_other_s(made, inference):
    one = made()
    one.apply(inference, None)
    pictures = one.sample(range(6))
    assert pictures.shape == (6, 3, 32, 32)
    torch.testing.assert_close(torch.cat([one.sample(range(2, 4)), one.sample(range(5, 6))]), pictures[[2, 3, 5]])
    assert min((a - b).abs().max() for i, a in enumerate(pictures) for b in pictures[:i]) > 0.01


def test_prompts_are_encoded_once_and_the_empty_one_too(made, inference, monkeypatch):
    encoded: list[str] = []
    encode = flux1.Encoders.encode_text
    monkeypatch.setattr(flux1.Encoders, "encode_text", lambda self, prompts: encoded.extend(prompts) or encode(self, prompts))
    one = made()
    assert not encoded  # nothing is loaded for what is on disk
    for _ in range(2):
        one.apply(inference, None)
        one.sample(range(6))
    assert sorted(prompt for prompt in encoded if prompt) == sorted(PROMPTS)  # calls are filled up with empty ones
    assert "" in encoded


def test_where_memory_ends_batches_are_halved_until_they_fit(made, inference, monkeypatch, capsys):
    sizes: list[int] = []
    sample = sampling.sample

    def limited(transformer, noise, *args, **more):
        sizes.append(len(noise))
        if len(noise) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return sample(transformer, noise, *args, **more)

    whole = made()
    whole.apply(inference, None)
    pictures = whole.sample(range(6))
    monkeypatch.setattr(sampling, "sample", limited)
    one = made()
    one.apply(inference, None)
    torch.testing.assert_close(one.sample(range(6)), pictures)
    torch.testing.assert_close(one.sample(range(4, 6)), pictures[4:])
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert "sampling.batch=6 does not fit into the memory of cpu: 3 pictures at a time" in capsys.readouterr().out


def test_a_picture_that_does_not_fit_alone_is_told(made, inference, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sampling, "sample", full)
    one = made()
    one.apply(inference, None)
    with pytest.raises(ConfigError, match=r"One picture of resolution=32 does not fit into the memory of cpu \(CUDA out of memory\.\)"):
        one.sample(range(2))


def test_pictures_are_decoded_as_many_at_once_as_their_pixels_allow(made, inference, monkeypatch):
    sizes: list[int] = []
    decode = flux1.Encoders.decode
    monkeypatch.setattr(flux1.Encoders, "decode", lambda self, packed, *size: sizes.append(len(packed)) or decode(self, packed, *size))
    one = made()
    one.apply(inference, None)
    pictures = one.sample(range(6))
    monkeypatch.setattr(sampler, "DECODED_AT_ONCE", 4 * 32 * 32 + 1)
    torch.testing.assert_close(one.sample(range(6)), pictures)
    monkeypatch.setattr(sampler, "DECODED_AT_ONCE", 10)
    torch.testing.assert_close(one.sample(range(2)), pictures[:2])
    assert sizes == [6, 4, 2, 1, 1]


@pytest.fixture
def style(tiny: Path, tmp_path: Path) -> str:
    """A LoRA of random numbers."""
    transformer, adapter = flux1.load_transformer(str(tiny)), AdapterConfig(rank=2, alpha=2, targets="attention")
    lora.inject(transformer, adapter, 0)
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    lora.save(transformer, adapter, str(tmp_path), {})
    return str(tmp_path)


def test_a_lora_comes_and_goes_and_blocks_may_wait_in_host_memory(made, inference, style):
    one, offloaded = made(), made(offloaded_blocks=99)
    for path in (None, style, None):
        for each in (one, offloaded):
            each.apply(inference, path)
        pictures = one.sample(range(3))
        assert torch.equal(offloaded.sample(range(3)), pictures)
        if path is None:
            plain = pictures
        else:
            assert (pictures - plain).abs().max() > 0.01
    assert torch.equal(pictures, plain)
    assert sum(isinstance(module, OffloadedLinear) for module in offloaded.transformer.modules()) > 10


def test_a_strength_scales_the_lora_and_a_guidance_is_no_other_model(made, inference, style, monkeypatch):
    loads = list[str]()
    load = flux1.load_transformer
    monkeypatch.setattr(flux1, "load_transformer", lambda path, *rest: loads.append(path) or load(path, *rest))
    weights, _ = lora.read(style)
    half = Path(style) / "half"
    half.mkdir()
    lora.write({key: value * (0.5 if "lora_B" in key else 1) for key, value in weights.items()}, str(half), {})
    one = made()
    pictures = {}
    for at in ((style, 1.0), (style, 0.5), (str(half), 1.0), (None, 1.0)):
        one.apply(inference, *at)
        pictures[at] = one.sample(range(3))
    torch.testing.assert_close(pictures[style, 0.5], pictures[str(half), 1.0])
    assert (pictures[style, 0.5] - pictures[style, 1.0]).abs().max() > 0.005
    assert (pictures[style, 0.5] - pictures[None, 1.0]).abs().max() > 0.005
    one.apply(Inference("base", inference.path, 2.0, 2.0), None)
    assert (one.sample(range(3)) - pictures[None, 1.0]).abs().max() > 1e-4
    assert loads == [inference.path]


@pytest.mark.parametrize("offloaded_blocks", [0, 99])
def test_in_int8_it_draws_nearly_the_same_with_a_lora_and_without(made, inference, style, offloaded_blocks):
    one, rounded = made(), made(int8=True, offloaded_blocks=offloaded_blocks)
    assert rounded.identity(inference, None) != one.identity(inference, None)
    for path in (style, None):
        for each in (one, rounded):
            each.apply(inference, path)
        pictures, nearly = one.sample(range(3)), rounded.sample(range(3))
        assert 0 < (pictures - nearly).abs().mean() < 0.02
    kinds = {type(p.data).__name__ for name, p in rounded.transformer.named_parameters() if "attn.to_q.weight" in name}
    assert kinds == {"Int8Tensor"}


def test_a_lora_is_on_the_device_where_the_layer_s_weights_are_not(made, inference, style):
    one = made(offloaded_blocks=99)
    one.apply(inference, None)
    one.device = torch.device("meta")  # a device without numbers
    one.apply(inference, style)
    devices = {(".lora_" in name, value.device.type) for name, value in one.transformer.named_parameters()}
    assert devices == {(True, "meta"), (False, "cpu")}


def test_identity_names_all_that_pictures_depend_on(made, inference, tiny):
    identity = made().identity(inference, None)
    assert made().identity(inference, None) == identity
    others = [
        made(batch=3).identity(inference, None), made(seed=1).identity(inference, None),
        made().identity(Inference("base", str(tiny), 1.0, 2.0), None), made().identity(Inference("base", str(tiny), 3.5, 1.0), None),
        made().identity(Inference("base", str(tiny / "transformer"), 3.5, 2.0), None), made().identity(inference, str(tiny / "vae")),
    ]  # fmt: skip
    assert all(other != identity for other in others)
    assert made().identity(Inference("recovered", str(tiny), 3.5, 2.0), None) == identity  # a name is no difference
    at_full, at_less = made().identity(inference, str(tiny / "vae"), 1.0), made().identity(inference, str(tiny / "vae"), 0.8)
    assert at_full == made().identity(inference, str(tiny / "vae"))
    assert at_less == {**at_full, "strength": 0.8}, "cells of before, whose strength went without saying, stay valid"
    assert made().identity(inference, None, 0.8) == identity, "without a LoRA there is no strength"
    assert {*identity} >= {"prompts", "seeds", "seed", "resolution", "steps", "batch", "dtype", "encoder_dtype", "encoders", "variant", "draws"}
