"""The float32 average: moves where a bfloat16 one stands still, in host memory, every k steps."""

import math

import pytest
import torch
from diffusers.training_utils import EMAModel

from dev2pro.training.ema import Ema


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter((0.02 * torch.randn(*shape)).to(dtype)) for shape in ((64, 32), (7,), (300, 5))]


def walk(parameters: list[torch.nn.Parameter], step: int, size: float) -> None:
    """Moves weights all one way, by more than a bfloat16 can show."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * (1 + step % 3)


def test_it_is_diffusers_average_bit_for_bit():
    parameters = weights()
    ours, theirs = Ema(parameters, 0.9), EMAModel(parameters, decay=0.9)
    for step in range(30):
        walk(parameters, step, 1e-3)
        ours.step()
        theirs.step(parameters)
    assert all(torch.equal(a, b) for a, b in zip(ours.average, theirs.shadow_params, strict=True))


def test_over_bfloat16_weights_it_moves_twice_as_far_as_a_bfloat16_average():
    parameters = weights(torch.bfloat16)
    start = [p.detach().float().clone() for p in parameters]
    ours, theirs = Ema(parameters, 0.999), EMAModel(parameters, decay=0.999)
    ours.steps = theirs.optimization_step = 10_000  # past the warm-up
    for step in range(200):
        walk(parameters, step, 1e-4)
        ours.step()
        theirs.step(parameters)
    way = [(p.detach().float() - s).mean() for p, s in zip(parameters, start, strict=True)]
    moved = [(a - s).mean() / w for a, s, w in zip(ours.average, start, way, strict=True)]
    stuck = [(a.float() - s).mean() / w for a, s, w in zip(theirs.shadow_params, start, way, strict=True)]
    assert all(average.dtype == torch.float32 for average in ours.average)
    assert all(0.08 < share < 0.12 for share in moved)  # mean over 200 steps of 1 - 0.999^(200 - n), about 200 / 2 / 1000
    assert all(other < 0.6 * share for other, share in zip(stuck, moved, strict=True))


@pytest.mark.parametrize("every", [2, 5])
def test_one_move_every_k_steps_weighs_the_past_as_k_moves_do(every):
    parameters = weights()
    one, few = Ema(parameters, 0.9), Ema(parameters, 0.9, every=every)
    walk(parameters, 0, 1.0)
    for _ in range(4 * every):  # the weights stand still from here on: both must have forgotten as much
        one.step()
        few.step()
    for a, b, p in zip(one.average, few.average, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(a, p.detach(), rtol=0, atol=1e-6)  # the warm-up's first step takes all
    one.steps = few.steps = 100 * every
    walk(parameters, 0, 1.0)
    before = [average.clone() for average in few.average]
    for n in range(1, every + 1):
        one.step()
        few.step()
        assert all(torch.equal(a, b) for a, b in zip(few.average, before, strict=True)) == (n < every)
    for a, b, old, p in zip(one.average, few.average, before, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, math.pow(0.9, every) * old + (1 - math.pow(0.9, every)) * p.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", [False, True])
def test_while_it_is_applied_the_weights_are_the_average_and_then_themselves(dtype, offload):
    parameters = weights(dtype)
    ema = Ema(parameters, 0.5, offload=offload)
    for step in range(3):
        walk(parameters, step, 1e-2)
        ema.step()
    own = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="stop"), ema.applied():  # noqa: PT012
        assert all(torch.equal(p, a.to(dtype)) for p, a in zip(parameters, ema.average, strict=True))
        assert not all(torch.equal(p, o) for p, o in zip(parameters, own, strict=True))
        raise RuntimeError("stop")
    assert all(torch.equal(p, o) for p, o in zip(parameters, own, strict=True))
    assert all(average.device.type == "cpu" for average in ema.average)


def test_it_is_averaged_in_chunks(monkeypatch):
    parameters = weights()
    whole, chunked = Ema(parameters, 0.9), Ema(parameters, 0.9)
    for step in range(3):
        walk(parameters, step, 1e-2)
        whole.step()
        monkeypatch.setattr("dev2pro.training.ema.CHUNK", 100)
        assert len(list(chunked._chunks())) == 2
        chunked.step()
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(whole.average, chunked.average, strict=True))
