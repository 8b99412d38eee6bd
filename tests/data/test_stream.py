"""The stream: the same (sample, crop, mirroring, caption) in every slot of every step, on any number of ranks and workers, after any kill."""

import io
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import index, order, pictures, snapshot
from data.order import Order
from data.quarantine import Quarantine
from data.snapshot import Snapshot
from data.stream import Augment, Batch, Stream
from data.transport import ReadConfig, Transport
from dev2pro.errors import DataError, TryAgainError
from tests.shards import tar

READ = ReadConfig(workers=0, threads=3, retries=0)
DRAWN = Augment("random", flip=True)
BUCKETS = order.sizes(16, 8, 2.0)
FORMS = [(20, 20), (40, 16), (16, 40), (24, 18), (17, 23)]
PER_SHARD = 11
BAD = {3, 17, 18}  # rows whose pictures cannot be decoded


def picture(row: int, broken: bool = False) -> bytes:
    """Told apart by every pixel; a broken one has a good header and half of its body."""
    width, height = FORMS[row % len(FORMS)]
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2] if broken else buffer.getvalue()


def pinned(folder: Path, shards: int, bad: frozenset[int] = frozenset()) -> Snapshot:
    """A snapshot of shards whose samples have three captions each, every fourth one."""
    transport, places = Transport(READ), []
    for number in range(shards):
        members: list[tuple[str, bytes]] = []
        for row in range(number * PER_SHARD, (number + 1) * PER_SHARD):
            several = json.dumps({"captions": [f"picture {row} {word}" for word in ("seen", "told", "shown")]}).encode()
            caption = (f"{row:04d}.txt", b"picture %d" % row) if row % 4 else (f"{row:04d}.json", several)
            members += [(f"{row:04d}.png", picture(row, row in bad)), caption]
        places.append(str(folder / f"{number}.tar"))
        Path(places[-1]).write_bytes(tar(members))
        assert not index.index(places[-1], transport).error
    return snapshot.build(places, transport)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Snapshot]:
    """One, two and four shards, without and with pictures that cannot be decoded."""
    folder = tmp_path_factory.mktemp("many")
    made = []
    for bad in (frozenset[int](), frozenset(BAD)):
        for shards in (1, 2, 4):
            place = folder / f"{shards}-{len(bad)}"
            place.mkdir()
            made.append(pinned(place, shards, bad))
    return made


def stream(pins: Snapshot, *, batch: int, seed: int = 0, workers: int = 0, augment: Augment = DRAWN, path: str | None = None) -> Stream:
    quarantine = Quarantine(pins, path)
    quarantine._check = lambda *_: None  # three of eleven are too many; that is another test's matter
    return Stream(Order(pins, BUCKETS, seed, batch), replace(READ, workers=workers), augment, quarantine)


def slots_of(rank: int, world: int, batch: int, micro: int) -> list[range]:
    share = batch // world
    return [range(rank * share + i, rank * share + min(i + micro, share)) for i in range(0, share, micro)]


Seen = dict[tuple[int, int], tuple[int, str, bytes]]  # (step, slot) -> (sample, caption, pixels)


def seen(source: Stream, first: int, last: int, slots: list[range]) -> Seen:
    found: Seen = {}
    asked = [(step, some) for step in range(first, last) for some in slots]
    for (step, some), batch in zip(asked, source.steps(first, last, slots), strict=True):
        for i, slot in enumerate(some):
            found[step, slot] = batch.rows[i], batch.captions[i], batch.pixels[i].numpy().tobytes()
    return found


@given(
    number=st.integers(0, 5), seed=st.integers(0, 2**32), share=st.integers(1, 4), world=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 5), kill=st.integers(0, 7), steps=st.integers(1, 7),
)  # fmt: skip
@settings(max_examples=60)
def test_any_ranks_micro_batches_and_kills_see_the_same(many, number, seed, share, world, micro, kill, steps):
    batch = share * world
    alone = seen(stream(many[number], batch=batch, seed=seed), 0, steps, [range(batch)])
    split: Seen = {}
    for rank in range(world):
        slots = slots_of(rank, world, batch, micro)
        source = stream(many[number], batch=batch, seed=seed)
        before = source.steps(0, steps, slots)
        for _ in range(min(kill, steps) * len(slots)):
            next(before)
        before.close()  # killed here; whoever comes next begins with nothing but the number of the step
        split |= seen(source, 0, min(kill, steps), slots) | seen(stream(many[number], batch=batch, seed=seed), min(kill, steps), steps, slots)
    assert split == alone


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("number", [2, 5], ids=["good pictures", "some broken"])
def test_any_workers_see_the_same(many, number, workers):
    alone = seen(stream(many[number], batch=6), 0, 9, [range(6)])
    assert seen(stream(many[number], batch=6, workers=workers), 0, 9, [range(0, 4), range(4, 6)]) == alone
    assert seen(stream(many[number], batch=6, workers=workers), 4, 9, [range(6)]) == {key: one for key, one in alone.items() if key[0] >= 4}


def test_what_is_seen_is_the_sample_in_its_bucket(many):
    source = stream(many[2], batch=4)
    for batch in source.steps(0, 11, [range(4)]):
        for row, caption, pixels in zip(batch.rows, batch.captions, batch.pixels, strict=True):
            assert caption.startswith(f"picture {row}")
            assert source.order.size_of(row) == batch.size
            assert pixels.shape == (batch.size[1], batch.size[0], 3)


# ---- what is drawn ------------------------------------------------------------------------------------------------------------------------


def every(source: Stream, steps: int) -> list[Batch]:
    return list(source.steps(0, steps, [range(source.order.batch)]))


