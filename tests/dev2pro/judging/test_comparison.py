import csv

import pytest
import torch
from torch import Tensor

from dev2pro.judging import comparison
from dev2pro.judging.comparison import Cell

KINDS = {"base@1": "base", "base@3.5": "base", "recovered@1": "recovered", "teacher@1": "teacher"}
SHAPE = (8, 6)


def fidelity(mean: float, seed: int = 0) -> Tensor:
    """A table (P, R) with that mean, and prompts that vary."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.1
    return mean + noise - noise.mean()


def cell(style: str, arm: str, inference: str = "base", **values: Tensor) -> Cell:
    return Cell(style, arm, inference, 3.5 if inference == "base" else 1.0, 1.0 if inference == "base" else 3.5, values, kid=0.01)


def cells(scores: dict[str, dict[str, float]]) -> list[Cell]:
    """style -> arm -> prompt fidelity."""
    return [
        cell(style, arm, prompt_fidelity=fidelity(mean, seed=7 * i + j))
        for i, (style, arms) in enumerate(scores.items())
        for j, (arm, mean) in enumerate(arms.items())
    ]


def compare(some: list[Cell], kinds: dict[str, str] = KINDS) -> dict:
    return comparison.compare(some, kinds, draws=300, seed=0)


def gain(result: dict, **wanted: str | None) -> dict:
    (one,) = [g for g in result["gains"] if all(g[key] == value for key, value in wanted.items())]
    return one


def test_the_shape_of_the_comparison():
    some = [
        cell("chalk", "ideal", "teacher", prompt_fidelity=fidelity(0.9)),
        *(cell("chalk", arm, inference, prompt_fidelity=fidelity(0.5)) for inference in ("base", "recovered") for arm in ("none", *KINDS)),
    ]
    result = compare(some)
    assert result["styles"] == ["chalk"]
    assert result["arms"] == list(KINDS)
    assert result["inference"] == ["base", "recovered"]  # the teacher is a reference
    assert len(result["cells"]) == len(some)
    first = result["cells"][0]
    assert (first["style"], first["arm"], first["inference"], first["guidance"], first["cfg_scale"]) == ("chalk", "ideal", "teacher", 1.0, 3.5)
    assert first["kid"] == {"mean": 0.01}
    assert first["prompt_fidelity"]["mean"] == pytest.approx(0.9)
    assert first["prompt_fidelity"]["low"] < 0.9 < first["prompt_fidelity"]["high"]


def test_gains_are_of_recovered_arms_over_the_base_s_arms_on_the_base():
    on_base = {"none": 0.9, "base@1": 0.6, "base@3.5": 0.5, "recovered@1": 0.8, "teacher@1": 0.9}
    some = [*cells({"chalk": on_base}), *(cell("chalk", arm, "recovered", prompt_fidelity=fidelity(0.0)) for arm in KINDS)]
    result = compare(some)
    assert {(g["arm"], g["rival"], g["inference"]) for g in result["gains"]} == {
        ("recovered@1", "base@1", "base"),
        ("recovered@1", "base@3.5", "base"),
    }
    assert gain(result, style="chalk", rival="base@1")["mean"] == pytest.approx(0.2, abs=1e-6)
    assert gain(result, style="chalk", rival="base@3.5")["mean"] == pytest.approx(0.3, abs=1e-6)


def test_more_is_better_for_every_metric():
    better = {"prompt_fidelity": fidelity(0.9), "style_similarity": fidelity(0.8), "distance_to_ideal": fidelity(0.1)}
    worse = {"prompt_fidelity": fidelity(0.6, 1), "style_similarity": fidelity(0.7, 1), "distance_to_ideal": fidelity(0.5, 1)}
    result = compare([cell("chalk", "recovered@1", **better), cell("chalk", "base@1", **worse)], {"base@1": "base", "recovered@1": "recovered"})
    means = {g["metric"]: g["mean"] for g in result["gains"] if g["style"] == "chalk"}
    assert means == pytest.approx({"prompt_fidelity": 0.3, "style_similarity": 0.1, "distance_to_ideal": 0.4}, abs=1e-6)
    assert all(g["low"] > 0 for g in result["gains"])


def test_gains_are_paired():
    table = torch.rand(SHAPE)
    result = compare([cell("chalk", "recovered@1", prompt_fidelity=table), cell("chalk", "base@1", prompt_fidelity=table)])
    one = gain(result, style="chalk")
    assert (one["mean"], one["low"], one["high"]) == (0, 0, 0)


def test_all_is_the_mean_over_styles():
    result = compare(cells({"chalk": {"base@1": 0.5, "recovered@1": 0.9}, "neon": {"base@1": 0.7, "recovered@1": 0.6}, "ink": {"base@1": 0.5}}))
    assert {g["style"] for g in result["gains"]} == {"chalk", "neon", None}  # ink has nothing to compare
    everything = gain(result, style=None)
    assert everything["mean"] == pytest.approx((0.4 - 0.1) / 2, abs=1e-6)
    width = {g["style"]: g["high"] - g["low"] for g in result["gains"]}
    assert width[None] < (width["chalk"] + width["neon"]) / 2  # the mean of two is surer than one


def test_metrics_that_some_styles_lack():
    some = cells({"chalk": {"base@1": 0.5, "recovered@1": 0.9}, "neon": {"base@1": 0.5, "recovered@1": 0.9}})
    some[0].values["distance_to_ideal"], some[1].values["distance_to_ideal"] = fidelity(0.5), fidelity(0.2)
    some[3].values["distance_to_ideal"] = fidelity(0.2)  # its rival has none
    result = compare(some)
    assert {g["style"] for g in result["gains"] if g["metric"] == "distance_to_ideal"} == {"chalk", None}
    assert gain(result, style=None, metric="distance_to_ideal")["mean"] == pytest.approx(0.3, abs=1e-6)
    assert {g["style"] for g in result["gains"] if g["metric"] == "prompt_fidelity"} == {"chalk", "neon", None}


def test_the_verdict_names_clear_wins_and_losses_against_the_nearest_rival():
    verdict = compare(
        cells(
            {
                "chalk": {"base@1": 0.2, "base@3.5": 0.3, "recovered@1": 0.9},  # clearly better than both
                "neon": {"base@1": 0.2, "base@3.5": 0.9, "recovered@1": 0.5},  # clearly worse than one
                "ink": {"base@1": 0.2, "base@3.5": 0.5, "recovered@1": 0.5001},  # no clear difference from one
            }
        )
    )["verdict"]
    assert "7 points more often than base@3.5, its nearest rival" in verdict  # (60 - 40 + 0) / 3
    assert "clearly better in 1 of 3 styles (chalk)" in verdict
    assert "clearly worse in 1 of 3 styles (neon)" in verdict


def test_of_several_arms_the_verdict_is_about_the_best_against_its_nearest_rival():
    scores = {"base@1": 0.2, "cfg_augmented": 0.6, "recovered@1": 0.5, "redistilled": 0.9}
    verdict = compare(cells({"chalk": scores}), {"base@1": "base", "cfg_augmented": "base", "recovered@1": "recovered", "redistilled": "recovered"})[
        "verdict"
    ]
    assert "the LoRA redistilled, the best of 2 that need the recovered model, obeys the prompt 30 points more often than cfg_augmented" in verdict
    assert "clearly better in 1 of 1 styles (chalk), clearly worse in 0 of 1" in verdict


def test_the_verdict_of_a_loss():
    verdict = compare(cells({"chalk": {"base@1": 0.9, "recovered@1": 0.5}}))["verdict"]
    assert "40 points less often than base@1" in verdict
    assert "clearly better in 0 of 1 styles, clearly worse in 1 of 1 styles (chalk)" in verdict


@pytest.mark.parametrize(
    "scores",
    [
        {"chalk": {"recovered@1": 0.9, "teacher@1": 0.9, "none": 0.2}},
        {"chalk": {"base@1": 0.5}},
        {"chalk": {"recovered@1": 0.9}, "neon": {"base@1": 0.5}},
    ],
    ids=["no rival", "no recovered", "in different styles"],
)
def test_the_verdict_without_rivals(scores):
    result = compare(cells(scores))
    assert result["gains"] == []
    assert result["verdict"].startswith("Nothing to compare")


def test_every_picture_has_a_row(tmp_path):
    one = cell("chalk", "base@1", prompt_fidelity=fidelity(0.3))
    some = [one, cell("chalk", "none", prompt_fidelity=fidelity(0.9), distance_to_ideal=fidelity(0.1))]
    comparison.write_pictures(tmp_path / "pictures.csv", some, [0, 0, 1, 1, 2, 2, 3, 3])
    with (tmp_path / "pictures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * SHAPE[0] * SHAPE[1]
    last = rows[-1]
    assert (last["arm"], last["prompt"], last["meaning"], last["seed"]) == ("none", "7", "3", "5")
    assert float(last["distance_to_ideal"]) == pytest.approx(some[1].values["distance_to_ideal"][7, 5].item(), rel=1e-5)
    assert rows[0]["distance_to_ideal"] == ""  # it was not measured
