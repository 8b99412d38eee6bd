"""Buffers of workers: reused, but never while a tensor still shares them."""

import gc
import os

import torch

from data.loading.buffers import Buffer, BufferHandle, BufferPool
from data.loading.stream import Batch, Stream
from tests.streams import stream

SLOTS = [range(6)]


def collect(source: Stream, steps: int) -> list[Batch]:
    return list(source.steps(0, steps, SLOTS))


def test_batches_that_are_held_on_to_are_never_written_over(many):
    batches = collect(stream(many[2], batch=6, workers=2), 60)  # far more than there are buffers
    fresh = collect(stream(many[2], batch=6), 60)
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(batches, fresh, strict=True))


def test_a_view_of_a_batch_keeps_its_buffer(many):
    views = []
    for batch in stream(many[2], batch=6, workers=1).steps(0, 60, SLOTS):
        views.append(batch.pixels[2:3, ::2])
        del batch
    fresh = collect(stream(many[2], batch=6), 60)
    assert all(torch.equal(view, other.pixels[2:3, ::2]) for view, other in zip(views, fresh, strict=True))


def test_what_is_let_go_is_lent_again():
    pool = BufferPool(1, 2, 100)
    tensors = [pool.tensor(BufferHandle(number, (2, 50))) for number in (0, 1)]
    pool._free[:] = b"\0\0"
    part = tensors[0][1]
    del tensors
    gc.collect()
    assert bytes(pool._free) == b"\0\1"  # a part of the first is still held
    del part
    gc.collect()
    assert bytes(pool._free) == b"\1\1"


def test_a_worker_s_copies_give_nothing_back():
    pool = BufferPool(1, 1, 100)
    tensor = pool.tensor(BufferHandle(0, (10,)))
    pool._free[:] = b"\0"
    child = os.fork()
    if child == 0:
        del tensor
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(pool._free) == b"\0"
    assert tensor.shape == (10,)


def test_outside_a_worker_and_where_none_is_free_there_is_room_all_the_same():
    pool = BufferPool(1, 1, 100)
    assert pool.acquire(10) is None  # this is no worker
    buffer = Buffer(pool, (2, 3))
    buffer.array[:] = 7
    assert buffer.filled(1).tolist() == [[7, 7, 7]]
