"""Merges the parts of the study: tables and figure of docs/study.md, from docs/study/*.csv. `python -m bench.study_tables`.

A run is a style and a training seed: arms are compared run by run and digit by digit, in the seeds that both were trained with. Intervals are of a
bootstrap over digits, styles and seeds; p-values are Holm's, over all rivals of an arm on a base.
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

RESULTS, PAGE = Path("docs/study"), Path("docs/study.md")
STEPS, PASSES, ALL = "study_steps", (225, 450, 900, 1800, 3600), 1800  # conf/pipeline/study_steps.yaml: arm-225 is the arm with so many passes
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
LEADERS = {"base@1": "#7f8c99", "cfg_augmented@3.5": "#c55a11", "recovered@1": "#1f4e79", "model_guidance@3.5": "#4f8a3c"}  # of STEPS
COLOURS = {"pictures only": "#7f8c99", "the empty caption": "#c55a11", "a recovered model": "#1f4e79"}
EFFECTS = {"response_kept": "response kept", "cosine": "transfer, cosine", "leak": "leak", "memorisation": "memorisation"}
METRICS = {"distance_to_ideal": "distance to the ideal", "prompt_fidelity": "prompt fidelity", "style_similarity": "style similarity"}


@dataclass(frozen=True)
class Results:
    """One base's numbers: metric -> arm -> (digits, styles, seeds), NaN where an arm was not run; and arm -> EFFECTS."""

    styles: list[str]
    seeds: list[str]
    tables: dict[str, dict[str, Tensor]]
    effects: dict[str, dict[str, float | None]]

    @property
    def arms(self) -> list[str]:
        """The arms that people could train, the nearest to the ideal first."""
        tables = self.tables["distance_to_ideal"]
        return sorted((arm for arm in tables if arm not in REFERENCES), key=lambda arm: tables[arm].nanmean().item())

    def values(self, metric: str, arm: str) -> Tensor:
        """An arm's numbers (digits, styles, seeds) for the seeds that it has."""
        return _present(self.tables[metric][arm])

    def gain(self, metric: str, arm: str, rival: str) -> Tensor:
        """Paired differences (digits, styles, seeds), more is better, for the seeds that both have. Raises ValueError for arms without any."""
        difference = _present(self.tables[metric][arm] - self.tables[metric][rival])
        if not difference.numel():
            raise ValueError(f"{arm} and {rival} have no seed in common. Run a part with both.")
        return -difference if metric in LOWER else difference


def read(base: str, folder: Path = RESULTS) -> Results | None:
    """A base's parts; None if there are none."""
    rows = [row for file in sorted(folder.glob(f"{base}-*.csv")) for row in csv.DictReader(file.open())]
    if not rows:
        return None
    styles, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("style", "seed"))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "ideal"]
    shape = (10, len(styles), len(seeds))
    tables = {metric: {arm: torch.full(shape, float("nan"), dtype=torch.float64) for arm in arms} for metric in METRICS}
    for row in rows:
        for metric in METRICS if row["arm"] in arms else ():
            tables[metric][row["arm"]][int(row["digit"]), styles.index(row["style"]), seeds.index(row["seed"])] = float(row[metric])
    effects = {arm: {name: _mean([row.get(name) for row in rows if row["arm"] == arm]) for name in EFFECTS} for arm in arms}
    return Results(styles, seeds, tables, effects)


def _present(table: Tensor) -> Tensor:
    """The seeds without NaN."""
    return table[..., ~table.isnan().any(1).any(0)]


def _mean(numbers: Sequence[str | None]) -> float | None:
    found = [float(number) for number in numbers if number]
    return sum(found) / len(found) if found else None


def bootstrap(values: Tensor) -> Bootstrap:
    """Over digits, styles and seeds."""
    return Bootstrap(values.shape, DRAWS, seed=0)


def interval_of(values: Tensor) -> dict[str, float]:
    """mean, low and high (95 %) of values (digits, styles, seeds)."""
    return bootstrap(values).interval(values)


def shown(interval: dict[str, float], metric: str, sign: bool = False) -> str:
    """mean (low to high), fidelity in points of a hundred."""
    scale, digits = (100, 1) if metric == "prompt_fidelity" else (1, 3)
    plus = "+" if sign else ""
    return f"{interval['mean'] * scale:{plus}.{digits}f} ({interval['low'] * scale:{plus}.{digits}f} to {interval['high'] * scale:{plus}.{digits}f})"


def table_of_arms(found: Results, *, alive: bool) -> list[str]:
    """Every arm at equal cost, the nearest to the ideal first, references last. Of a dead guidance input nothing could be kept."""
    lines = [f"| arm | runs | {' | '.join([*METRICS.values(), *EFFECTS.values()])} |", "|---|---|" + "---|" * (len(METRICS) + len(EFFECTS))]
    for arm in [*found.arms, *(one for one in REFERENCES if one in found.tables["distance_to_ideal"])]:
        title = f"*{arm}*" if arm in REFERENCES else f"**{arm}**" if arm == found.arms[0] else arm
        cells = [shown(interval_of(values := found.values(metric, arm)), metric) for metric in METRICS]
        numbers = {**found.effects[arm], **({} if alive else {"response_kept": None})}
        cells += ["" if number is None else f"{number:.3f}" if name == "memorisation" else f"{number:.2f}" for name, number in numbers.items()]
        lines.append(f"| {title} | {values[0].numel()} | {' | '.join(cells)} |")
    return lines


