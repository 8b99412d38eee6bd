"""The choice among points, on numbers whose right answer is known: what is shown, what ties, and what has collapsed."""

import pytest
import torch

from dev2pro.judging import selection
from dev2pro.judging.bootstrap import Bootstrap
from dev2pro.judging.selection import Choice, Point, Reference

PROMPTS, SEEDS = 40, 6
DEFAULT = Point(60, 1.0, 3.5)
REFERENCE = Reference(style_similarity=0.2, diversity=0.4, heldout_similarity=0.6)
Numbers = tuple[float, float, float]  # fidelity, style similarity, diversity
GOOD: Numbers = (0.8, 0.4, 0.3)


def measured(fidelity: float, style: float, diversity: float) -> dict[str, torch.Tensor]:
    """A point's values: the same pictures fail first, whatever the fidelity, as pictures of one noise do."""
    order = torch.rand(PROMPTS, SEEDS, generator=torch.Generator().manual_seed(0))
    noise = 0.02 * torch.randn(PROMPTS, SEEDS, generator=torch.Generator().manual_seed(1))
    return {"prompt_fidelity": (order < fidelity).float(), "style_similarity": style + noise, "diversity": diversity + 0 * noise}


def choose(points: dict[Point, Numbers], share: float = 0.5, reference: Reference = REFERENCE, default: Point = DEFAULT) -> Choice:
    bootstrap = Bootstrap((PROMPTS, SEEDS), 400, seed=0)
    return selection.choose({point: measured(*numbers) for point, numbers in points.items()}, default, reference, bootstrap, share)


def at(strength: float = 1.0, guidance: float = 3.5, step: int = 60) -> Point:
    return Point(step, strength, guidance)


def test_the_score_by_hand():
    values = {"prompt_fidelity": torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]), "style_similarity": torch.tensor([[0.4, 0.4, 0.2, 0.9, 0.1]])}
    assert selection.score(values, REFERENCE)[0].tolist() == pytest.approx([0.5, 0, 0, 1, 0])
    blind = Reference(style_similarity=0.6, diversity=0.4, heldout_similarity=0.6)
    assert not blind.sees_style
    assert torch.equal(selection.score(values, blind), values["prompt_fidelity"])


def test_a_clearly_better_point_displaces_the_default_and_it_is_said():
    choice = choose({DEFAULT: GOOD, at(0.8): (0.9, 0.5, 0.3), at(1.2): (0.7, 0.4, 0.3)})
    assert choice.point == at(0.8)
    assert [row["chosen"] for row in choice.rows] == [False, True, False]
    assert choice.rows[1]["gain"]["low"] > 0
    assert "step 60 at strength 0.8 and guidance 3.5" in choice.words[-1]
    assert "in place of the default, step 60 at strength 1 and guidance 3.5, which it surpasses by 0." in choice.words[-1]


def lucky(gain: float, spread: float, seed: int = 3) -> dict[str, torch.Tensor]:
    """As good as the default, and by chance better in some prompts and worse in others: by `gain` in the mean."""
    chance = torch.randn(PROMPTS, 1, generator=torch.Generator().manual_seed(seed)).expand(PROMPTS, SEEDS)
    numbers = measured(1.0, 0.4, 0.3)
    return numbers | {"style_similarity": numbers["style_similarity"] + spread * (chance - chance.mean()) + gain}


def among(points: dict[Point, dict[str, torch.Tensor]]) -> Choice:
    return selection.choose(points, DEFAULT, REFERENCE, Bootstrap((PROMPTS, SEEDS), 2000, seed=0), 0.5)


