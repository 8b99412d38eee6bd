from dataclasses import replace

import pytest
import torch

from dev2pro.errors import ConfigError
from dev2pro.models import encodings, flow_matching
from dev2pro.models.encodings import EncodedBatch, PromptEncoder
from dev2pro.models.flux1 import TEXT_BATCH, Encoders, ModelConfig

CPU, DTYPE = torch.device("cpu"), torch.float32
SLOTS = range(10)
SCHEDULER = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 4096}
EMPTY = torch.zeros(8, 64), torch.zeros(64)


@pytest.fixture
def model(tiny) -> ModelConfig:
    return ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)


@pytest.fixture
def encoders(model) -> Encoders:
    return Encoders(model, DTYPE, CPU)


@pytest.fixture(scope="module")
def data() -> EncodedBatch:
    draw = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(len(SLOTS), 8, 64, generator=draw), torch.randn(len(SLOTS), 64, generator=draw)
    mean = torch.randn(len(SLOTS), 16, 16, generator=draw)
    return EncodedBatch(mean, torch.full_like(mean, 0.1), prompt, pooled, (4, 4))


def noised(
    data: EncodedBatch, slots: range = SLOTS, *, dropout: float = 0.5, seed: int = 0, step: int = 3, **scheduler: float
) -> encodings.NoisedBatch:
    part = EncodedBatch(data.mean[slots], data.std[slots], data.prompt[slots], data.pooled[slots], data.grid)
    return encodings.noise_batch(part, EMPTY, {**SCHEDULER, **scheduler}, dropout, seed, step, slots)


# ---- captions -----------------------------------------------------------------------------------------------------------------------------


def test_a_caption_says_the_same_whatever_is_beside_it(model, encoders):
    captions = ["a two", "a one", "", "the digit three written by hand"]
    alone = [PromptEncoder(model, encoders, 1e9).encode([caption]) for caption in captions]
    together = PromptEncoder(model, encoders, 1e9).encode(captions)
    for i, (prompt, pooled) in enumerate(alone):
        assert torch.equal(together[0][i], prompt[0])
        assert torch.equal(together[1][i], pooled[0])
    torch.testing.assert_close(together[0], encoders.encode_text(captions)[0])
    torch.testing.assert_close(together[1], encoders.encode_text(captions)[1])


def test_a_repeated_caption_is_encoded_once(model, encoders, monkeypatch):
    prompt_encoder, requested = PromptEncoder(model, encoders, 1e9), []
    encode = encoders.encode_text
    monkeypatch.setattr(encoders, "encode_text", lambda prompts: requested.append(list(prompts)) or encode(prompts))
    prompt_encoder.encode(["a two", "a one", "a two"])
    prompt_encoder.encode(["a one", "a three", ""])
    assert requested == [["a two", "a one"], ["a three"]]  # the empty one was encoded before


def test_captions_are_kept_within_the_limit_and_come_back_the_same(model, encoders):
    limit = 3 * encoders.text_bytes()
    prompt_encoder = PromptEncoder(model, encoders, limit)
    captions = [f"a {name}" for name in ("one", "two", "three", "four", "five", "six")]
    first = prompt_encoder.encode(captions)
    assert list(prompt_encoder._cache) == captions[3:]
    assert torch.equal(first[0], prompt_encoder.encode(captions)[0])
    assert encoders.text_bytes() == first[0][0].nbytes + first[1][0].nbytes
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for pair in prompt_encoder._cache.values() for tensor in pair}
    assert sum(held.values()) == limit  # no caption keeps the memory of those encoded beside it


def test_precomputed_captions_free_the_encoders(model, encoders):
    prompt_encoder = PromptEncoder(model, encoders, 1e9)
    expected = prompt_encoder.encode(["a one", "a two"])
    prompt_encoder.precompute(["a one", "a two"])
    assert encoders.pipeline.text_encoder is None
    assert encoders.pipeline.text_encoder_2 is None
    assert torch.equal(prompt_encoder.encode(["a one", "a two"])[0], expected[0])
    assert torch.equal(
        prompt_encoder.encode(["a nine"])[0], PromptEncoder(model, Encoders(model, DTYPE, CPU), 1e9).encode(["a nine"])[0]
    )  # brought back for it


def test_precomputed_captions_are_encoded_in_full_calls(model, encoders, monkeypatch):
    prompt_encoder, calls = PromptEncoder(model, encoders, 1e9), []
    encode = encoders.encode_text
    monkeypatch.setattr(encoders, "encode_text", lambda prompts: calls.append(list(prompts)) or encode(prompts))
    captions = [f"a {number}" for number in range(TEXT_BATCH + 1)]
    prompt_encoder.precompute(["", *captions, *captions])
    assert calls == [captions[:TEXT_BATCH], [captions[-1], *[""] * (TEXT_BATCH - 1)]]  # what is known or comes again is left out
    again = PromptEncoder(model, Encoders(model, DTYPE, CPU), 1e9)
    for caption in captions:
        assert torch.equal(prompt_encoder.encode([caption])[0], again.encode([caption])[0])


def test_batches_are_joined(data):
    parts = [EncodedBatch(data.mean[some], data.std[some], data.prompt[some], data.pooled[some], data.grid) for some in (slice(0, 3), slice(3, None))]
    for name in ("mean", "std", "prompt", "pooled"):
        assert torch.equal(getattr(encodings.concatenate(parts), name), getattr(data, name))
    assert len(encodings.concatenate(parts)) == len(SLOTS)


