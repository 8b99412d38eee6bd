"""Non-finite numbers, spikes and rising held-out losses stop the training before the optimizer step; usual losses do not."""

import pytest

from dev2pro.errors import DivergedError
from dev2pro.training.divergence_guard import MIN_LOSSES, WINDOW, DivergenceGuard, GuardConfig


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_numbers_that_are_not_finite(loss, norm):
    guard = DivergenceGuard(GuardConfig())
    with pytest.raises(DivergedError, match=r"step 7 is not finite.*Lower optim\.lr.*choose another out="):
        guard.check_step(7, loss, norm)
    assert guard.recent == []


def test_a_leap_is_measured_against_the_usual_loss():
    guard = DivergenceGuard(GuardConfig(spike=3))
    for step in range(MIN_LOSSES):
        guard.check_step(step, 100.0 if step == 5 else 1.0, 1.0)  # too early to tell what is usual
    guard.check_step(MIN_LOSSES, 3.0, 1.0)
    with pytest.raises(DivergedError, match=r"The loss of step 21 leapt to 3\.1, more than guard\.spike=3 times the usual 1"):
        guard.check_step(MIN_LOSSES + 1, 3.1, 1.0)
    assert len(guard.recent) == MIN_LOSSES + 1


def test_only_so_many_losses_are_remembered():
    guard = DivergenceGuard(GuardConfig(spike=3))
    for step in range(3 * WINDOW):
        guard.check_step(step, 1.02**step, 1.0)  # it grows thousandfold, but slowly
    assert guard.recent == [1.02**step for step in range(2 * WINDOW, 3 * WINDOW)]


def test_off_is_off():
    guard = DivergenceGuard(GuardConfig())
    for step in range(2 * MIN_LOSSES):
        guard.check_step(step, 1e9 if step == 30 else 1e-9, 1.0)
    guard.held_out([{"step": 0, "loss": 1e-9}, {"step": 1, "loss": 1e9}])


def test_a_held_out_loss_that_rises():
    guard = DivergenceGuard(GuardConfig(collapse=2))
    curve = [{"step": step, "loss": loss} for step, loss in ((0, 1.0), (10, 0.5), (20, 1.0))]
    guard.held_out(curve)
    with pytest.raises(DivergedError, match=r"rose to 1\.01 at step 30, more than guard\.collapse=2 times the lowest, 0\.5"):
        guard.held_out([*curve, {"step": 30, "loss": 1.01}])
    with pytest.raises(DivergedError, match="held-out loss of step 30 is not finite"):
        DivergenceGuard(GuardConfig()).held_out([*curve, {"step": 30, "loss": float("nan")}])
