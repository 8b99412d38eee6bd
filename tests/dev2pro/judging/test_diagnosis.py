import pytest
import torch

from dev2pro.judging import diagnosis
from dev2pro.judging.diagnosis import Guidances, Predictions

GUIDANCES = Guidances(usual=3.5, low=2.0, high=6.0)
SHAPE = (2, 16, 4)


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Velocities for the empty caption, what the caption adds, and the pictures' own."""
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=draw) for _ in range(3))


def student(u, d, *, response: float = 1.0, acts_like: float = 1.0, at: float = 3.5) -> Predictions:
    """Predicts true CFG at the usual guidance, moves by a share of it over the guidance, and at 1 predicts as at another guidance."""

    def v(guidance: float) -> torch.Tensor:
        return u + (at + response * (guidance - at)) * d

    return Predictions(v(acts_like), v(3.5), v(2.0), v(6.0), u)


def summary(found: Predictions, target, teacher=None) -> dict:
    return GUIDANCES.summary(GUIDANCES.sums(found, target, teacher))


def test_a_perfect_student_is_on_its_line_and_its_unguided_prediction_is_the_teachers(parts):
    u, d, x = parts
    found = summary(student(u, d), x, (u + d, u))
    assert found["response"] == pytest.approx(1)
    assert found["true_response"] == pytest.approx(1)
    assert found["acts_like"] == pytest.approx(1)
    small = [found[key] for key in ("off_line", "off_empty", "teacher_distance", "line_distance", "unguided_distance")]
    assert max(small) < 1e-9
    assert found["loss_unguided"] == pytest.approx((u + d - x).square().mean().item(), rel=1e-5)
    assert GUIDANCES.regime(found) == "inside"


@pytest.mark.parametrize(("acts_like", "regime"), [(1.0, "inside"), (1.4, "inside"), (1.6, "outside"), (3.9, "outside")])
def test_a_base_that_acts_like_another_guidance_at_1_was_not_distilled_there(parts, acts_like, regime):
    u, d, x = parts
    found = summary(student(u, d, acts_like=acts_like), x)
    assert found["acts_like"] == pytest.approx(acts_like, rel=1e-4)
    assert GUIDANCES.regime(found) == regime
    assert found["off_line"] == pytest.approx((acts_like - 1) ** 2, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("response", "regime"), [(0.0, "dead"), (0.2, "dead"), (0.3, "inside")])
def test_a_weak_response_is_a_dead_input(parts, response, regime):
    u, d, x = parts
    found = summary(student(u, d, response=response), x)
    assert found["response"] == pytest.approx(response, abs=1e-6)
    assert GUIDANCES.regime(found) == regime
    assert (found["acts_like"] is None) == (regime == "dead")


def test_what_a_lora_keeps_of_the_response(parts):
    u, d, _ = parts
    base, other = student(u, d), torch.roll(u, 1)
    assert GUIDANCES.kept([base], [base]) == pytest.approx(1)
    assert GUIDANCES.kept([base], [student(other, d, response=0.5)]) == pytest.approx(0.5)
    assert GUIDANCES.kept([base], [student(u, d, response=0.0)]) == pytest.approx(0, abs=1e-6)


def test_batches_of_different_sizes_count_by_their_pictures():
    assert diagnosis.mean([(3, {"a": 1.0}), (1, {"a": 5.0})]) == {"a": 2.0}


def test_predictions_by_their_guidance(parts):
    u, d, _ = parts
    known = GUIDANCES.known([student(u, d), student(d, u)])
    assert list(known) == [2.0, 6.0, 1.0, 3.5]
    for guidance, (first, second) in known.items():
        torch.testing.assert_close(first, u + guidance * d)
        torch.testing.assert_close(second, d + guidance * u)


def test_the_words_name_the_regime(parts):
    u, d, x = parts
    base = summary(student(u, d, acts_like=3.9), x, (u + d, u))
    base |= {"name": "base", "regime": GUIDANCES.regime(base)}
    result = {"model": "a/model", "usual_guidance": 3.5, "line": [2.0, 6.0], "found": [base]}
    text = "\n".join(diagnosis.words(result))
    assert "a/model: guidance 1 lies outside" in text
    assert "about 3.9" in text
    assert "the true response is 100%" in text
    assert "use loss.name=cfg_augmented" in text
    mean, low, high = diagnosis.GAINS["outside"][0]
    assert f"by {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})" in text
