"""Merges the parts of the study: tables and figure of docs/study.md, from docs/study/*.csv. `python -m bench.study_tables`.

A run is a style and a training seed: every arm was trained in each of them, so arms are compared run by run and digit by digit. Intervals are of a
two-way bootstrap over digits and runs; p-values are Holm's, over all rivals of an arm on a base.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure  # without pyplot, which needs a display
from matplotlib.lines import Line2D
from torch import Tensor

from dev2pro.judging.bootstrap import Bootstrap, holm, repetitions_needed
from flows import plan as plans

RESULTS, PAGE, FIGURE = Path("docs/study"), Path("docs/study.md"), Path("docs/study/arms.png")
BEGIN, END = "<!-- written by bench.study_tables -->", "<!-- end -->"
DRAWS, MANY = 10_000, 200
BASES = {"outside": "guidance 1 outside the distilled range", "inside": "guidance 1 inside the distilled range", "dead": "dead guidance input"}
LOWER = ("distance_to_ideal",)
PLAN = plans.read("study")
# no rivals: no LoRA, what needs the teacher, a step on the way to another arm
REFERENCES = (
    "none",
    *(name for name, arm in PLAN.arms.items() if "teacher" in arm.models),
    *{arm.teacher_arm for arm in PLAN.arms.values()} - {None},
)
PLAIN = ("base@1", "base@3.5")
RECOVERED = tuple(name for name, arm in PLAN.arms.items() if "recovered" in arm.models)  # arms that need the recovered model
PLAIN_LOSS = tuple(name for name, arm in PLAN.arms.items() if "loss.name" not in arm.lora)
COLOURS = {"pictures only": "#7f8c99", "the empty caption": "#c55a11", "a recovered model": "#1f4e79"}
METRICS = {"distance_to_ideal": "distance to the ideal", "prompt_fidelity": "prompt fidelity", "style_similarity": "style similarity"}


@dataclass(frozen=True)
class Results:
    """One base's numbers: metric -> arm -> (digits, runs), the runs in the same order for all arms; and the response that each keeps."""

    runs: list[tuple[str, str]]
    tables: dict[str, dict[str, Tensor]]
    kept: dict[str, float]

    @property
    def arms(self) -> list[str]:
        """The arms that people could train, the nearest to the ideal first."""
        tables = self.tables["distance_to_ideal"]
        return sorted((arm for arm in tables if arm not in REFERENCES), key=lambda arm: tables[arm].mean().item())

    @property
    def bootstrap(self) -> Bootstrap:
        """Over digits and runs."""
        return Bootstrap(10, len(self.runs), DRAWS, seed=0)

    def gain(self, metric: str, arm: str, rival: str) -> Tensor:
        """Paired differences (digits, runs), more is better."""
        difference = self.tables[metric][arm] - self.tables[metric][rival]
        return -difference if metric in LOWER else difference