# ---- random draws -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_what_is_drawn_for_a_slot_does_not_depend_on_the_others(data, cut):
    whole, parts = noised(data), [noised(data, SLOTS[:cut]), noised(data, SLOTS[cut:])]
    for name in ("x_t", "x0", "noise", "t"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    for name in ("prompt", "pooled"):
        assert torch.equal(getattr(whole.conditioning, name), torch.cat([getattr(part.conditioning, name) for part in parts])), name


def test_a_step_is_drawn_the_same_again_and_every_other_differently(data):
    first = noised(data)
    assert torch.equal(first.x_t, noised(data).x_t)
    for other in (noised(data, step=4), noised(data, seed=1)):
        for name in ("x0", "noise", "t"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_the_same_picture_is_drawn_differently_in_two_slots(data):
    twin = replace(data, mean=data.mean[[0] * 10], std=data.std[[0] * 10])
    step = noised(twin)
    for name in ("x0", "noise", "t"):
        assert not torch.equal(getattr(step, name)[4], getattr(step, name)[5]), name


def test_noised_is_the_interpolation_at_its_own_time(data):
    step = noised(data)
    torch.testing.assert_close(step.x_t, flow_matching.interpolate(step.x0, step.noise, step.t))
    torch.testing.assert_close(step.velocity, step.noise - step.x0)
    assert 0 < step.t.min() < step.t.max() < 1


def test_larger_pictures_are_noised_more(data):
    drawn = [flow_matching.shift(torch.sigmoid(torch.zeros(1)), flow_matching.shift_mu(tokens, SCHEDULER)) for tokens in (16, 1024)]
    assert drawn[0] < drawn[1]
    large = EncodedBatch(data.mean.repeat(1, 64, 1), data.std.repeat(1, 64, 1), data.prompt, data.pooled, (32, 32))
    assert (noised(large).t > noised(data).t).all()


def test_a_higher_mean_of_the_logits_moves_every_time_towards_noise_by_that_much(data):
    usual, more = (encodings.noise_batch(data, EMPTY, SCHEDULER, 0.5, 0, 3, SLOTS, logit_mean=mean) for mean in (0.0, 1.5))
    torch.testing.assert_close(torch.logit(more.t), torch.logit(usual.t) + 1.5, rtol=1e-4, atol=1e-4)
    assert torch.equal(usual.t, noised(data).t)
    assert torch.equal(more.noise, usual.noise)
    assert torch.equal(more.conditioning.prompt, usual.conditioning.prompt)


def test_latents_are_a_draw_from_the_posterior(data):
    wide = replace(data, mean=torch.full_like(data.mean, 3.0), std=torch.full_like(data.std, 0.5))
    x0 = torch.cat([noised(wide, step=step).x0 for step in range(20)])
    assert x0.mean().item() == pytest.approx(3.0, abs=0.01)
    assert x0.std().item() == pytest.approx(0.5, abs=0.01)
    exact = replace(data, std=torch.zeros_like(data.std))
    assert torch.equal(noised(exact).x0, exact.mean)


def test_noise_posterior_and_time_are_drawn_apart(data):
    step = noised(replace(data, mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std)), base_shift=0.0)
    assert abs(torch.corrcoef(torch.stack([step.x0.flatten(), step.noise.flatten()]))[0, 1]) < 0.08  # 2,560 pairs: four standard errors
    assert not torch.isclose(torch.logit(step.t), step.noise[:, 0, 0]).any()


def test_caption_dropout(data):
    conditioning = noised(data, dropout=0.0).conditioning
    assert torch.equal(conditioning.prompt, data.prompt)
    assert torch.equal(conditioning.pooled, data.pooled)
    assert not noised(data, dropout=1.0).conditioning.prompt.any()
    dropped = {
        share: torch.cat([noised(data, dropout=share, step=step).conditioning.prompt[:, 0, 0] == 0 for step in range(200)]) for share in (0.1, 0.3)
    }
    assert 0.073 < dropped[0.1].float().mean() < 0.127  # four standard errors
    assert (dropped[0.3] | ~dropped[0.1]).all()  # what is dropped at 0.1 is dropped at 0.3
    both = noised(data).conditioning
    assert torch.equal(both.prompt[:, 0, 0] == 0, both.pooled[:, 0] == 0)  # both encoders or neither


def test_conditioning_has_position_ids(data):
    conditioning = noised(replace(data, grid=(2, 8))).conditioning
    assert conditioning.text_ids.tolist() == [[0, 0, 0]] * 8
    assert conditioning.image_ids.tolist() == [[0, row, column] for row in range(2) for column in range(8)]


@pytest.mark.parametrize(("size", "cure"), [((36, 32), "Choose 32"), ((32, 33), "Choose 32"), ((65, 64), "Choose 64"), ((6, 8), "Choose 8")])
def test_a_size_that_does_not_fit(encoders, size, cure):
    with pytest.raises(ConfigError, match=r"pixels do not fit this model.*multiple of 8") as caught:
        encoders.grid(size)
    assert cure in str(caught.value)


def test_width_and_height_are_not_mixed_up(encoders):
    assert encoders.grid((64, 32)) == (4, 8)
    assert encoders.token_shape((64, 32)) == (32, 16)
    mean, _ = encoders.encode_images(torch.zeros(1, 3, 32, 64))
    assert mean.shape == (1, 32, 16)
