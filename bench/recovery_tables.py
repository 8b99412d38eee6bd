"""Writes the tables and the figure of docs/recovery.md from docs/recovery/*.csv: `python -m bench.recovery_tables`."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.recovery import BASES, RESULTS, VARIANTS

PAGE, FIGURE = Path("docs/recovery.md"), RESULTS / "distance.png"
BEGIN, END = "<!-- written by bench.recovery_tables -->", "<!-- end -->"
HEAD = {
    "outside": "Guidance 1 outside the distilled range (outside)",
    "inside": "Guidance 1 inside the distilled range (inside)",
}
LENGTHS = ("125 steps", "250 steps", "full", "1000 steps")  # the same recovery, each with its learning rate down to zero
SUBSETS, LORAS = ("double blocks", "single blocks", "attention"), ("LoRA 4", "LoRA 16", "LoRA 64")
BLUE, ORANGE, GREEN, GREY = "#1f4e79", "#c55a11", "#4f8a3c", "#8a96a3"
ABOVE, BELOW, RIGHT = (0, 6), (0, -12), (5, 4)  # points from a marker to its name


def read(base: str, folder: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Variant -> its numbers, means over the seeds that are there, and `seeds`, their number; `none` is the base. Empty without a file."""
    path = folder / f"{base}.csv"
    rows = defaultdict[str, list[dict[str, str]]](list)
    for row in csv.DictReader(path.open()) if path.is_file() else ():
        rows[row["variant"]].append(row)
    order = [name for name in ("none", *VARIANTS) if name in rows]
    return {name: _mean(rows[name]) for name in order}


def _mean(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    numbers = [key for key in rows[0] if key not in ("base", "seed", "variant")]
    return {key: sum(float(row[key]) for row in rows) / len(rows) for key in numbers} | {"seeds": len(rows)}


def closed(found: dict[str, dict[str, float]], name: str, measure: str = "distance") -> float:
    """The share of the base's distance that a variant closed; below 0 where it went away from the teacher."""
    return 1 - found[name][measure] / found["none"][measure]


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """A line a variant, in the order of the plan."""
    lines = [
        "| variant | pictures | steps | trained | state MB | CPU s | distance | closed | high noise | empty caption | CFG 3.5 | held-out loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cost = ["", "", "", "", ""]
        if name != "none":
            cost = [f"{one['pictures']:,.0f}", f"{one['steps']:.0f}", f"{one['trained']:,.0f}", f"{one['state_mb']:.1f}", f"{one['cpu_seconds']:.0f}"]
        share = f"{closed(found, name):.1%}" if name != "none" else ""
        measured = [f"{one['distance']:.4f}", share, f"{one['high']:.4f}", f"{one['empty']:.4f}", f"{one['cfg']:.3f}", f"{one['loss']:.4f}"]
        label = "*the base*" if name == "none" else f"{name} ({one['seeds']} seeds)" if one["seeds"] > 1 else name
        lines.append(f"| {label} | {' | '.join([*cost, *measured])} |")
    return lines


def draw(bases: dict[str, dict[str, dict[str, float]]], path: Path = FIGURE) -> None:
    """A PNG: of each base, the distance against the pictures seen, and against the training state; all four with one scale of distances."""
    figure = Figure(figsize=(10, 3.4 * len(bases)), dpi=100, layout="constrained")
    grid = figure.subplots(len(bases), 2, squeeze=False)
    top = 1.25 * max(found[name]["distance"] for found in bases.values() for name in (*LENGTHS, *SUBSETS, *LORAS) if name in found)
    for (base, found), (left, right) in zip(bases.items(), grid, strict=True):
        _points(left, found, LENGTHS, BLUE, lambda one: one["steps"] * one["batch"], RIGHT, line=True)
        _points(right, found, ("full",), BLUE, lambda one: one["state_mb"], BELOW)
        _points(right, found, SUBSETS, ORANGE, lambda one: one["state_mb"], ABOVE)
        _points(right, found, LORAS, GREEN, lambda one: one["state_mb"], BELOW, line=True)
        left.set(title=f"{base}: distance to the teacher", xlabel="pictures seen, thousands", xticks=range(0, 40_001, 8000), xlim=(0, 40_000))
        left.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}")
        right.set(title=f"{base}: distance to the teacher, 500 steps", xlabel="weights, average and moments, MB", xscale="log", xlim=(0.4, 30))
        right.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        right.minorticks_off()
        for axis in (left, right):
            _base(axis, found["none"]["distance"], top)
            axis.set_ylim(0, top)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.title.set_fontsize(10)
    figure.savefig(path, format="png", metadata={"Software": None})


def _base(axis, distance: float, top: float) -> None:
    """A line where the base is, or words where that is off the scale."""
    if shown := distance < top:
        axis.axhline(distance, color=GREY, linewidth=1)
    words, height = ("the base", distance) if shown else (f"the base: {distance:.2f}, above", top)
    at = {"xycoords": ("axes fraction", "data"), "xytext": (0, -10), "textcoords": "offset points", "ha": "right"}
    axis.annotate(words, (1, height), fontsize=7, color=GREY, **at)


def _points(axis, found, names, colour, at, offset, line=False) -> None:
    shown = [(name, found[name]) for name in names if name in found]
    places = [(at(one), one["distance"]) for _, one in shown]
    axis.plot(*zip(*places, strict=True), color=colour, marker="o", markersize=4, linewidth=1.2 if line else 0) if places else None
    for (name, _), place in zip(shown, places, strict=True):
        axis.annotate(name, place, fontsize=7, xytext=offset, textcoords="offset points", color=colour, ha="left" if offset == RIGHT else "center")


def report(bases: dict[str, dict[str, dict[str, float]]]) -> str:
    """The page's written part."""
    parts = []
    for base, found in bases.items():
        parts += [f"### {HEAD[base]}", "", *table(found), ""]
    return "\n".join(parts)


def main() -> None:
    """Writes the figure, and the tables into docs/recovery.md between its two marks."""
    bases = {base: found for base in BASES if (found := read(base))}
    draw(bases)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{report(bases)}\n{END}{rest.partition(END)[2]}")
    print(f"{PAGE}: {', '.join(f'{base} {len(found)} rows' for base, found in bases.items())}")


if __name__ == "__main__":
    main()
