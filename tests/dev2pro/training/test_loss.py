import pytest
import torch
from torch.nn.functional import mse_loss

from dev2pro.errors import ConfigError
from dev2pro.models import flux1
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.flux1 import Conditioning
from dev2pro.training import loss as losses
from dev2pro.training.loss import (
    LossConfig,
    cfg_augmented_loss,
    distillation_loss,
    empty_caption_velocity,
    flow_matching_loss,
    guidance_loss,
    teacher_cfg_velocity,
)

SAMPLES = 3


@pytest.fixture(scope="module")
def transformer(tiny) -> torch.nn.Module:
    return flux1.load_transformer(str(tiny)).eval()


@pytest.fixture(scope="module")
def batch() -> NoisedBatch:
    x_t, x_0, noise = torch.randn(3, SAMPLES, 16, 16, generator=torch.Generator().manual_seed(0))
    return NoisedBatch(x_t=x_t, x0=x_0, noise=noise, t=torch.tensor([0.2, 0.5, 0.9]), conditioning=conditioning(1))


@pytest.fixture
def other(tiny) -> torch.nn.Module:
    """A frozen model with other weights."""
    model = flux1.load_transformer(str(tiny)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    return model


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


def test_a_pair_is_two_distillations_and_the_error_of_their_difference(transformer, other, batch):
    null, guidance = conditioning(2), torch.tensor([[1.5, 3.0, 6.0], [4.0, 2.0, 5.0]])
    alone = [distillation_loss(transformer, other, batch, null, one, 0.5) for one in guidance]
    predicted = [flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, one) for one in guidance]
    target = [teacher_cfg_velocity(other, batch, null, one) for one in guidance]
    difference = mse_loss(predicted[1] - predicted[0], target[1] - target[0])
    assert difference > 0
    loss = losses.pair_distillation_loss(transformer, other, batch, null, guidance, 0.5)
    assert loss.item() == pytest.approx((sum(alone) / 2 + difference).item(), rel=1e-4)
    same = losses.pair_distillation_loss(transformer, other, batch, null, guidance[:1].expand(2, -1), 0.5)
    assert same.item() == pytest.approx(alone[0].item(), rel=1e-4)


def test_the_pair_s_teacher_is_asked_twice(transformer, other, batch):
    calls = []
    handle = other.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    losses.pair_distillation_loss(transformer, other, batch, conditioning(2), torch.ones(2, SAMPLES), 0.0).backward()
    handle.remove()
    assert calls == [False, False]


# ---- the losses that keep the guidance ---------------------------------------------------------------------------------------------------

RANGE = torch.tensor([1.5, 3.0, 6.0])


@pytest.mark.parametrize("guidance", [3.5, RANGE], ids=["one", "one a sample"])
def test_the_guidance_loss_is_against_the_extrapolated_velocity(transformer, batch, guidance):
    null, g = conditioning(2), torch.as_tensor(guidance).expand(SAMPLES)[:, None, None]
    u = flux1.predict(transformer, batch.x_t, batch.t, null, guidance)
    predicted = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, guidance)
    expected = (predicted - (u + g * (batch.velocity - u))).square().mean()
    assert guidance_loss(transformer, batch, guidance, null).item() == pytest.approx(expected.item(), rel=1e-4)
    expected = ((predicted + (g - 1) * u) / g - batch.velocity).square().mean()
    assert cfg_augmented_loss(transformer, batch, guidance, null).item() == pytest.approx(expected.item(), rel=1e-4)