def table_of_gains(found: Results, arm: str, rivals: Sequence[str]) -> list[str]:
    """One arm over each of its rivals: paired gains, whether they are shown, and how many runs would decide the others."""
    lines = []
    for metric in ("distance_to_ideal", "prompt_fidelity"):
        gains = [found.gain(metric, arm, rival) for rival in rivals]
        adjusted = holm([bootstrap(gain).p_value(gain) for gain in gains])
        for rival, gain, p in zip(rivals, gains, adjusted, strict=True):
            interval = interval_of(gain)
            decided = "better" if p < 0.05 and interval["mean"] > 0 else "worse" if p < 0.05 else ""
            needed = repetitions_needed(interval, gain[0].numel(), len(rivals))
            open_ = f"undecided; {f'about {needed}' if needed < MANY else f'more than {MANY}'} runs would tell"
            lines.append(f"| {arm} | {rival} | {METRICS[metric]} | {shown(interval, metric, sign=True)} | {p:.3f} | {decided or open_} |")
    return lines


def table_of_bases(bases: dict[str, Results], folder: Path = RESULTS) -> list[str]:
    """What each base's diagnosis says, and what recovery gains there in distance to the ideal: plainly, and the best that it makes possible."""
    with (folder / "bases.csv").open() as file:
        diagnoses = {row["base"]: row for row in csv.DictReader(file)}
    lines = [
        "| base | acts like | loss at 1, unguided | recovered@1 over base@1 | over base@3.5 | over the best without | the best with, over that |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, found in bases.items():
        says, best = diagnoses[base], next(arm for arm in found.arms if arm in RECOVERED)
        rival = next(arm for arm in found.arms if arm not in RECOVERED)
        pairs = [*(("recovered@1", arm) for arm in (*PLAIN, rival)), (best, rival)]
        gains = [shown(interval_of(found.gain("distance_to_ideal", *pair)), "", sign=True) for pair in pairs]
        acts_like = f"{float(says['acts_like']):.1f}" if says["acts_like"] else "none"
        losses = f"{float(says['loss']):.2f}, {float(says['loss_unguided']):.2f}"
        lines.append(f"| {base} | {acts_like} | {losses} | {' | '.join(gains[:3])}, {rival} | {gains[3]}, {best} |")
    return lines


def means_over_steps(found: Results, metric: str, arm: str) -> list[float]:
    """One of the leaders with each of PASSES: its means, which for prompt fidelity are percents."""
    names = [arm if passes == ALL else f"{arm}-{passes}" for passes in PASSES]
    return [found.tables[metric][name].mean().item() * (100 if metric == "prompt_fidelity" else 1) for name in names]


def table_of_steps(found: Results) -> list[str]:
    """The leaders with fewer and more steps."""
    lines = [f"| arm | measure | {' | '.join(f'{passes:,} passes' for passes in PASSES)} |", "|---|---|" + "---|" * len(PASSES)]
    for metric, title in METRICS.items():
        digits = 0 if metric == "prompt_fidelity" else 3
        for arm in LEADERS:
            lines.append(f"| {arm} | {title} | {' | '.join(f'{mean:.{digits}f}' for mean in means_over_steps(found, metric, arm))} |")
    return lines


def report(bases: dict[str, Results], folder: Path = RESULTS, steps: Results | None = None) -> str:
    """The page's written part."""
    head = ["| arm | against | measure | gain, more is better | p (Holm) | |", "|---|---|---|---|---|---|"]
    parts = [*table_of_bases(bases, folder), ""]
    parts += ["### Fewer and more steps (outside, seed 0)", "", *table_of_steps(steps), ""] if steps else []
    for base, found in bases.items():
        parts += [f"### {BASES[base].capitalize()} ({base})", "", f"{len(found.styles)} styles, {len(found.seeds)} seeds.", ""]
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
    arms = sorted(next(iter(bases.values())).arms, key=lambda arm: -sum(table[arm].nanmean().item() for table in tables))
    figure = Figure(figsize=(10, 1 + 0.3 * len(arms)), dpi=100, layout="constrained")
    for axis, (base, found) in zip(figure.subplots(1, len(bases), sharey=True, squeeze=False)[0], bases.items(), strict=True):
        for row, arm in enumerate(arms):
            interval = interval_of(found.gain("distance_to_ideal", arm, PLAIN[0]))
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


def draw_steps(found: Results, path: Path) -> None:
    """The figure: what the leaders reach with fewer and more steps."""
    figure = Figure(figsize=(10, 3.2), dpi=100, layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for arm, colour in LEADERS.items():
            axis.plot(PASSES, means_over_steps(found, metric, arm), color=colour, marker="o", markersize=4, linewidth=1.6, label=arm)
        axis.set_xscale("log", base=2)
        axis.set_xticks(PASSES, [f"{passes:,}" for passes in PASSES])
        axis.set_title(f"{title}{', %' if metric == 'prompt_fidelity' else ''}", fontsize=9, loc="left")
        axis.set_xlabel("forward passes of a batch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(LEADERS), fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Writes the figures, and the tables into docs/study.md between its two marks."""
    bases = {base: found for base in BASES if (found := read(base))}
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    steps = read("outside", RESULTS / STEPS)
    PAGE.write_text(f"{before}{BEGIN}\n\n{report(bases, steps=steps)}\n{END}{rest.partition(END)[2]}")
    draw(bases, RESULTS / "arms.png")
    if steps:
        draw_steps(steps, RESULTS / "steps.png")
    print(f"{PAGE}: {', '.join(f'{base} {len(found.seeds)} seeds' for base, found in bases.items())}")


if __name__ == "__main__":
    main()
