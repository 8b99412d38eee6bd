"""Stages that are killed at random moments end with the files of an undisturbed run, and leave nothing else behind. `make chaos` is the long form."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.stages import aims, chaos

CHALK = "data/miniature/shards/chalk"
WORDS = ["experiment=miniature", "steps=16", "batch=4", "probe.every=8", "probe.samples=4", "checkpoint.every=3"]
STAGE_ARGS = {
    "recover": [f"data.train=[{CHALK}/train-000000.tar]", "optim.lr=1e-4", "data.flip=true", "data.crop=random", "data.read.workers=1"],
    "lora": ["data.name=chalk", "trained_on=data/miniature/pipeline", "arm=x", "checkpoint.loras=4"],
    "distill": [f"data.train=[{CHALK}/train-000000.tar]", "teacher=data/miniature/teacher"],
}  # (mirroring is drawn, so recover reads at every step, in a process of its own; the others hold what they train on)
CASES = [(stage, ranks, "") for stage in STAGE_ARGS for ranks in (1, 2)] + [("recover", 2, "hardware.shard=true")]
KILLS = 22
SHORT = "steps=10 checkpoint.every=2 probe.every=5"
SIDE_BY_SIDE = 2


def survives(stage: str, ranks: int, more: str, kills: int, seed: int, tmp: Path) -> dict[str, Any]:
    hung = ["checkpoint.grace=30"] if ranks > 1 else []  # so that dev2pro.ranks ends a rank that hangs after 45 s and not after ten minutes
    return chaos.survives(stage, [*WORDS, *STAGE_ARGS[stage], *more.split(), *hung], ranks, kills, seed, tmp)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "kills"),
    [pytest.param("recover", 1, 2, marks=pytest.mark.ci), ("recover", 1, 5), ("lora", 2, 3), ("distill", 2, 5)],
)
def test_a_few_kills_change_nothing(stage, ranks, kills, tmp_path):
    table = survives(stage, ranks, SHORT, kills, 0, tmp_path)
    assert table["kills"] == kills
    assert set(table["aims"]) >= {"writes a checkpoint", "writes the model"}


@pytest.mark.chaos
def test_kills_at_every_moment_on_every_stage_change_nothing(tmp_path, capsys):
    seed = int(os.environ.get("SEED", "0"))

    def case(which: tuple[str, int, str]) -> dict[str, Any] | AssertionError:
        stage, ranks, more = which
        try:
            return survives(stage, ranks, more, KILLS, seed, tmp_path / f"{stage}-{ranks}-{'sharded' if more else 'whole'}")
        except AssertionError as error:  # so that the others are reported as well
            return error

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        ended = dict(zip(CASES, pool.map(case, CASES), strict=True))
    with capsys.disabled():
        print(summary(ended))
    failed = {which: str(result) for which, result in ended.items() if isinstance(result, AssertionError)}
    assert not failed, "\n\n".join(f"==== {which}\n{why}" for which, why in failed.items())
    for which, table in ended.items():
        assert table["kills"] == KILLS, which
        assert set(table["aims"]) >= set(aims.WINDOWS), which  # every window was hit
        assert {blow.split()[0] for blow in table["blows"]} == {"KILL", "TERM", "INT"}, which


def summary(ended: dict[tuple[str, int, str], Any]) -> str:
    """The table that `make chaos` prints."""
    lines = [""]
    for (stage, ranks, more), table in ended.items():
        name = f"{stage}, {ranks} rank{'s' if ranks > 1 else ''}{', sharded' if more else ''}"
        if isinstance(table, AssertionError):
            lines.append(f"{name}: FAILED")
            continue
        lines.append(f"{name}: {table['kills']} kills, {table['lives']} whole runs, {table['seconds']} s, slowest end {table['slowest_end']} s")
        lines += [f"    {what}: {', '.join(f'{key} {count}' for key, count in sorted(table[what].items()))}" for what in ("blows", "aims", "codes")]
    return "\n".join(lines)
