"""What a LoRA changes in predictions: on the base against where it was trained, on other pictures against its style's; the numbers, and words.

The effect is the velocity with the LoRA minus that without it, of the same noised pictures.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dev2pro.judging.diagnosis import dot


def effect(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """The effect (B, S, C) in every pass."""
    return [b - a for a, b in zip(before, after, strict=True)]


def sums(on_base: Tensor, trained: Tensor) -> dict[str, float]:
    """Mean squares and products of a pass's two effects, from which `gap` makes its numbers once they are averaged over passes."""
    return {"on_base": dot(on_base), "trained": dot(trained), "product": dot(on_base, trained)}


def gap(sums: dict[str, float]) -> dict[str, float | None]:
    """The transfer gap. effect, effect_trained: root mean square on the base, and on the model it was trained on at its guidance.

    cosine: 1 where both point the same way. ratio: effect / effect_trained. None for a LoRA without effect.
    """
    on_base, trained = math.sqrt(sums["on_base"]), math.sqrt(sums["trained"])
    cosine = sums["product"] / (on_base * trained) if on_base and trained else None
    return {"effect": on_base, "effect_trained": trained, "cosine": cosine, "ratio": on_base / trained if trained else None}


def leak(own: float, outside: float) -> float:
    """The mean square of the effect on pictures outside the style by that on the style's own: 0 touches only its style, 1 as much elsewhere."""
    return outside / own if own else 0.0


def words(result: dict[str, Any]) -> list[str]:
    """A paragraph for each LoRA of a diagnosis."""
    usual = result["usual_guidance"]
    return [
        f"{one['name']}: keeps {one['response_kept']:.0%} of the base's guidance response; loss {one['loss_usual']:.3f} at {usual:g}. "
        + " ".join([_gap_in_words(one, usual), *([_forgetting_in_words(one["forgetting"])] if "forgetting" in one else [])])
        for one in result["found"][1:]
    ]


def _gap_in_words(one: dict[str, Any], usual: float) -> str:
    gap = one["transfer"]
    if not one["effect"]:
        return "It has no effect."
    if "missing" in gap:
        return f"Its effect is not compared with that in its training: {gap['missing']}."
    if gap["cosine"] is None:
        return "It has no effect where it was trained."
    return (
        f"Its effect at {usual:g} has a cosine of {gap['cosine']:.2f} with that on {gap['trained_on']} at {gap['guidance']:g}, where it was trained, "
        f"and is {gap['ratio']:.2f} times as large."
    )


def _forgetting_in_words(found: dict[str, float]) -> str:
    return (
        f"On the pictures outside its style its effect is {found['leak']:.0%} of that on its own (mean squares), and the unguided loss there changes "
        f"by {found['loss_rise']:+.3f}."
    )
