"""The end by extrapolation: it comes where the steps left would bring nothing, and not on a curve that is still falling or too noisy to tell."""

import math
import random

import pytest

from dev2pro.training import plateau

STEPS, EVERY = 10_000, 250


def curve(loss, until: int = STEPS, noise: float = 0.0, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"step": step, "loss": loss(step) + noise * draw.gauss(0, 1)} for step in range(0, until + 1, EVERY)]


def power(step: float) -> float:
    return 0.5 + (1 + step / 20) ** -1.5


def exponential(step: float) -> float:
    return 0.5 + math.exp(-step / 600)


def logarithm(step: float) -> float:
    return 2.0 - 0.1 * math.log(1 + step / 20)


def straight(step: float) -> float:
    return 1.5 - step / STEPS


def end(points: list[dict], share: float) -> int | None:
    """The step at which a run with this curve would end."""
    return next((point["step"] for i, point in enumerate(points, 1) if plateau.reached(points[:i], STEPS, share)), None)


@pytest.mark.parametrize("loss", [power, exponential])
@pytest.mark.parametrize("share", [0.01, 0.001])
def test_a_run_ends_once_what_is_left_is_less_than_the_share_and_no_sooner(loss, share):
    done = end(curve(loss), share)
    assert done is not None
    assert loss(done) - loss(STEPS) < share * (loss(0) - loss(done))
    assert done < STEPS / 2 or loss(STEPS / 2) - loss(STEPS) > share / 4, "it came when it could"


@pytest.mark.parametrize("loss", [logarithm, straight], ids=lambda one: one.__name__)
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_curve_that_still_falls_is_trained_on(loss, noise):
    for seed in range(20):
        early = end(curve(loss, noise=noise, seed=seed), 0.05)
        assert early is None or loss(early) - loss(STEPS) < 0.06 * (loss(0) - loss(early)), (seed, early)


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.05])
def test_noise_puts_the_end_off_and_brings_it_hardly_ever_too_soon(noise):
    """A share of 2 % of a gain of 1; by chance it may come while 3 % are left, in one run of twenty at most."""
    ends = [end(curve(power, noise=noise, seed=seed), 0.02) for seed in range(40)]
    soon = [done for done in ends if done is not None and power(done) - power(STEPS) > 0.03]
    assert len(soon) <= 2, soon
    exact = end(curve(power), 0.02)
    assert sum(done is None or done >= exact for done in ends) > 20


def test_the_answer_depends_on_the_curve_alone_and_not_on_its_units():
    points = curve(power, until=3000, noise=0.001)
    found = plateau.outlook(points, STEPS)
    assert found == plateau.outlook([dict(point, more=1) for point in points], STEPS)
    scaled = plateau.outlook([{"step": 7 * point["step"], "loss": 5 + 3 * point["loss"]} for point in points], 7 * STEPS)
    assert scaled.gained == pytest.approx(3 * found.gained)
    assert scaled.could_gain == pytest.approx(3 * found.could_gain, rel=1e-6)
    assert found.could_gain < plateau.outlook(points, 3 * STEPS).could_gain


def test_what_could_be_gained_is_not_less_than_what_is():
    for loss in (power, exponential, logarithm):
        for until in (2000, 4000, 8000):
            found = plateau.outlook(curve(loss, until=until), STEPS)
            assert found.could_gain > 0.9 * (loss(until) - loss(STEPS)) - 1e-5, (loss, until)
            assert found.gained == loss(0) - loss(until)


def test_it_never_comes_without_a_share_with_few_points_or_without_a_gain():
    assert not plateau.reached(curve(power), STEPS, None)
    assert not plateau.reached(curve(power)[:1], STEPS, 0.99)
    assert plateau.outlook(curve(power)[:5], STEPS) is None
    assert not plateau.reached(curve(lambda step: 0.5 + step / STEPS), STEPS, 0.99)
    assert not plateau.reached(curve(lambda step: 0.5), STEPS, 0.99)


def test_two_points_must_agree():
    """One lucky point does not end a run: at the first at which the outlook alone would, the one before does not say so."""
    points = curve(exponential)
    first = next(i for i in range(2, len(points)) if (one := plateau.outlook(points[:i], STEPS)) and one.could_gain < 0.01 * one.gained)
    assert not plateau.reached(points[:first], STEPS, 0.01)
    assert plateau.reached(points[: first + 1], STEPS, 0.01)
