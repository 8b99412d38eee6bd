from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading import order
from data.loading.buckets import bucket_sizes
from data.loading.order import Order
from dev2pro.errors import DataError
from tests.synthetic import snapshot

SQUARE = [(64, 64)]
BUCKETS = bucket_sizes(64, 16, 2.0)
SIDES = st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), min_size=1, max_size=12)
SHARDS = st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(lambda shards: sum(shards) > 0)


@st.composite
def orders(draw, repeats: bool = True) -> Order:
    shards = draw(SHARDS)
    times = draw(st.lists(st.integers(1, 3), min_size=len(shards), max_size=len(shards))) if repeats else []
    snap = snapshot(shards, draw(SIDES), times)
    return Order(snap, draw(st.sampled_from([SQUARE, BUCKETS])), draw(st.integers(0, 2**40)), draw(st.integers(1, 40)))


def epoch(run_order: Order, number: int) -> list[order.Step]:
    return [run_order.step(number * run_order.steps_per_epoch + i) for i in range(run_order.steps_per_epoch)]


# ---- what an epoch is ------------------------------------------------------------------------------------------------------------------


@given(run_order=orders(), number=st.integers(0, 30))
def test_every_sample_once_an_epoch_for_each_of_its_weight_bar_the_counted_remainder(run_order, number):
    seen = Counter(int(row) for step in epoch(run_order, number) for row in step.rows)
    wanted = Counter({row: shard.repeat for shard in run_order.snapshot.shards for row in range(shard.first, shard.first + shard.samples)})
    passes = -(-run_order.batch // wanted.total())  # a set smaller than a batch is taken again until it fills one
    for row in wanted:
        wanted[row] *= passes
    assert not seen - wanted
    assert (wanted - seen).total() == run_order.dropped
    assert run_order.dropped == sum(rest for _, _, _, rest in run_order.histogram())


@given(run_order=orders(repeats=False))
@settings(max_examples=40)
def test_the_remainder_goes_round_so_that_all_are_left_out_equally_often(run_order):
    count = len(run_order.snapshot)
    seen = Counter(int(row) for number in range(count) for step in epoch(run_order, number) for row in step.rows)
    for size, rows in run_order.rows_by_size():
        times = {seen[int(row)] for row in rows}
        assert max(times) - min(times) <= 1, size  # in any number of epochs; `count` of them is as good as any


@given(run_order=orders(), number=st.integers(0, 5))
def test_all_samples_of_a_step_share_a_bucket(run_order, number):
    for step in epoch(run_order, number):
        assert len(step.rows) == run_order.batch
        assert {run_order.size_of(int(row)) for row in step.rows} == {step.size}
        assert step.epoch == number


@given(run_order=orders(), steps=st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_step_is_the_same_whatever_was_asked_before(run_order, steps):
    fresh = Order(run_order.snapshot, run_order.buckets, run_order.seed, run_order.batch)
    for step in steps:
        after_others, alone = run_order.step(step), Order(fresh.snapshot, fresh.buckets, fresh.seed, fresh.batch).step(step)
        assert after_others.rows.tolist() == alone.rows.tolist()
        assert after_others.size == alone.size


def test_epochs_and_seeds_are_ordered_differently():
    snap = snapshot([300])
    here = [step.rows.tolist() for step in epoch(Order(snap, SQUARE, 0, 10), 0)]
    assert here != [step.rows.tolist() for step in epoch(Order(snap, SQUARE, 0, 10), 1)]
    assert here != [step.rows.tolist() for step in epoch(Order(snap, SQUARE, 1, 10), 0)]


def test_every_place_is_as_likely_as_any_other():
    snap = snapshot([5])
    rows = np.array([Order(snap, SQUARE, seed, 5).step(0).rows for seed in range(3000)])
    for slot in range(5):
        shares = np.bincount(rows[:, slot], minlength=5) / 3000
        assert np.abs(shares - 0.2).max() < 0.03  # four standard errors


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    run_order = Order(snapshot([1000]), SQUARE, 0, 1000)
    pairs = [set(zip(e[:-1].tolist(), e[1:].tolist(), strict=True)) for e in (run_order.step(0).rows, run_order.step(1).rows)]
    assert len(pairs[0] & pairs[1]) < 8


def test_reads_stay_near_each_other_for_a_while(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 4)
    run_order = Order(snapshot([1000] * 20), SQUARE, 0, 32)
    rows = np.concatenate([step.rows for step in epoch(run_order, 0)])
    for first in range(0, len(rows) - 256, 256):  # a window: 4 blocks of 64 samples
        blocks = {(int(row) // 1000, int(row) % 1000 // order.BLOCK) for row in rows[first : first + 256]}
        assert len(blocks) <= 12  # of some 320: this stretch may lie across two windows, and the last block of a shard is a short one


def test_shards_come_in_another_order_every_epoch():
    run_order = Order(snapshot([64] * 600), SQUARE, 0, 64)
    firsts = [run_order.step(number * run_order.steps_per_epoch).rows // 64 for number in range(2)]
    assert len(set(firsts[0]) & set(firsts[1])) < 50


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ((snapshot([10]), SQUARE, 0, 10, 0), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]),
        ((snapshot([10]), SQUARE, 0, 10, 1), [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]),
        ((snapshot([70, 70], [(64, 64), (96, 48), (48, 96)]), BUCKETS, 7, 6, 31), [62, 71, 32, 128, 56, 59]),
        ((snapshot([5], repeats=[3]), SQUARE, 3, 4, 2), [4, 3, 2, 4]),
    ],
    ids=["the first epoch", "the second", "buckets", "weights"],
)
def test_the_order_is_recorded(arguments, recorded):
    snap, buckets, seed, batch, step = arguments
    assert order.ORDER_VERSION == 2  # another order is another version
    assert Order(snap, buckets, seed, batch).step(step).rows.tolist() == recorded


def test_a_bucket_too_small_for_a_step_goes_to_its_neighbour():
    sides = [(64, 64)] * 20 + [(96, 48)] * 2 + [(48, 96)] * 9  # two panoramas
    run_order = Order(snapshot([31 * 4], sides), BUCKETS, 0, 16)
    counts = {size: samples for size, samples, _, _ in run_order.histogram()}
    assert counts == {(64, 64): 88, (48, 80): 36}
    assert run_order.size_of(20) == (64, 64)
    assert run_order.dropped == 88 % 16 + 36 % 16


def test_encoded_samples_stay_in_their_bucket_and_are_left_out_where_it_is_too_small():
    sides = [(64, 64)] * 20 + [(96, 48)] * 2
    run_order = Order(snapshot([22], sides), BUCKETS, 0, 16, cropped=True)
    assert [size for size, _, _, _ in run_order.histogram()] == [(64, 64), (80, 48)]
    assert (run_order.steps_per_epoch, run_order.dropped) == (1, 6)
    with pytest.raises(DataError, match="No bucket of the 22 encoded samples fills a batch of 64"):
        Order(snapshot([22], sides), BUCKETS, 0, 64, cropped=True)


def test_what_is_cropped_away():
    assert Order(snapshot([10], [(64, 64)]), SQUARE, 0, 2).cropped_away() == 0
    assert Order(snapshot([10], [(128, 64), (64, 64)]), SQUARE, 0, 2).cropped_away() == pytest.approx(0.25)
    assert Order(snapshot([10], [(96, 64), (64, 96)]), BUCKETS, 0, 2).cropped_away() == pytest.approx(1 - 1.5 / (80 / 48))


# ---- substitutes ------------------------------------------------------------------------------------------------------------------------


@given(run_order=orders(), step=st.integers(0, 100), data=st.data())
def test_a_substitute_is_of_the_same_bucket_and_always_the_same(run_order, step, data):
    slot = data.draw(st.integers(0, run_order.batch - 1))
    fresh = Order(run_order.snapshot, run_order.buckets, run_order.seed, run_order.batch)
    for attempt in range(4):
        row = run_order.substitute(step, slot, attempt)
        assert run_order.size_of(row) == run_order.step(step).size
        assert row == fresh.substitute(step, slot, attempt)


def test_attempts_slots_and_steps_give_different_substitutes():
    run_order = Order(snapshot([1000]), SQUARE, 0, 8)
    rows = {run_order.substitute(step, slot, attempt) for step in range(5) for slot in range(8) for attempt in range(3)}
    assert len(rows) > 105  # of 120; some 7 fall together by chance


@pytest.mark.parametrize("count", [256, 300, 70_000])
def test_more_buckets_than_a_byte_can_count(count):
    many = [(1000 + i, 1000) for i in range(300)]
    run_order = Order(snapshot([count], [(1000 + i, 1000) for i in range(0, 300, 3)]), many, 0, 1)
    assert len(run_order.histogram()) == 100
