import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dev2pro import draws


@given(seed=st.integers(-(2**63), 2**63), step=st.integers(0, 10**9), cut=st.integers(1, 7))
def test_a_slot_draws_the_same_in_any_grouping(seed, step, cut):
    whole = draws.normal(seed, "noise", step, range(8), (3, 2))
    parts = [draws.normal(seed, "noise", step, slots, (3, 2)) for slots in (range(cut), range(cut, 8))]
    assert torch.equal(whole, torch.cat(parts))
    whole = draws.uniform(seed, "dropout", step, range(8))
    assert torch.equal(whole, torch.cat([draws.uniform(seed, "dropout", step, [slot]) for slot in range(8)]))


def test_global_state_neither_matters_nor_moves():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws.normal(0, "noise", 3, [5], (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draws.normal(0, "noise", 3, [5], (4,)), first)


@pytest.mark.parametrize(
    "other",
    [(1, "noise", 3, 5), (0, "time", 3, 5), (0, "noise", 4, 5), (0, "noise", 3, 6), (0, "noise", 5, 3), (3, "noise", 0, 5)],
    ids=["seed", "purpose", "step", "slot", "step and slot swapped", "seed and step swapped"],
)
def test_every_argument_counts(other):
    seed, purpose, step, slot = other
    assert not torch.equal(draws.normal(0, "noise", 3, [5], (4,)), draws.normal(seed, purpose, step, [slot], (4,)))


def test_keys_that_read_alike_are_different():
    assert draws.generator(1, 23).initial_seed() != draws.generator(12, 3).initial_seed()
    assert draws.generator(0, "1", 2).initial_seed() != draws.generator(0, 1, 2).initial_seed()


def test_shapes_types_and_moments():
    normal = draws.normal(0, "noise", 0, range(200), (10, 10))
    assert (normal.shape, normal.dtype, normal.device.type) == ((200, 10, 10), torch.float32, "cpu")
    assert abs(normal.mean()) < 0.03  # 20,000 numbers: four standard errors are 0.028
    assert abs(normal.std() - 1) < 0.02
    uniform = draws.uniform(0, "dropout", 0, range(5000))
    assert (uniform.shape, uniform.dtype) == ((5000,), torch.float32)
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.017  # four standard errors
    assert abs(uniform.var() - 1 / 12) < 0.005
    assert draws.normal(0, "time", 0, range(5)).shape == (5,)


def test_slots_and_steps_are_independent():
    of_slots = draws.normal(0, "time", 0, range(2001))
    of_steps = torch.cat([draws.normal(0, "time", step, [0]) for step in range(2001)])
    for numbers in (of_slots, of_steps):
        neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
        assert abs(neighbours) < 0.09  # 2,000 pairs: four standard errors


def test_the_numbers_themselves_are_recorded():
    assert draws.normal(0, "noise", 0, [0, 1]).tolist() == pytest.approx([-1.3306899, -1.4611244], abs=1e-6)
    assert draws.uniform(0, "caption dropout", 7, [63]).tolist() == pytest.approx([0.3269164], abs=1e-6)
