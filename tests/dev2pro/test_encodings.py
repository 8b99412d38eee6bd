from dataclasses import replace

import numpy as np
import pytest
import torch

from dev2pro import encodings, flow
from dev2pro.encodings import Encodings
from dev2pro.errors import ConfigError
from dev2pro.flux import Encoders, ModelConfig

CPU, DTYPE = torch.device("cpu"), torch.float32
CAPTIONS = ["a two", "a one", "a two", "a three", "a one"]
SLOTS = range(10)
SAMPLES = np.array([0, 1, 2, 3, 4, 4, 3, 2, 1, 0])


@pytest.fixture(scope="module")
def encoders(tiny) -> Encoders:
    return Encoders(ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8), DTYPE, CPU)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (len(CAPTIONS), 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def data(encoders, pictures) -> Encodings:
    return encodings.encode(encoders, iter(pictures), CAPTIONS, CPU, DTYPE)


def noised(data: Encodings, slots: range = SLOTS, *, mu: float = 0.5, dropout: float = 0.5, seed: int = 0, step: int = 3) -> encodings.Noised:
    return encodings.noised(data, SAMPLES[slots], mu, dropout, seed, step, slots)


# ---- what is encoded ------------------------------------------------------------------------------------------------------------------


def test_every_different_caption_is_encoded_once_after_the_empty_one(data, encoders):
    assert data.caption.tolist() == [1, 2, 1, 3, 2]
    prompt, pooled = encoders.encode_text(["", "a two", "a one", "a three"])
    torch.testing.assert_close(data.texts.prompt, prompt)
    torch.testing.assert_close(data.texts.pooled, pooled)
    assert len(data) == len(CAPTIONS)


def test_conditioning_by_row(data):
    said = data.texts.conditioning(torch.tensor([3, 0, 3]))
    assert torch.equal(said.prompt, data.texts.prompt[[3, 0, 3]])
    assert torch.equal(said.pooled, data.texts.pooled[[3, 0, 3]])
    assert said.text_ids.tolist() == [[0, 0, 0]] * 8
    assert said.image_ids.tolist() == [[0, row, column] for row in range(4) for column in range(4)]
    nothing = data.texts.unconditional(2)
    assert torch.equal(nothing.prompt, data.texts.prompt[[0, 0]])
    assert torch.equal(nothing.pooled, data.texts.pooled[[0, 0]])


def test_pictures_are_encoded_in_order_whatever_the_batch(data, encoders, pictures, monkeypatch):
    mean, std = encoders.encode_images(torch.from_numpy(pictures))
    torch.testing.assert_close(data.mean, mean)
    torch.testing.assert_close(data.std, std)
    monkeypatch.setattr(encodings, "ENCODE_BATCH", 2)
    again = encodings.encode(encoders, iter(pictures), CAPTIONS, CPU, DTYPE)
    torch.testing.assert_close(again.mean, mean)
    torch.testing.assert_close(again.texts.prompt, data.texts.prompt)
    assert torch.equal(again.caption, data.caption)


@pytest.mark.parametrize(("resolution", "cure"), [(36, "Choose 32."), (33, "Choose 32."), (65, "Choose 64."), (6, "Choose 8.")])
def test_a_resolution_that_does_not_fit(encoders, resolution, cure):
    with pytest.raises(ConfigError, match=f"resolution of {resolution} pixels does not fit.*multiple of 8") as caught:
        encodings.encode_texts(encoders, ["a one"], resolution, CPU, DTYPE)
    assert str(caught.value).endswith(cure)
    with pytest.raises(ConfigError):
        encodings.encode(encoders, iter(np.zeros((1, 3, resolution, resolution), np.float32)), ["a one"], CPU, DTYPE)


def test_batches():
    assert list(encodings.batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(encodings.batched([], 2)) == []


# ---- what is drawn ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_what_is_drawn_for_a_slot_does_not_depend_on_the_others(data, cut):
    whole, parts = noised(data), [noised(data, SLOTS[:cut]), noised(data, SLOTS[cut:])]
    for name in ("x_t", "x0", "noise", "t", "captions"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_a_step_is_drawn_the_same_again_and_every_other_differently(data):
    first = noised(data)
    assert torch.equal(first.x_t, noised(data).x_t)
    for other in (noised(data, step=4), noised(data, seed=1)):
        for name in ("x0", "noise", "t"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_the_same_picture_is_drawn_differently_in_two_slots(data):
    step = noised(data)
    assert SAMPLES[4] == SAMPLES[5]
    for name in ("x0", "noise", "t"):
        assert not torch.equal(getattr(step, name)[4], getattr(step, name)[5]), name


def test_noised_is_the_interpolation_at_its_own_time(data):
    step = noised(data)
    torch.testing.assert_close(step.x_t, flow.interpolate(step.x0, step.noise, step.t))
    torch.testing.assert_close(step.velocity, step.noise - step.x0)
    assert 0 < step.t.min() < step.t.max() < 1
    assert (noised(data, mu=2.0).t > step.t).all()


def test_latents_are_a_draw_from_the_posterior(data):
    wide = replace(data, mean=torch.full_like(data.mean, 3.0), std=torch.full_like(data.std, 0.5))
    x0 = torch.cat([noised(wide, step=step).x0 for step in range(20)])
    assert x0.mean().item() == pytest.approx(3.0, abs=0.01)
    assert x0.std().item() == pytest.approx(0.5, abs=0.01)
    exact = replace(data, std=torch.zeros_like(data.std))
    assert torch.equal(noised(exact).x0, exact.mean[torch.from_numpy(SAMPLES)])


def test_noise_posterior_and_time_are_drawn_apart(data):
    step = noised(replace(data, mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std)), mu=0.0)
    assert abs(torch.corrcoef(torch.stack([step.x0.flatten(), step.noise.flatten()]))[0, 1]) < 0.08  # 2,560 pairs: four standard errors
    assert not torch.isclose(torch.logit(step.t), step.noise[:, 0, 0]).any()


def test_caption_dropout(data):
    own = data.caption[torch.from_numpy(SAMPLES)]
    assert torch.equal(noised(data, dropout=0.0).captions, own)
    assert torch.equal(noised(data, dropout=1.0).captions, torch.zeros_like(own))
    slots, samples = range(2000), np.arange(2000) % len(CAPTIONS)
    some = data.dropped(samples, 0.1, 0, 0, slots)
    assert 0.073 < (some == 0).float().mean() < 0.127  # four standard errors
    kept = some != 0
    assert torch.equal(some[kept], data.caption[torch.from_numpy(samples)][kept])
    more = data.dropped(samples, 0.3, 0, 0, slots)
    assert ((more == 0) | (some != 0)).all()  # what is dropped at 0.1 is dropped at 0.3