def test_at_one_guidance_the_cfg_augmented_loss_is_the_guidance_loss_in_other_units(transformer, batch):
    null = conditioning(2)
    ways = []
    for loss in (guidance_loss, cfg_augmented_loss):
        transformer.zero_grad()
        loss(transformer, batch, 3.5, null).backward()
        ways.append(torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None]))
    torch.testing.assert_close(ways[0] / 3.5**2, ways[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flow_matching", "guidance", "cfg_augmented", "model_guidance"])
def test_at_guidance_one_every_loss_on_pictures_is_flow_matching(transformer, other, batch, name):
    loss = losses.LOSSES[name](transformer, batch, torch.ones(SAMPLES), conditioning(2), other)
    assert loss.item() == pytest.approx(flow_matching_loss(transformer, batch, 1.0).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [guidance_loss, cfg_augmented_loss])
def test_the_empty_caption_is_predicted_without_gradient_by_a_teacher_at_one_or_by_the_model_itself(transformer, other, batch, loss):
    null = conditioning(2)
    own, theirs = (empty_caption_velocity(transformer, teacher, batch, 3.5, null) for teacher in (None, other))
    torch.testing.assert_close(own, flux1.predict(transformer, batch.x_t, batch.t, null, 3.5))
    torch.testing.assert_close(theirs, flux1.predict(other, batch.x_t, batch.t, null, 1.0))
    assert not own.requires_grad
    assert loss(transformer, batch, 3.5, null).item() != pytest.approx(loss(transformer, batch, 3.5, null, other).item(), rel=1e-3)


def test_distillation_is_the_teacher_s_cfg_and_nothing_of_the_pictures(transformer, other, batch):
    null = conditioning(2)
    loss = losses.LOSSES["distillation"](transformer, batch, 3.5, null, other)
    assert loss.item() == pytest.approx(distillation_loss(transformer, other, batch, null, torch.full((SAMPLES,), 3.5), 0.0).item())
    target = teacher_cfg_velocity(other, batch, null, torch.full((SAMPLES,), 3.5))
    predicted = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, 3.5)
    assert loss.item() == pytest.approx(mse_loss(predicted, target).item(), rel=1e-4)


def test_model_guidance_is_flow_matching_with_the_teacher_s_guidance_in_its_target(transformer, other, batch):
    null, guidance = conditioning(2), torch.tensor([1.0, 3.5, 6.0])[:SAMPLES]
    loss = losses.LOSSES["model_guidance"](transformer, batch, guidance, null, other)
    conditional, empty = (flux1.predict(other, batch.x_t, batch.t, captions, 1.0) for captions in (batch.conditioning, null))
    target = batch.velocity + (guidance - 1)[:, None, None] * (conditional - empty)
    predicted = flux1.predict(transformer, batch.x_t, batch.t, batch.conditioning, guidance)
    assert loss.item() == pytest.approx(mse_loss(predicted, target).item(), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_bypassed_guidance_input_changes_nothing_any_more(tiny, batch):
    model = flux1.load_transformer(str(tiny)).eval()
    before = [flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance) for guidance in (1.0, 3.5)]
    assert not torch.equal(*before)
    flux1.bypass_guidance(model)
    after = [flux1.predict(model, batch.x_t, batch.t, batch.conditioning, guidance) for guidance in (1.0, 3.5)]
    assert torch.equal(*after)
    assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize(
    ("values", "guidance", "said"),
    [
        ({"name": "mse"}, 1.0, r"loss\.name=mse is unknown\. Choose flow_matching, guidance, cfg_augmented, distillation or model_guidance\."),
        ({"guidance_range": [6.0, 2.0]}, 1.0, r"loss\.guidance_range=\[6\.0, 2\.0\] is no range\."),
        ({"guidance_range": [2.0]}, 1.0, "is no range"),
        ({"teacher": "runs/recovered"}, 1.0, "flow matching learns from the pictures alone"),
        ({"name": "distillation"}, 3.5, r"Set loss\.teacher to a recovered one\."),
        ({"name": "model_guidance"}, 3.5, r"loss\.name=model_guidance learns from an undistilled model\. Set loss\.teacher to a recovered one\."),
        ({"name": "guidance", "teacher_lora": "runs/lora"}, 3.5, r"Set loss\.teacher to the model that it was trained on\."),
        ({"name": "guidance"}, 0.0, "must be more than 0"),
        ({"name": "cfg_augmented", "guidance_range": [0.0, 6.0]}, 3.5, "must be more than 0"),
        ({"bypass_guidance": True, "guidance_range": [2.0, 6.0]}, 1.0, "Set one of them"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(values, guidance, said):
    with pytest.raises(ConfigError, match=said):
        LossConfig(**values).check(guidance)


def test_losses_that_can_be():
    LossConfig().check(1.0)
    LossConfig(name="guidance", guidance_range=[2.0, 6.0], teacher="runs/recovered").check(3.5)
    assert LossConfig().guidances(1.0) == [1.0, 1.0]
    assert LossConfig(guidance_range=[2.0, 6.0]).guidances(1.0) == [2.0, 6.0]
