import pytest
import torch

from dev2pro.judging import diagnosis, lora_effect

SHAPE = (2, 16, 4)


def effects(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def gap(on_base: list[torch.Tensor], trained: list[torch.Tensor]) -> dict:
    return lora_effect.gap(diagnosis.mean([(len(a), lora_effect.sums(a, b)) for a, b in zip(on_base, trained, strict=True)]))


def test_an_effect_is_the_difference_in_every_pass():
    before, after = effects(0, 1), effects(2, 3)
    found = lora_effect.effect(before, after)
    assert all(torch.equal(one, b - a) for one, a, b in zip(found, before, after, strict=True))


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_the_same_effect_of_another_size_has_a_cosine_of_1_and_that_ratio(times):
    trained = effects(0, 1)
    found = gap([times * one for one in trained], trained)
    assert found["cosine"] == pytest.approx(1)
    assert found["ratio"] == pytest.approx(times)
    assert found["effect"] == pytest.approx(times * torch.stack(trained).square().mean().sqrt().item(), rel=1e-6)


def test_the_cosine_is_that_of_all_passes_numbers():
    on_base, trained = effects(0, 1), effects(2, 3)
    a, b = torch.stack(on_base).flatten(), torch.stack(trained).flatten()
    found = gap(on_base, trained)
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-6)
    assert found["ratio"] == pytest.approx((a.norm() / b.norm()).item(), rel=1e-6)
    assert gap([-one for one in on_base], trained)["cosine"] == pytest.approx(-found["cosine"])


def test_no_effect_is_no_division_by_zero():
    none, some = [torch.zeros(SHAPE)], effects(0)
    assert gap(none, none) == {"effect": 0, "effect_trained": 0, "cosine": None, "ratio": None}
    assert gap(none, some)["ratio"] == 0
    assert gap(some, none)["cosine"] is gap(some, none)["ratio"] is None
    assert lora_effect.leak(0.0, 0.0) == 0
    assert lora_effect.leak(4.0, 1.0) == 0.25


def words(transfer: dict, **more) -> str:
    lora = {"name": "mine", "response_kept": 0.42, "loss_usual": 1.0, "effect": 0.3, "transfer": transfer, **more}
    [line] = lora_effect.words({"usual_guidance": 3.5, "found": [{"name": "base"}, lora]})
    return line


def test_every_lora_has_its_sentences():
    told = {"trained_on": "runs/recover", "guidance": 1.0, "cosine": 0.9, "ratio": 1.68}
    line = words(told, forgetting={"leak": 0.56, "loss_rise": 0.25})
    assert line.startswith("mine: keeps 42% of the base's guidance response; loss 1.000 at 3.5. ")
    assert "cosine of 0.90 with that on runs/recover at 1, where it was trained, and is 1.68 times as large." in line
    assert "its effect is 56% of that on its own (mean squares), and the unguided loss there changes by +0.250." in line
    assert "outside its style" not in words(told)
    assert words({"missing": "x is not here"}).endswith("Its effect is not compared with that in its training: x is not here.")
    assert words({"missing": "x is not here"}, effect=0.0).endswith("It has no effect.")
    assert words({**told, "cosine": None, "ratio": None}).endswith("It has no effect where it was trained.")
