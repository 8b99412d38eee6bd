"""A line of recovered models outlives its weeks: damage, kills at every moment, a regression. `make operator` has it short, `make year` long."""

import os
import signal

import pytest

from tests.flows import year
from tests.flows.arrivals import HIT, MOMENTS

WEIGHTS = 4.4e6  # bytes of the miniature's, in float32
CHECKPOINT = 4 * WEIGHTS


def bounded(table: dict) -> None:
    """Weights of the newest, of latest, best, one to be pruned and two in the making; checkpoints: two, one being written, and the best."""
    assert table["peak"] < (year.KEEP + 5) * WEIGHTS + 4 * CHECKPOINT
    assert table["bytes"] < (year.KEEP + 2) * WEIGHTS + table["generations"] * 2e5
    assert not table["partial"]


@pytest.mark.operator
def test_a_short_year(tmp_path):
    table = year.lived(tmp_path)
    assert set(table["kills"]) == {"notes all", "saves stage"}
    assert table["promoted"] == 3
    assert table["states"] == {"Completed": 2, "Running": 1, "Not promoted": 1, "Failed": 1, "Skipped": 1}
    bounded(table)


@pytest.mark.year
def test_a_year(tmp_path, capsys):
    seed = int(os.environ.get("SEED", "0"))
    table = year.lived(tmp_path, seed)
    with capsys.disabled():
        print(summary(table))
    assert table["weeks"] == 52
    assert {kill.split()[0] for kill in table["kills"]} >= MOMENTS.keys() | {"any"}, "every moment was hit"
    assert {kill.split()[1] for kill in table["kills"]} == {who for some in HIT.values() for who in some}
    assert sum(one["code"] == -signal.SIGKILL for one in table["runs"]) >= 15
    assert table["promoted"] >= 20
    bounded(table)


def summary(table: dict) -> str:
    """What `make year` prints."""
    longest = max(one["seconds"] for one in table["runs"])
    skipped = sorted(one["seconds"] for one in table["runs"] if one["last_line"].startswith("Skipped: Nothing"))
    return "\n".join([
        "", f"{table['weeks']} weeks, {len(table['runs'])} runs in {table['seconds']} s: the longest {longest} s, skipped ones {skipped} s",
        f"kills: {', '.join(f'{kill} {count}' for kill, count in sorted(table['kills'].items()))}",
        f"states: {', '.join(f'{name} {count}' for name, count in sorted(table['states'].items()))}",
        f"{table['generations']} generations, {table['promoted']} promoted, {table['consumed']} shards consumed, each once",
        f"held-out loss: {table['losses']}",
        f"disk: {table['peak'] / 1e6:.1f} MB at most, {table['bytes'] / 1e6:.1f} MB at the end; weights of generations {table['weights']}",
    ])  # fmt: skip
