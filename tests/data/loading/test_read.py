"""Samples by row: the indexed bytes or an error, in order, however the servers behave."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.loading.read import Reader
from data.shards import tar
from data.storage import urls
from data.storage.http import ChangedError
from dev2pro.errors import DataError, TryAgainError
from tests.servers import Fault, impatient, in_child

PARTS = ("picture", "caption")
COUNT = 60


@pytest.fixture
def shard(web, write_shard) -> dict[str, bytes]:
    """60 samples of 2,000 bytes at /0.tar."""
    return write_shard(web.folder / "0.tar", COUNT, 2000)


@pytest.fixture
def snapshot(web, shard, pin):
    snap = pin(web.url + "/0.tar")
    web.requests.clear()
    return snap


def as_written(shard: dict[str, bytes], row: int) -> dict[str, bytes]:
    return {"picture": shard[f"{row:04d}.png"], "caption": shard[f"{row:04d}.txt"]}


def all_of(shard: dict[str, bytes]) -> list[dict[str, bytes]]:
    return [as_written(shard, row) for row in range(COUNT)]


def jobs(rows=range(COUNT)):
    return ((row, row) for row in rows)


def at(snapshot, row: int) -> str:
    """The start of the Range header for a sample."""
    return f"bytes={snapshot.span(row, 'picture').offset}-"


@pytest.mark.parametrize("mixed", [True, False], ids=["side by side", "pictures first"])
@pytest.mark.parametrize("size", [0, 40_000])
def test_samples_are_what_was_written_with_as_few_requests_as_can_be(web, write_shard, pin, mixed, size):
    shard = write_shard(web.folder / "0.tar", COUNT, size, mixed=mixed)
    served, local = pin(web.url + "/0.tar"), pin(str(web.folder / "0.tar"))
    assert served.id == local.id
    web.requests.clear()
    for snapshot in (served, local):
        reader = Reader(snapshot, impatient(), PARTS)
        assert [reader.sample(row) for row in range(COUNT)] == all_of(shard)
        assert reader.key(3) == "0003.png"
    assert len(web.requests) == 1 + (COUNT if mixed or not size else 2 * COUNT - 1)  # the last picture is near its caption


def test_only_the_parts_that_are_asked_for_come(snapshot, shard, web):
    assert Reader(snapshot, impatient(), ("caption",)).sample(7) == {"caption": shard["0007.txt"]}
    assert web.requests == [("/0.tar", f"bytes={(span := snapshot.span(7, 'caption')).offset}-{span.offset + span.bytes - 1}")]


def test_bytes_damaged_on_the_way_are_read_again(snapshot, shard, web):
    before = web.counts["/0.tar"]
    web.faults = lambda path, number, wanted: "corrupt" if number == before else None
    assert Reader(snapshot, impatient(), PARTS).sample(5) == as_written(shard, 5)
    assert len(web.requests) == 2


def test_bytes_damaged_twice_on_the_way_end_with_the_code_to_try_again(snapshot, web):
    web.faults = lambda *_: "corrupt"
    with pytest.raises(TryAgainError, match=f"^{web.url}/0.tar: bytes \\d+ to \\d+ .caption. are not those of the index, twice") as caught:
        Reader(snapshot, impatient(), PARTS).sample(5)
    assert caught.value.exit_code == 75
    assert len(web.requests) == 2


def test_other_bytes_on_this_machine_are_another_shard(web, shard, pin):
    file = web.folder / "0.tar"
    reader = Reader(pin(str(file)), impatient(), PARTS)
    content = bytearray(file.read_bytes())
    content[content.index(shard["0005.png"]) + 1000] ^= 1
    file.write_bytes(content)
    assert reader.sample(4) == as_written(shard, 4)
    with pytest.raises(ChangedError, match=r"changed since it was indexed \(bytes .* \(picture\) are not those of the index, twice"):
        reader.sample(5)


def test_a_shard_that_was_cut_is_another_shard(web, shard, pin):
    reader = Reader(pin(str(web.folder / "0.tar")), impatient(), PARTS)
    with (web.folder / "0.tar").open("r+b") as file:
        file.truncate(reader.snapshot.span(5, "picture").offset + 100)
    assert reader.sample(4) == as_written(shard, 4)
    with pytest.raises(ChangedError, match="it ends before byte"):
        reader.sample(5)


def test_a_shard_that_was_written_anew_is_refused_with_the_first_read(snapshot, web, write_shard):
    write_shard(web.folder / "0.tar", COUNT, 2000, seed=9)
    with pytest.raises(ChangedError):
        Reader(snapshot, impatient(), PARTS).sample(5)
    assert len(web.requests) == 1


# ---- prefetch -----------------------------------------------------------------------------------------------------------------------


def test_order_is_kept_whatever_the_servers_do(snapshot, shard, web):
    draw, seen = random.Random(1), set[str]()
    slow = [None, Fault(delay=0.02), Fault(delay=0.05), Fault(delay=0.1)]

    def fault(_path: str, _number: int, wanted: str):
        samples = draw.choice(slow if wanted in seen else [*slow, 503, "reset", "short", "corrupt"])
        seen.add(wanted)
        return samples

    web.faults = fault
    rows = [draw.randrange(COUNT) for _ in range(200)]
    samples = list(Reader(snapshot, impatient(), PARTS).prefetch(jobs(rows)))
    assert [job for job, _ in samples] == rows
    assert [sample for _, sample in samples] == [as_written(shard, row) for row in rows]


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_no_more_requests_are_under_way_than_was_said(snapshot, shard, web, threads):
    web.latency, web.most = 0.05, 0
    assert [samples for _, samples in Reader(snapshot, impatient(threads=threads), PARTS).prefetch(jobs())] == all_of(shard)
    assert threads / 2 <= web.most <= threads


def test_no_more_bytes_wait_than_was_said(web, write_shard, pin):
    write_shard(web.folder / "0.tar", COUNT, 100_000)
    snapshot = pin(web.url + "/0.tar")
    web.requests.clear()
    prefetched = Reader(snapshot, impatient(prefetch_mb=2, threads=16), PARTS).prefetch(jobs())
    for taken in range(1, 20):
        next(prefetched)
        time.sleep(0.05)
        assert len(web.requests) <= taken - 1 + 11  # 2 MiB halved, and the sample that went over it
    prefetched.close()


@pytest.mark.parametrize("prefetch_mb", [0, 1])
def test_a_sample_larger_than_all_that_may_wait_is_read(web, write_shard, pin, prefetch_mb):
    shard = write_shard(web.folder / "0.tar", 3, 2_000_000)
    samples = [sample for _, sample in Reader(pin(web.url + "/0.tar"), impatient(prefetch_mb=prefetch_mb), PARTS).prefetch(jobs(range(3)))]
    assert samples == [as_written(shard, row) for row in range(3)]


def test_who_takes_no_more_waits_for_nothing_and_asks_for_nothing(snapshot, web):
    web.faults = lambda path, number, wanted: None if wanted.startswith(at(snapshot, 0)) else "stall"
    prefetched = Reader(snapshot, impatient(threads=4, idle_timeout=1.5, retries=0), PARTS).prefetch(jobs())
    next(prefetched)
    while len(web.requests) < 5:  # what was taken, and one for each thread
        time.sleep(0.01)
    before = time.monotonic()
    prefetched.close()
    assert time.monotonic() - before < 1
    time.sleep(1.7)
    assert len(web.requests) == 5


def test_an_error_comes_in_its_place_and_at_once(snapshot, shard, web):
    behind = tuple(at(snapshot, row) for row in range(6, COUNT))
    web.faults = lambda path, number, wanted: 404 if wanted.startswith(at(snapshot, 5)) else "stall" if wanted.startswith(behind) else None
    prefetched, samples, before = Reader(snapshot, impatient(idle_timeout=4, retries=0), PARTS).prefetch(jobs()), [], time.monotonic()
    with pytest.raises(DataError, match="404"):
        samples.extend(sample for _, sample in prefetched)  # one by one
    assert samples == all_of(shard)[:5]
    assert time.monotonic() - before < 2


def test_nothing_is_asked_for_nothing(snapshot, web):
    assert list(Reader(snapshot, impatient(), PARTS).prefetch(jobs([]))) == []
    assert web.requests == []


def test_a_forked_process_reads_ahead(snapshot, shard, web):
    config, before = impatient(idle_timeout=10), threading.active_count()
    mine = Reader(snapshot, config, PARTS).prefetch(jobs())
    next(mine)

    def work() -> None:
        assert [result for _, result in Reader(snapshot, config, PARTS).prefetch(jobs())] == all_of(shard)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: in_child(work), range(2))) == [0, 0]
    assert [result for _, result in mine] == all_of(shard)[1:]
    assert threading.active_count() < before + 60


# ---- what a key cannot do -----------------------------------------------------------------------------------------------------------


def test_no_path_is_made_of_a_key(tmp_path, web, write_shard, pin):
    shard = write_shard(web.folder / "0.tar", 1)
    evil = {f"../../../{tmp_path.name}/evil.{name[-3:]}": content for name, content in shard.items()}
    with (web.folder / "evil.tar").open("wb") as file:
        for name, content in evil.items():
            file.write(_header(name, len(content)) + content + bytes(-len(content) % tar.BLOCK))
        file.write(bytes(2 * tar.BLOCK))
    reader = Reader(pin(web.url + "/evil.tar"), impatient(cache=str(tmp_path / "cache"), cache_gb=1.0), PARTS)
    assert reader.sample(0) == as_written(shard, 0)
    assert reader.key(0).startswith("../../../")
    assert not [file for file in Path(tmp_path).rglob("*") if "evil" in file.name and file.suffix in (".png", ".txt")]
    assert all(urls.normalize(one.url) == one.url for one in reader.snapshot.shards)


def _header(name: str, size: int) -> bytes:
    block = bytearray(name.encode().ljust(100, b"\0") + b"0000644\0" + bytes(16) + b"%011o\0" % size + bytes(12) + b" " * 8 + b"0").ljust(512, b"\0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
