"""How a model's prediction moves with its guidance input, what that says about its distillation, and that in words; no teacher is needed.

A perfect student of true CFG predicts v(g) = u + g d at guidance g: u for the empty caption, d what the caption adds (Ho and Salimans 2022; Meng et
al. 2022). So its predictions lie on a line over the guidance: at 1 is the undistilled model's prediction, at 0 that of the empty caption.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dev2pro.models import flow_matching

DEAD = 0.25  # of a perfect student's response: below it, the guidance input does next to nothing
INSIDE = 0.5  # of the way from guidance 1 to the line's lower point: a base that acts like less was distilled at 1, too

COMPARED = (("recovered@1", "base@1"), ("model_guidance@3.5", "cfg_augmented@3.5"))  # what needs recovery, and the best like it that does not
GAINS = {  # docs/study.md: how much nearer to the ideal the first of each two came; mean, low, high
    "outside": ((0.017, 0.006, 0.036), (0.011, -0.001, 0.028)),
    "inside": ((0.000, -0.007, 0.008), (0.007, -0.006, 0.022)),
    "dead": ((0.012, 0.003, 0.026), (0.009, -0.002, 0.021)),
}
WITHOUT = "without a recovered model use loss.name=cfg_augmented at the usual guidance; with one, end the LoRA with loss.name=model_guidance."
ADVICE = {
    "outside": f"Do not train on it with plain flow matching: {WITHOUT}",
    "inside": f"Plain flow matching at guidance 1 is as good on it as on a recovered model. For more, {WITHOUT}",
    "dead": f"Do not train on it with plain flow matching: {WITHOUT}",
}
REGIMES = {
    "dead": "its guidance input does next to nothing",
    "inside": "guidance 1 lies inside the range that it was distilled at",
    "outside": "guidance 1 lies outside the range that it was distilled at",
}


@dataclass(frozen=True)
class Predictions:
    """A model's velocities (B, S, C) of the same noised pictures: at guidance 1, `usual`, `low` and `high`, and for the empty caption at `usual`."""

    at_1: Tensor
    at_usual: Tensor
    at_low: Tensor
    at_high: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Guidances:
    """The guidance inputs that a model is asked at: the usual one, and the two that its line goes through."""

    usual: float
    low: float
    high: float

    def known(self, found: Sequence[Predictions]) -> dict[float, list[Tensor]]:
        """Guidance -> the predictions for the captions there, of several passes."""
        at_1, at_usual = [one.at_1 for one in found], [one.at_usual for one in found]
        return {self.low: [one.at_low for one in found], self.high: [one.at_high for one in found], 1.0: at_1, self.usual: at_usual}

    def slope(self, found: Predictions) -> Tensor:
        """The response: change of the prediction (B, S, C) for one more of guidance, along the line."""
        return (found.at_high - found.at_low) / (self.high - self.low)

    def unguided(self, at_usual: Tensor, empty: Tensor) -> Tensor:
        """The usual prediction with the guidance taken out of it by the model's own empty caption, (v + (g - 1) u) / g."""
        return flow_matching.apply_cfg(empty, at_usual, 1 / self.usual)

    def sums(self, found: Predictions, target: Tensor, teacher: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        """Mean squares and products over a batch's numbers, from which `summary` makes its shares once they are averaged over batches.

        `target` is the flow-matching target; `teacher`: an undistilled model's velocities for the captions and for the empty one.
        """
        slope = self.slope(found)
        caption = (found.at_usual - found.empty) / self.usual
        line_at_1, line_at_0 = found.at_low + (1 - self.low) * slope, found.at_low - self.low * slope
        unguided = self.unguided(found.at_usual, found.empty)
        sums = {
            "loss": dot(found.at_1 - target), "loss_usual": dot(found.at_usual - target), "loss_unguided": dot(unguided - target),
            "slope": dot(slope), "caption": dot(caption), "slope_caption": dot(slope, caption), "moved": dot(found.at_1 - found.at_low, slope),
            "off_line": dot(found.at_1 - line_at_1), "off_empty": dot(found.empty - line_at_0),
        }  # fmt: skip
        if teacher:
            conditional, true = teacher[0], teacher[0] - teacher[1]
            sums |= {"true": dot(true), "slope_true": dot(slope, true), "teacher_distance": dot(found.at_1 - conditional),
                     "line_distance": dot(line_at_1 - conditional), "unguided_distance": dot(unguided - conditional)}  # fmt: skip
        return sums

    def summary(self, sums: dict[str, float]) -> dict[str, Any]:
        """What the sums say, with what the caption adds in the model's own eyes, (v(usual) - v(empty)) / usual, as the measure.

        loss, loss_usual: flow-matching loss at guidance 1 and at the usual one. loss_unguided: of the usual prediction with the guidance taken out
        of it by the model's own empty caption, (v + (g - 1) u) / g.
        response: the slope projected on what the caption adds; 1 for a perfect student, 0 for a dead input. acts_like: the guidance whose
        point on the line is nearest to the prediction at 1; None for a dead input. off_line, off_empty: squared distance of the prediction
        at 1, and of the empty caption's, to the line at 1 and at 0, by the squared size of what the caption adds.
        With a teacher: true_response, against what the caption adds in its eyes, and squared distances to its prediction.
        """
        caption = sums["caption"] or float("nan")
        response = sums["slope_caption"] / caption
        found: dict[str, Any] = {key: sums[key] for key in ("loss", "loss_usual", "loss_unguided")}
        found |= {"response": response, "acts_like": self.low + sums["moved"] / sums["slope"] if response >= DEAD else None}
        found |= {key: sums[key] / caption for key in ("off_line", "off_empty")}
        if "true" in sums:
            found |= {"true_response": sums["slope_true"] / sums["true"]}
            found |= {key: sums[key] for key in ("teacher_distance", "line_distance", "unguided_distance")}
        return found

    def regime(self, found: dict[str, Any]) -> str:
        """One of REGIMES, for a summary."""
        if found["acts_like"] is None:
            return "dead"
        return "inside" if found["acts_like"] < 1 + INSIDE * (self.low - 1) else "outside"

    def kept(self, base: Iterable[Predictions], found: Iterable[Predictions]) -> float:
        """The share of the base's response that a LoRA has left: its slope projected on the base's; 1 for all of it."""
        pairs = [(self.slope(before), self.slope(after)) for before, after in zip(base, found, strict=True)]
        return sum(len(a) * dot(a, b) for a, b in pairs) / sum(len(a) * dot(a) for a, _ in pairs)


def dot(a: Tensor, b: Tensor | None = None) -> float:
    """Mean product of two tensors' numbers, or mean square of one's."""
    return (a.float() * (a if b is None else b).float()).mean().item()


def mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of several batches' sums, each with its number of pictures."""
    pictures = sum(count for count, _ in parts)
    return {key: sum(count * sums[key] for count, sums in parts) / pictures for key in parts[0][1]}


def words(result: dict[str, Any]) -> list[str]:
    """What a diagnosis says of the base, in sentences."""
    base, usual, (low, high) = result["found"][0], result["usual_guidance"], result["line"]
    lines = [f"{result['model']}: {REGIMES[base['regime']]} ({base['regime']})."]
    lines.append(
        f"From guidance {low:g} to {high:g} its prediction moves by {base['response']:.0%} of what true classifier-free guidance with its own empty "
        f"caption would do."
    )
    if base["acts_like"] is not None:
        lines.append(f"At guidance 1 it predicts what it predicts at about {base['acts_like']:.1f}.")
    lines.append(
        f"Loss on held-out pictures: {base['loss']:.3f} at guidance 1, {base['loss_usual']:.3f} at {usual:g}, and "
        f"{base['loss_unguided']:.3f} at {usual:g} with the guidance taken out by the empty caption."
    )
    if "true_response" in base:
        lines.append(
            f"Against the teacher: the true response is {base['true_response']:.0%}; at guidance 1 the base is {base['teacher_distance']:.3f} away, "
            f"its line {base['line_distance']:.3f}, its prediction at {usual:g} without guidance {base['unguided_distance']:.3f}."
        )
    lines.append(advice(base["regime"]))
    return lines


def advice(regime: str) -> str:
    """What recovery brought on the study's base of this regime, in squared distance to the ideal's pictures, and what to do."""
    plain, guided = (f"{mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})" for mean, low, high in GAINS[regime])
    return (
        "On the study's base of this kind, digits, not FLUX.1-dev, a LoRA trained on the recovered model came nearer to the ideal than one trained "
        f"at guidance 1 by {plain}; and one that was ended with model guidance, which needs the recovered model, than one with the CFG-augmented "
        f"loss, which does not, by {guided}. {ADVICE[regime]}"
    )
