"""The stream: the same (sample, crop, mirroring, caption) in every slot of every step, on any number of ranks and workers, after any kill."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import index
from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Batch, Stream
from data.shards import encoded, snapshot
from data.shards.snapshot import Snapshot
from data.storage.transport import Transport
from dev2pro.errors import DataError
from tests.shards import tar
from tests.streams import BAD, BUCKETS, PER_SHARD, READ, picture, stream


def slots_of(rank: int, world: int, batch: int, micro: int) -> list[range]:
    share = batch // world
    return [range(rank * share + i, rank * share + min(i + micro, share)) for i in range(0, share, micro)]


Seen = dict[tuple[int, int], tuple[int, str, bytes]]  # (step, slot) -> (sample, caption, pixels)


def collect_slots(source: Stream, first: int, last: int, slots: list[range]) -> Seen:
    result: Seen = {}
    units = [(step, slot_range) for step in range(first, last) for slot_range in slots]
    for (step, slot_range), batch in zip(units, source.steps(first, last, slots), strict=True):
        for i, slot in enumerate(slot_range):
            result[step, slot] = batch.rows[i], batch.captions[i], batch.pixels[i].numpy().tobytes()
    return result


@st.composite
def weights(draw) -> tuple[list[int], float]:
    """(repeats of four shards, not all 0; the largest aspect ratio)."""
    return draw(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any)), draw(st.sampled_from([0.0, 1.5, 2.0]))


def weighted(pins: Snapshot, times: list[int], longest: float) -> Snapshot:
    often = {shard.sha256: count for shard, count in zip(pins.shards, times, strict=False)}
    filters = snapshot.Filters(max_aspect=longest)
    return snapshot.build([shard.url for shard in pins.shards], Transport(READ), filters=filters, repeat=lambda sha256: often[sha256])


@given(
    broken=st.booleans(), pinned=weights(), seed=st.integers(0, 2**32), share=st.integers(1, 4), world=st.sampled_from([1, 2, 3, 4]),
    workers=st.sampled_from([0, 0, 0, 0, 0, 1, 2]), micro=st.integers(1, 5), kill=st.integers(0, 7), steps=st.integers(1, 7),
)  # fmt: skip
@settings(max_examples=60)
def test_any_ranks_workers_micro_batches_and_kills_see_the_same(many, broken, pinned, seed, share, world, workers, micro, kill, steps):
    batch, pins = share * world, weighted(many[5 if broken else 2], *pinned)
    alone = collect_slots(stream(pins, batch=batch, seed=seed), 0, steps, [range(batch)])
    split: Seen = {}
    for rank in range(world):
        slots = slots_of(rank, world, batch, micro)
        source = stream(pins, batch=batch, seed=seed, workers=workers)
        before = source.steps(0, steps, slots)
        for _ in range(min(kill, steps) * len(slots)):
            next(before)
        before.close()  # killed here; whoever comes next begins with nothing but the number of the step
        split |= collect_slots(source, 0, min(kill, steps), slots)
        split |= collect_slots(stream(pins, batch=batch, seed=seed, workers=workers), min(kill, steps), steps, slots)
    assert split == alone


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("number", [2, 5], ids=["good pictures", "some broken"])
def test_any_workers_see_the_same(many, number, workers):
    alone = collect_slots(stream(many[number], batch=6), 0, 9, [range(6)])
    assert collect_slots(stream(many[number], batch=6, workers=workers), 0, 9, [range(0, 4), range(4, 6)]) == alone
    assert collect_slots(stream(many[number], batch=6, workers=workers), 4, 9, [range(6)]) == {key: one for key, one in alone.items() if key[0] >= 4}


def test_what_is_seen_is_the_sample_in_its_bucket(many):
    source = stream(many[2], batch=4)
    for batch in source.steps(0, 11, [range(4)]):
        for row, caption, pixels in zip(batch.rows, batch.captions, batch.pixels, strict=True):
            assert caption.startswith(f"picture {row}")
            assert source.order.size_of(row) == batch.size
            assert pixels.shape == (batch.size[1], batch.size[0], 3)


# ---- what is drawn ------------------------------------------------------------------------------------------------------------------------


def all_batches(source: Stream, steps: int) -> list[Batch]:
    return list(source.steps(0, steps, [range(source.order.batch)]))


def test_every_other_picture_is_mirrored(many):
    plain, mirrored = (all_batches(stream(many[2], batch=4, augment=a), 40) for a in (Augment(), Augment(flip=True)))
    same = flipped = 0
    for one, other in zip(plain, mirrored, strict=True):
        for a, b in zip(one.pixels.numpy(), other.pixels.numpy(), strict=True):
            same += (a == b).all()
            flipped += (a[:, ::-1] == b).all()
    assert same + flipped == 160
    assert 55 < flipped < 105  # four standard errors


def test_crops_are_drawn_along_the_side_that_is_too_long(many):
    plain, drawn = (all_batches(stream(many[2], batch=4, augment=a), 40) for a in (Augment(), Augment("random")))
    changed = [(a != b).any() for one, other in zip(plain, drawn, strict=True) for a, b in zip(one.pixels.numpy(), other.pixels.numpy(), strict=True)]
    assert 0.3 < np.mean(changed) < 0.9  # squares in the square bucket have nothing to draw


def test_one_of_several_captions_is_chosen_by_slot(many):
    captions = [caption for batch in all_batches(stream(many[2], batch=4), 80) for caption in batch.captions]
    variants = [caption.split()[2] for caption in captions if len(caption.split()) == 3]
    assert all(10 < variants.count(word) < 50 for word in ("seen", "told", "shown"))
    assert any(len(caption.split()) == 2 for caption in captions)


def test_fixed_is_what_draws_nothing(many, tmp_path):
    assert not stream(many[0], batch=2, augment=Augment()).fixed  # captions are drawn
    Path(tmp_path / "0.tar").write_bytes(tar([("a.png", picture(0)), ("a.txt", b"one")]))
    assert not index.index(f"{tmp_path}/0.tar", Transport(READ)).error
    single = snapshot.build([f"{tmp_path}/0.tar"], Transport(READ))
    assert stream(single, batch=1, augment=Augment()).fixed
    assert not stream(single, batch=1, augment=Augment(flip=True)).fixed
    assert not stream(single, batch=1, augment=Augment("random")).fixed


def test_all_captions_each_once(many):
    count, result = stream(many[2], batch=2).captions()
    captions = list(result)
    assert count == 4 * PER_SHARD
    assert len(captions) == len(set(captions)) == 4 * PER_SHARD + 2 * PER_SHARD  # eleven samples of 44 have two more
    assert {"picture 1", "picture 0 told"} < set(captions)


def test_rows_come_as_asked_from_the_middle_and_without_the_broken(many):
    source = stream(many[5], batch=2)
    batches = list(source.rows(range(20), (16, 16), 6))
    assert [len(batch.rows) for batch in batches] == [5, 6, 5, 1]
    assert [row for batch in batches for row in batch.rows] == [row for row in range(20) if row not in BAD]
    middle = Image.open(io.BytesIO(picture(0))).resize((16, 16), Image.Resampling.LANCZOS)
    assert (batches[0].pixels[0].numpy() == np.asarray(middle)).all()
    assert len(source.quarantine) == 3


def test_a_stretch_keeps_the_order_and_every_bucket(many):
    source = stream(many[2], batch=2)
    batches = list(source.row_range(5, 40, 4))
    assert [row for batch in batches for row in batch.rows] == list(range(5, 40))
    assert all(source.order.size_of(row) == batch.size for batch in batches for row in batch.rows)


def test_stored_encodings_come_as_they_lie_and_odd_ones_are_told(tmp_path):
    members = []
    for row, width in enumerate((4, 4, 4, 5)):
        latents = encoded.member({"mean": torch.full((width, 2), float(row)), "std": torch.ones(width, 2)}, {"vae": "abc"})
        members += [(f"{row}.png", picture(0)), (f"{row}.txt", b"x"), (f"{row}.latents.safetensors", latents)]
    (tmp_path / "0.tar").write_bytes(tar(members))
    assert not index.index(f"{tmp_path}/0.tar", Transport(READ)).error
    pins = snapshot.build([f"{tmp_path}/0.tar"], Transport(READ))
    source = Stream(Order(pins, BUCKETS, 0, 1, cropped=True), READ, Augment(), Quarantine(pins), ("caption", "latents"))
    (three,) = source.rows([0, 1, 2], (16, 16), 3)
    assert three.stored["latents.mean"][:, 0, 0].tolist() == [0, 1, 2]
    assert three.pixels is None
    assert not source.fixed
    with pytest.raises(DataError, match="do not fit each other"):
        list(source.rows([2, 3], (16, 16), 2))
