import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from dev2pro.models import flow_matching


@pytest.fixture(scope="module")
def scheduler(tiny: Path) -> FlowMatchEulerDiscreteScheduler:
    """With FLUX.1-dev's settings, which the tiny pipeline's are too."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(tiny, subfolder="scheduler")


def test_interpolation_runs_from_the_picture_to_the_noise_with_the_velocity():
    x0, noise = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x_t = flow_matching.interpolate(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    v = flow_matching.velocity(x0, noise)
    torch.testing.assert_close(x_t - t[:, None, None] * v, x0)  # from any time one straight step leads back to the picture
    later = flow_matching.interpolate(x0, noise, t + 1e-3)
    torch.testing.assert_close((later - x_t) / 1e-3, v)  # and the velocity is the derivative by time


def test_interpolation_keeps_the_precision_of_the_latents():
    x0 = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    assert flow_matching.interpolate(x0, x0 + 1, torch.tensor([0.5, 0.1])).dtype == torch.bfloat16


@given(mu=st.floats(-2, 3), t=st.floats(1e-4, 1))
def test_shift_is_diffusers_time_shift(scheduler, mu, t):
    ours = flow_matching.shift(torch.tensor([t], dtype=torch.float64), mu)
    assert ours.item() == pytest.approx(scheduler.time_shift(mu, 1.0, np.array([t])).item(), rel=1e-12)
    assert ours.item() == pytest.approx(t, rel=1e-9) or (ours.item() > t) == (mu > 0)  # towards noise for a positive mu


@given(tokens=st.integers(1, 20000), base=st.floats(0, 1), more=st.floats(0.01, 2))
def test_shift_mu_is_diffusers_calculate_shift(tokens, base, more):
    settings = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": base, "max_shift": base + more}
    assert flow_matching.shift_mu(tokens, settings) == pytest.approx(calculate_shift(tokens, 256, 4096, base, base + more), rel=1e-9, abs=1e-9)


def test_shift_mu_of_flux_dev(tiny):
    settings = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    assert flow_matching.shift_mu(256, settings) == pytest.approx(0.5)
    assert flow_matching.shift_mu(4096, settings) == pytest.approx(1.15)
    assert flow_matching.shift_mu(2176, settings) == pytest.approx((0.5 + 1.15) / 2)


@pytest.mark.parametrize("steps", [1, 2, 12, 28, 50])
@pytest.mark.parametrize("mu", [0.4579, 0.5, 1.15])
def test_sampling_times_are_the_stock_scheduler_s(scheduler, steps, mu):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = flow_matching.sampling_timesteps(steps, mu)
    assert ours.shape == (steps + 1,)
    assert (ours[0], ours[-1]) == (1, 0)
    assert (ours.diff() < 0).all()
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-6)  # theirs are rounded to float32 on another way
    torch.testing.assert_close(1000 * ours[:-1], scheduler.timesteps, rtol=1e-6, atol=1e-3)


def test_training_times_are_logit_normal_and_shifted():
    normal = torch.special.ndtri(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))
    plain, shifted = flow_matching.training_timesteps(normal, 0.0), flow_matching.training_timesteps(normal, 1.15)
    torch.testing.assert_close(plain, torch.sigmoid(normal))
    torch.testing.assert_close(shifted, torch.sigmoid(normal + 1.15))  # a shift by mu in logits
    assert 0 < shifted.min() < shifted.max() < 1
    assert plain.median().item() == pytest.approx(0.5, abs=1e-3)


def test_guidance_by_scale():
    unconditional, conditional = torch.randn(2, 3, 5, 4)
    assert torch.equal(flow_matching.apply_cfg(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(flow_matching.apply_cfg(unconditional, conditional, 1.0), conditional)
    scales = torch.tensor([0.0, 1.0, 3.5])
    mixed = flow_matching.apply_cfg(unconditional, conditional, scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(mixed[i], flow_matching.apply_cfg(unconditional[i], conditional[i], scale))
    torch.testing.assert_close(mixed[2], unconditional[2] + 3.5 * (conditional[2] - unconditional[2]))