def test_every_other_picture_is_mirrored(many):
    plain, mirrored = (every(stream(many[2], batch=4, augment=a), 40) for a in (Augment(), Augment(flip=True)))
    same = flipped = 0
    for one, other in zip(plain, mirrored, strict=True):
        for a, b in zip(one.pixels.numpy(), other.pixels.numpy(), strict=True):
            same += (a == b).all()
            flipped += (a[:, ::-1] == b).all()
    assert same + flipped == 160
    assert 55 < flipped < 105  # four standard errors


def test_crops_are_drawn_along_the_side_that_is_too_long(many):
    plain, drawn = (every(stream(many[2], batch=4, augment=a), 40) for a in (Augment(), Augment("random")))
    changed = [(a != b).any() for one, other in zip(plain, drawn, strict=True) for a, b in zip(one.pixels.numpy(), other.pixels.numpy(), strict=True)]
    assert 0.3 < np.mean(changed) < 0.9  # squares in the square bucket have nothing to draw


def test_one_of_several_captions_is_chosen_by_slot(many):
    captions = [caption for batch in every(stream(many[2], batch=4), 80) for caption in batch.captions]
    words = [caption.split()[2] for caption in captions if len(caption.split()) == 3]
    assert all(10 < words.count(word) < 50 for word in ("seen", "told", "shown"))
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
    count, found = stream(many[2], batch=2).captions()
    captions = list(found)
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
    batches = list(source.stretch(5, 40, 4))
    assert [row for batch in batches for row in batch.rows] == list(range(5, 40))
    assert all(source.order.size_of(row) == batch.size for batch in batches for row in batch.rows)


# ---- faults --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_makes_room_for_another_and_is_noted(many, tmp_path, workers):
    path = f"{tmp_path}/quarantine.jsonl"
    source = stream(many[5], batch=4, workers=workers, path=path)
    rows = [row for batch in source.steps(0, 22, [range(4)]) for row in batch.rows]
    assert not BAD & set(rows)
    assert len(rows) == 88
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert {line["key"] for line in lines} == {f"{row:04d}.png" for row in BAD}
    for line in lines:
        shard = Path(line["shard"]).read_bytes()
        assert shard[line["offset"] :].startswith(b"\x89PNG")
        assert "its pixels cannot be decoded" in line["reason"]
        assert source.order.step(line["step"]).rows[line["slot"]] == int(line["key"][:4])


def test_nothing_but_broken_pictures(tmp_path):
    pins = pinned(tmp_path, 1, frozenset(range(PER_SHARD)))
    with pytest.raises(DataError, match="neither its sample nor 100 substitutes could be used"):
        next(stream(pins, batch=1).steps(0, 1, [range(1)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_under_a_run_stops_it(tmp_path, workers):
    pins = pinned(tmp_path, 2)
    source = stream(pins, batch=2, workers=workers)
    come = source.steps(0, 200, [range(2)])
    next(come)
    content = bytearray((tmp_path / "1.tar").read_bytes())
    for row in range(PER_SHARD):
        content[pins.span(PER_SHARD + row, "picture").offset + 50] ^= 1
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.tar changed since it was indexed"):
        list(come)


def children() -> list[int]:
    return [int(child) for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_the_run_and_it_goes_on_where_it_was(many, number, monkeypatch):
    monkeypatch.setattr("data.stream.LOOK_AFTER", 1)
    before = set(children())
    come = stream(many[2], batch=2, workers=2).steps(0, 100_000, [range(2)])
    first = [next(come).rows for _ in range(3)]
    (victim, *_) = sorted(set(children()) - before)
    os.kill(victim, number)
    with pytest.raises(TryAgainError, match="goes on from the last checkpoint") as caught:
        for _ in come:  # and nowhere else: what was read before it died is still good
            pass
    assert caught.value.exit_code == 75
    del caught, come  # the traceback holds the other worker
    rest = stream(many[2], batch=2, workers=2).steps(3, 5, [range(2)])
    alone = stream(many[2], batch=2).steps(0, 5, [range(2)])
    assert [*first, *(batch.rows for batch in rest)] == [batch.rows for batch in alone]
    assert not set(children()) - before  # no worker is left behind


def test_a_worker_that_hangs_is_noticed(many, monkeypatch):
    monkeypatch.setattr("data.stream.LONGEST_PAUSE", 0.0)
    monkeypatch.setattr("data.stream.LOOK_AFTER", 1)
    decode, count = pictures.upright, itertools.count()
    monkeypatch.setattr(pictures, "upright", lambda *some: time.sleep(3600) if next(count) == 40 else decode(*some))  # workers inherit it
    source = stream(many[2], batch=2, workers=1)
    source.config = replace(source.config, connect_timeout=0.5, idle_timeout=0.5)
    before, come = set(children()), source.steps(0, 100_000, [range(2)])
    with pytest.raises(TryAgainError, match="it hangs"):
        for got in enumerate(come):  # noqa: B007
            pass
    assert got[0] >= 15  # what was decoded before
    assert not set(children()) - before


def test_what_waits_is_bounded_in_bytes(many, monkeypatch):
    asked: dict[str, object] = {}

    def loader(pipeline: object, **options: object) -> list:
        asked.update(options)
        return []

    monkeypatch.setattr("data.stream.DataLoader", loader)
    ahead: Callable[[int, int], object] = lambda workers, prefetch: (  # noqa: E731
        list(
            Stream(Order(many[2], [(1024, 1024)], 0, 4), replace(READ, workers=workers, prefetch_mb=prefetch), Augment(), Quarantine(many[2])).steps(
                0, 1, [range(4)]
            )
        ),
        asked["prefetch_factor"],
    )[1]
    assert ahead(2, 512) == 10  # 12 MB a batch, two workers, half of 512 MB for what is decoded
    assert ahead(2, 48) == 1
    assert ahead(1, 4096) == 16
