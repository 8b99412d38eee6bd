import pytest
import torch
from torch.nn.functional import mse_loss

from dev2pro.models import flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import Conditioning
from dev2pro.training.loss import distillation_loss, flow_matching_loss, teacher_cfg_velocity

SAMPLES = 3


@pytest.fixture(scope="module")
def transformer(tiny) -> torch.nn.Module:
    return flux1.load_transformer(str(tiny)).eval()


@pytest.fixture(scope="module")
def batch() -> NoisedBatch:
    x_t, x_0, noise = torch.randn(3, SAMPLES, 16, 16, generator=torch.Generator().manual_seed(0))
    return NoisedBatch(x_t=x_t, x0=x_0, noise=noise, t=torch.tensor([0.2, 0.5, 0.9]), conditioning=conditioning(1))


def conditioning(seed: int) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    return flux1.build_conditioning(torch.randn(SAMPLES, 8, 64, generator=draw), torch.randn(SAMPLES, 64, generator=draw), (4, 4))


def test_flow_matching_is_the_error_of_the_velocity_at_the_guidance_given(transformer, batch):
    velocity = batch.noise - batch.x0
    losses = {}
    for guidance in (1.0, 3.5):
        predicted = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, guidance)
        losses[guidance] = flow_matching_loss(transformer, batch, guidance)
        assert losses[guidance].item() == pytest.approx(((predicted - velocity) ** 2).mean().item())
    assert losses[1.0] != losses[3.5]


def test_a_teacher_is_asked_at_guidance_one_and_extrapolated(transformer, batch):
    """v = v_uncond + s (v_cond - v_uncond): 1 is the conditional prediction, 0 the unconditional one."""
    null = conditioning(2)
    conditional = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, 1.0)
    unconditional = flux1.predict(transformer, batch.x_t, batch.t, null, 1.0)
    velocity = teacher_cfg_velocity(transformer, batch, null, torch.tensor([0.0, 1.0, 3.0]))
    for row, expected in enumerate((unconditional[0], conditional[1], 3 * conditional[2] - 2 * unconditional[2])):
        torch.testing.assert_close(velocity[row], expected, atol=1e-4, rtol=1e-4)
    assert not velocity.requires_grad


def test_distillation_is_the_teachers_error_plus_weighted_flow_matching(transformer, batch):
    null, guidance = conditioning(2), torch.tensor([1.5, 3.0, 6.0])
    predicted = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, guidance)
    to_teacher = mse_loss(predicted, teacher_cfg_velocity(transformer, batch, null, guidance))
    loss = [distillation_loss(transformer, transformer, batch, null, guidance, weight) for weight in (0.0, 0.5)]
    assert loss[0].item() == pytest.approx(to_teacher.item())
    assert (loss[1] - loss[0]).item() == pytest.approx(0.5 * flow_matching_loss(transformer, batch, guidance).item(), rel=1e-4)
    assert loss[0].requires_grad
