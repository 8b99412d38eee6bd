"""The loss curves of a running stage as a small PNG for the UI."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure  # without pyplot, which is not thread-safe
from matplotlib.ticker import MaxNLocator, NullFormatter

POINTS = 800  # most points of the training loss: more than the pixels of the chart
INK, SECOND, FAINT = "#1f4e79", "#c55a11", "#b8c4d0"
PANELS = {"teacher_distance": "distance to the teacher", "guidance_gap": "guidance gap"}  # the second panel: the first of these that was measured


def draw(losses: Sequence[tuple[int, float]], curve: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of 800 x 300 pixels: training and held-out loss, and the progress of the recovery if it was measured."""
    beside = next((key for key in PANELS if any(point.get(key) is not None for point in curve)), None)
    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2 if beside else 1, squeeze=False)[0]
    thin = losses[:: max(1, len(losses) // POINTS)]
    if thin:
        axes[0].plot(*zip(*thin, strict=True), color=FAINT, linewidth=0.8, label="in training")
    _line(axes[0], curve, "loss", INK, "held out")
    _line(axes[0], curve, "loss_usual", SECOND, "held out, at the usual guidance")
    axes[0].set_title("loss", fontsize=10, loc="left")
    if axes[0].lines:
        axes[0].legend(fontsize=7, frameon=False)
        _log_scale_if_wide(axes[0])
    if beside:
        _line(axes[1], curve, beside, INK, "")
        axes[1].set_title(PANELS[beside], fontsize=10, loc="left")
        axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axis.set_xlabel("step", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _log_scale_if_wide(axis: Any) -> None:
    values = [value for line in axis.lines for value in line.get_ydata()]
    if min(values) > 0 and max(values) > 5 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _line(axis: Any, curve: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    points = [(point["step"], point[key]) for point in curve if point.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
