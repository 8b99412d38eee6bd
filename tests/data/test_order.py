import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import order

counts, seeds, steps, batches = st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 200), st.integers(1, 70)


def stream(count: int, seed: int, length: int, batch: int = 1) -> list[int]:
    """The first `length` slots, read in steps of `batch`."""
    return np.concatenate([order.samples(count, seed, step, batch) for step in range(-(-length // batch))])[:length].tolist()


@given(count=counts, seed=seeds, epoch=st.integers(0, 20), batch=batches)
def test_every_sample_once_an_epoch_wherever_the_steps_end(count, seed, epoch, batch):
    first, after = divmod(epoch * count, batch)
    steps_of_epoch = range(first, -(-((epoch + 1) * count) // batch))
    slots = np.concatenate([order.samples(count, seed, step, batch) for step in steps_of_epoch])[after : after + count]
    assert sorted(slots.tolist()) == list(range(count))


@given(count=counts, seed=seeds, step=steps, batch=batches)
def test_a_step_is_the_same_whatever_was_asked_before(count, seed, step, batch):
    alone = order.samples(count, seed, step, batch).tolist()
    for other in (step + 1, 0, step + 50):
        order.samples(count, seed, other, batch)
    order.samples(count + 1, seed, step, batch)
    order._epoch.cache_clear()
    assert order.samples(count, seed, step, batch).tolist() == alone
    assert len(alone) == batch
    assert all(0 <= sample < count for sample in alone)


@given(count=counts, seed=seeds, batch=batches, length=st.integers(1, 150))
def test_the_batch_cuts_the_stream_and_does_not_change_it(count, seed, batch, length):
    assert stream(count, seed, length, batch) == stream(count, seed, length)


@given(seed=seeds, epoch=st.integers(0, 1000))
def test_epochs_and_seeds_are_ordered_differently(seed, epoch):
    here = order.samples(30, seed, epoch, 30).tolist()
    assert here != order.samples(30, seed, epoch + 1, 30).tolist()
    assert here != order.samples(30, seed + 1, epoch, 30).tolist()


def test_every_place_is_as_likely_as_any_other():
    orders = np.array([order.samples(5, seed, 0, 5) for seed in range(4000)])
    for place in range(5):
        shares = np.bincount(orders[:, place], minlength=5) / 4000
        assert np.abs(shares - 0.2).max() < 0.026  # four standard errors


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    epochs = [order.samples(1000, 0, epoch, 1000) for epoch in range(2)]
    pairs = [set(zip(e[:-1].tolist(), e[1:].tolist(), strict=True)) for e in epochs]
    assert len(pairs[0] & pairs[1]) < 8


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [((10, 0, 0, 10), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]), ((10, 0, 1, 10), [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]), ((7, 3, 2, 5), [4, 0, 2, 1, 2])],
    ids=["the first epoch", "the second", "a step over the end of an epoch"],
)
def test_the_order_is_recorded(arguments, recorded):
    assert order.ORDER_VERSION == 1  # another order is another version
    assert order.samples(*arguments).tolist() == recorded