def test_the_default_stays_where_nothing_is_shown_and_the_best_is_named():
    choice = among({DEFAULT: measured(1.0, 0.4, 0.3), at(0.8): lucky(0.01, 0.1)})
    assert choice.point == DEFAULT
    assert choice.rows[1]["score"]["mean"] > choice.rows[0]["score"]["mean"]
    assert "no other of 2 points is shown to be better. The highest, step 60 at strength 0.8 and guidance 3.5, surpasses it by 0." in choice.words[-1]
    alone = choose({DEFAULT: GOOD})
    assert (alone.point, alone.rows[0]["gain"]) == (DEFAULT, {})
    assert "the only point" in alone.words[-1]


def test_what_one_comparison_shows_many_do_not():
    """The same gain beside so many others that one was to be expected."""
    few = {DEFAULT: measured(1.0, 0.4, 0.3), at(0.8): lucky(0.026, 0.07)}
    many = {**few, **{at(1 + i / 100): lucky(0, 0.07, seed=10 + i) for i in range(1, 30)}}
    assert among(few).point == at(0.8)
    assert among(many).point == DEFAULT
    one, other = (among(points).rows[1]["gain"] for points in (few, many))
    assert one["p"] < 0.05 < other["p"]
    assert {**one, "p": 0} == {**other, "p": 0}


@pytest.mark.parametrize(("far", "near"), [(at(0.4), at(0.8)), (at(1, 1.5), at(1, 2.5)), (at(step=20), at(step=40))])
def test_among_equals_the_nearest_to_the_default_is_taken(far, near):
    better: Numbers = (0.9, 0.5, 0.3)
    assert choose({DEFAULT: GOOD, far: better, near: better}).point == near
    assert choose({near: better, far: better, DEFAULT: GOOD}).point == near, "in any order"
    assert choose({DEFAULT: GOOD, far: (1.0, 0.6, 0.3), near: better}).point == far, "where it is no tie"


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((1.0, 0.6, 0.19), "its diversity of 0.190 is less than 0.5 of the 0.400 of the base without a LoRA"),
        ((0.3, 0.6, 0.3), "its prompt fidelity of 3"),
    ],
)
def test_a_collapsed_point_is_never_chosen_and_is_named(numbers, why):
    choice = choose({DEFAULT: GOOD, at(1.2): numbers})
    assert choice.point == DEFAULT
    assert why in choice.rows[1]["collapsed"]
    assert choice.words[0].startswith("Collapsed, and not to be chosen: step 60 at strength 1.2 and guidance 3.5, its ")
    assert why in choice.words[0]
    assert choose({DEFAULT: GOOD, at(1.2): (1.0, 0.6, 0.19)}, share=0).point == at(1.2), "with the guard off"


def test_a_collapsed_default_gives_way_to_a_worse_point():
    choice = choose({DEFAULT: (0.9, 0.6, 0.01), at(0.6): (0.7, 0.3, 0.3), at(0.8): (0.6, 0.3, 0.3)})
    assert choice.point == at(0.6)
    assert "in place of the default, step 60 at strength 1 and guidance 3.5, which has collapsed" in choice.words[-1]


def test_where_all_have_collapsed_nothing_is_chosen():
    choice = choose({DEFAULT: (0.9, 0.6, 0.01), at(0.6): (0.9, 0.6, 0.0)})
    assert choice.point is None
    assert not any(row["chosen"] for row in choice.rows)
    assert choice.words[-1] == "All 2 points have collapsed."


def test_more_points_change_no_score_and_prompts_in_another_order_no_choice():
    points = {DEFAULT: GOOD, at(0.8): (0.9, 0.5, 0.3)}
    few, many = choose(points), choose({**points, at(1.2): (0.7, 0.5, 0.3), at(1, 2.5): (0.6, 0.5, 0.3)})
    assert [row["score"] for row in many.rows[:2]] == [row["score"] for row in few.rows]
    turned = {point: {name: value.flip(0) for name, value in measured(*numbers).items()} for point, numbers in points.items()}
    assert selection.choose(turned, DEFAULT, REFERENCE, Bootstrap((PROMPTS, SEEDS), 400, seed=0), 0.5).point == few.point