def read(base: str, folder: Path = RESULTS) -> Results | None:
    """A base's parts; None if there are none. Raises ValueError for a run that lacks an arm."""
    rows = [row for file in sorted(folder.glob(f"{base}-*.csv")) for row in csv.DictReader(file.open())]
    if not rows:
        return None
    runs = list(dict.fromkeys((row["seed"], row["style"]) for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "ideal"]
    tables = {metric: {arm: torch.full((10, len(runs)), float("nan"), dtype=torch.float64) for arm in arms} for metric in METRICS}
    for row in rows:
        for metric in METRICS if row["arm"] in arms else ():
            tables[metric][row["arm"]][int(row["digit"]), runs.index((row["seed"], row["style"]))] = float(row[metric])
    if lacking := [arm for arm in arms if tables["distance_to_ideal"][arm].isnan().any()]:
        raise ValueError(f"{base}: not every run has {lacking[0]}. Run the parts that lack it again.")
    kept = {arm: _mean([float(row["response_kept"]) for row in rows if row["arm"] == arm]) for arm in arms}
    return Results(runs, tables, kept)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def shown(interval: dict[str, float], metric: str, sign: bool = False) -> str:
    """mean (low to high), fidelity in points of a hundred."""
    scale, digits = (100, 1) if metric == "prompt_fidelity" else (1, 3)
    plus = "+" if sign else ""
    return f"{interval['mean'] * scale:{plus}.{digits}f} ({interval['low'] * scale:{plus}.{digits}f} to {interval['high'] * scale:{plus}.{digits}f})"


def table_of_arms(found: Results, *, alive: bool) -> list[str]:
    """Every arm at equal cost, the nearest to the ideal first, references last. Of a dead guidance input nothing could be kept."""
    lines = ["| arm | " + " | ".join(METRICS.values()) + " | guidance response kept |", "|---|" + "---|" * (len(METRICS) + 1)]
    for arm in [*found.arms, *(one for one in REFERENCES if one in found.tables["distance_to_ideal"])]:
        name = f"*{arm}*" if arm in REFERENCES else f"**{arm}**" if arm == found.arms[0] else arm
        cells = [shown(found.bootstrap.interval(found.tables[metric][arm]), metric) for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{found.kept[arm]:.2f}' if alive else ''} |")
    return lines


def table_of_gains(found: Results, arm: str, rivals: Sequence[str]) -> list[str]:
    """One arm over each of its rivals: paired gains, whether they are shown, and how many runs would decide the others."""
    lines = []
    for metric in ("distance_to_ideal", "prompt_fidelity"):
        gains = [found.gain(metric, arm, rival) for rival in rivals]
        adjusted = holm([found.bootstrap.p_value(gain) for gain in gains])
        for rival, gain, p in zip(rivals, gains, adjusted, strict=True):
            interval = found.bootstrap.interval(gain)
            decided = "better" if p < 0.05 and interval["mean"] > 0 else "worse" if p < 0.05 else ""
            needed = repetitions_needed(interval, len(found.runs), len(rivals))
            open_ = f"undecided; {f'about {needed}' if needed < MANY else f'more than {MANY}'} runs would tell"
            lines.append(f"| {arm} | {rival} | {METRICS[metric]} | {shown(interval, metric, sign=True)} | {p:.3f} | {decided or open_} |")
    return lines


def table_of_bases(bases: dict[str, Results], folder: Path = RESULTS) -> list[str]:
    """What each base's diagnosis says, and what recovery gains there in distance to the ideal: over the plain arms and over the best rival."""
    with (folder / "bases.csv").open() as file:
        diagnoses = {row["base"]: row for row in csv.DictReader(file)}
    lines = [
        "| base | acts like, at 1 | loss at 1, and unguided | recovered@1 over base@1 | over base@3.5 | over its best rival |",
        "|---|---|---|---|---|---|",
    ]
    for base, found in bases.items():
        says, rival = diagnoses[base], next(arm for arm in found.arms if arm not in RECOVERED)
        gains = [shown(found.bootstrap.interval(found.gain("distance_to_ideal", "recovered@1", arm)), "", sign=True) for arm in (*PLAIN, rival)]
        acts_like = f"{float(says['acts_like']):.1f}" if says["acts_like"] else "none"
        losses = f"{float(says['loss']):.2f}, {float(says['loss_unguided']):.2f}"
        lines.append(f"| {base} | {acts_like} | {losses} | {gains[0]} | {gains[1]} | {gains[2]}, {rival} |")
    return lines


def report(bases: dict[str, Results], folder: Path = RESULTS) -> str:
    """The page's written part."""
    head = ["| arm | against | measure | gain, more is better | p (Holm) | |", "|---|---|---|---|---|---|"]
    parts = [*table_of_bases(bases, folder), ""]
    for base, found in bases.items():
        styles, seeds = {style for _, style in found.runs}, {seed for seed, _ in found.runs}
        parts += [f"### {BASES[base].capitalize()} ({base})", "", f"{len(found.runs)} runs: {len(styles)} styles, {len(seeds)} seeds.", ""]
        parts += [*table_of_arms(found, alive=base != "dead"), ""]
        naive = [arm for arm in found.arms if arm not in RECOVERED]
        best = found.arms[0]
        parts += [*head, *table_of_gains(found, "recovered@1", naive)]
        parts += table_of_gains(found, best, [arm for arm in found.arms if arm != best]) if best != "recovered@1" else []
        parts += [""]
    return "\n".join(parts)


def draw(bases: dict[str, Results], path: Path) -> None:
    """The figure: how much nearer to the ideal than plain training at guidance 1 every arm comes, the best on top."""
    tables = [found.tables["distance_to_ideal"] for found in bases.values()]
    arms = sorted(next(iter(bases.values())).arms, key=lambda arm: -sum(table[arm].mean().item() for table in tables))
    figure = Figure(figsize=(10, 1 + 0.3 * len(arms)), dpi=100, layout="constrained")
    for axis, (base, found) in zip(figure.subplots(1, len(bases), sharey=True, squeeze=False)[0], bases.items(), strict=True):
        for row, arm in enumerate(arms):
            interval = found.bootstrap.interval(found.gain("distance_to_ideal", arm, PLAIN[0]))
            colour = COLOURS["a recovered model" if arm in RECOVERED else "pictures only" if arm in PLAIN_LOSS else "the empty caption"]
            axis.plot([interval["low"], interval["high"]], [row, row], color=colour, linewidth=1.6)
            axis.plot(interval["mean"], row, color=colour, marker="o", markersize=5)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(BASES[base], fontsize=9, loc="left")
        axis.set_xlabel(f"nearer to the ideal than {PLAIN[0]}, by", fontsize=8)
        axis.set_yticks(range(len(arms)), arms)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colour, marker="o", label=f"needs {name}") for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Writes the figure, and the tables into docs/study.md between its two marks."""
    bases = {base: found for base in BASES if (found := read(base))}
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{report(bases)}\n{END}{rest.partition(END)[2]}")
    draw(bases, FIGURE)
    print(f"{PAGE}: {', '.join(f'{base} {len(found.runs)} runs' for base, found in bases.items())}")


if __name__ == "__main__":
    main()
