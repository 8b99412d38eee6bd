import math

import numpy as np
import pytest
import torch

from dev2pro.judging.bootstrap import Bootstrap, holm, repetitions_needed


def simulated(rng: np.random.Generator, prompts: int, repetitions: int) -> torch.Tensor:
    """Scores with an effect of the prompt, an effect of the seed, and noise; their true mean is 0."""
    table = rng.normal(0, 1, (prompts, 1)) + rng.normal(0, 0.5, (1, repetitions)) + rng.normal(0, 1, (prompts, repetitions))
    return torch.from_numpy(table)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap((20, 16), 400, seed=0)
    intervals = [bootstrap.interval(simulated(rng, 20, 16)) for _ in range(200)]
    covered = np.mean([interval["low"] <= 0 <= interval["high"] for interval in intervals])
    assert 0.88 < covered < 0.99
    assert all(interval["low"] <= interval["mean"] <= interval["high"] for interval in intervals)


def test_intervals_are_wide_where_only_few_prompts_vary():
    table = torch.randn(10, 1).expand(10, 50)  # 500 numbers, but ten independent ones
    interval = Bootstrap((10, 50), 1000, seed=0).interval(table)
    error = table[:, 0].std(correction=0).item() / math.sqrt(10)
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert interval["mean"] == pytest.approx(table.mean().item())


@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_of_few_styles_are_too_narrow_but_far_less_so_than_by_runs(seeds):
    """Four styles are few: they cover the truth in some 90 % instead of 95, and in 60 to 80 where every style and seed counts as a run of its own."""
    rng, bootstrap, by_runs = np.random.default_rng(0), Bootstrap((10, 4, seeds), 600, seed=0), Bootstrap((10, 4 * seeds), 600, seed=0)
    tables = [torch.from_numpy(rng.normal(0, 1, (1, 4, 1)) + rng.normal(0, 1, (10, 4, seeds))) for _ in range(200)]
    found, naive = ([way(table) for table in tables] for way in (bootstrap.interval, lambda table: by_runs.interval(table.flatten(1))))
    covered, less = (np.mean([interval["low"] <= 0 <= interval["high"] for interval in some]) for some in (found, naive))
    assert 0.85 < covered < 0.95
    assert less < covered - 0.08


def test_intervals_see_seeds_as_well():
    table = torch.randn(1, 30).expand(50, 30)
    interval = Bootstrap((50, 30), 1000, seed=0).interval(table)
    error = table[0].std(correction=0).item() / math.sqrt(30)
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_same_seed_gives_the_same_interval():
    table = torch.randn(6, 5)
    intervals = [Bootstrap((6, 5), 300, seed).interval(table) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1]
    assert intervals[0] != intervals[2]


def test_equal_cells_differ_by_exactly_nothing():
    table = torch.rand(6, 5)
    assert Bootstrap((6, 5), 300, 0).interval(table - table) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_constant_gain_is_certain_because_pictures_are_paired():
    bootstrap, table = Bootstrap((6, 5), 300, 0), 10 * torch.rand(6, 5, dtype=torch.float64)
    interval = bootstrap.interval((table + 0.25) - table)
    assert interval == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
    alone = bootstrap.interval(table)
    assert alone["high"] - alone["low"] > 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_values_are_small_for_an_effect_and_even_without_one():
    rng, bootstrap = np.random.default_rng(0), Bootstrap((20, 16), 400, seed=0)
    without = [bootstrap.p_value(simulated(rng, 20, 16)) for _ in range(200)]
    assert np.mean(np.array(without) < 0.1) < 0.2
    assert np.median(without) > 0.3
    assert bootstrap.p_value(simulated(rng, 20, 16) + 3) == 1 / 400


def test_four_times_the_repetitions_for_half_the_width():
    assert repetitions_needed({"mean": 0.5, "low": -0.5, "high": 1.5}, 12) == 48
    assert repetitions_needed({"mean": 0.5, "low": -0.5, "high": 1.5}, 12, comparisons=10) == 99  # 2.81 deviations in place of 1.96
    assert repetitions_needed({"mean": 2.0, "low": 1.0, "high": 3.0}, 12) == 13, "what was not shown by these needs more"
    assert repetitions_needed({"mean": 0.0, "low": -1.0, "high": 1.0}, 12) == 0
