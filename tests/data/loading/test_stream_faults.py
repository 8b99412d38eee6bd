"""The stream with broken pictures, changed shards and dying workers."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.loading.order import Order
from data.loading.quarantine import Quarantine
from data.loading.stream import Augment, Stream
from data.shards import pictures
from dev2pro.errors import DataError, TryAgainError
from tests.streams import BAD, PER_SHARD, READ, stream, write_snapshot

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
    snapshot = write_snapshot(tmp_path, 1, frozenset(range(PER_SHARD)))
    with pytest.raises(DataError, match="neither its sample nor 100 substitutes could be used"):
        next(stream(snapshot, batch=1).steps(0, 1, [range(1)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_under_a_run_stops_it(tmp_path, workers):
    snapshot = write_snapshot(tmp_path, 2)
    source = stream(snapshot, batch=2, workers=workers)
    come = source.steps(0, 200, [range(2)])
    next(come)
    content = bytearray((tmp_path / "1.tar").read_bytes())
    for row in range(PER_SHARD):
        content[snapshot.span(PER_SHARD + row, "picture").offset + 50] ^= 1
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.tar changed since it was indexed"):
        list(come)


def children() -> list[int]:
    return [int(child) for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_the_run_and_it_goes_on_where_it_was(many, number, monkeypatch):
    monkeypatch.setattr("data.loading.stream.POLL_SECONDS", 1)
    before = set(children())
    come = stream(many[2], batch=2, workers=2).steps(0, 100_000, [range(2)])
    first = [next(come).rows for _ in range(3)]
    (victim, *_) = sorted(set(children()) - before)
    os.kill(victim, number)
    while Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # a training would be in the middle of a step; torch's own SIGCHLD handler raises here
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
    monkeypatch.setattr("data.loading.stream.LONGEST_PAUSE", 0.0)
    monkeypatch.setattr("data.loading.stream.POLL_SECONDS", 1)
    decode, count = pictures.upright, itertools.count()
    monkeypatch.setattr(pictures, "upright", lambda *args: time.sleep(3600) if next(count) == 40 else decode(*args))  # workers inherit it
    source = stream(many[2], batch=2, workers=1)
    source.config = replace(source.config, connect_timeout=0.5, idle_timeout=0.5)
    before, come = set(children()), source.steps(0, 100_000, [range(2)])
    with pytest.raises(TryAgainError, match="it hangs"):
        for item in enumerate(come):  # noqa: B007
            pass
    assert item[0] >= 15  # what was decoded before
    assert not set(children()) - before


def test_what_waits_is_bounded_in_bytes(many, monkeypatch):
    requested: dict[str, object] = {}

    def loader(pipeline: object, **options: object) -> list:
        requested.update(options)
        return []

    monkeypatch.setattr("data.loading.stream.DataLoader", loader)
    prefetched: Callable[[int, int], object] = lambda workers, prefetch: (  # noqa: E731
        list(
            Stream(Order(many[2], [(1024, 1024)], 0, 4), replace(READ, workers=workers, prefetch_mb=prefetch), Augment(), Quarantine(many[2])).steps(
                0, 1, [range(4)]
            )
        ),
        requested["prefetch_factor"],
    )[1]
    assert prefetched(2, 512) == 10  # 12 MB a batch, two workers, half of 512 MB for what is decoded
    assert prefetched(2, 48) == 1
    assert prefetched(1, 4096) == 16
