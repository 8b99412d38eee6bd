"""The disk cache: what it saves, what it never returns, and that its failures stop no read."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from data.loading.read import Reader
from data.storage.cache import DiskCache
from dev2pro.errors import TryAgainError
from tests.servers import impatient, in_child

PARTS = ("picture", "caption")


@pytest.fixture
def shard(web, write_shard) -> dict[str, bytes]:
    """150 samples of 2,000 bytes at /0.tar."""
    return write_shard(web.folder / "0.tar", 150, 2000)


@pytest.fixture
def reader(web, shard, pin, tmp_path) -> Reader:
    """A reader with a cache; only it sends requests to the web server."""
    snapshot = pin(web.url + "/0.tar")
    web.requests.clear()
    return Reader(snapshot, impatient(cache=str(tmp_path / "cache"), cache_gb=1.0), PARTS)


def as_written(shard: dict[str, bytes], row: int) -> dict[str, bytes]:
    return {"picture": shard[f"{row:04d}.png"], "caption": shard[f"{row:04d}.txt"]}


def blocks(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def used(folder: Path) -> int:
    """Bytes, while others write and remove files."""
    total = 0
    for file in folder.glob("*/*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def test_what_was_fetched_is_there_without_a_request(tmp_path):
    cache, fetched = DiskCache(str(tmp_path / "new" / "cache"), 1e6), list[str]()

    def fetch() -> bytes:
        fetched.append("x")
        return b"0123456789"

    assert [cache.get("key", 10, fetch) for _ in range(3)] == [b"0123456789"] * 3
    assert DiskCache(str(tmp_path / "new" / "cache"), 1e6).get("key", 10, fetch) == b"0123456789"
    assert cache.get("other", 10, fetch) == b"0123456789"
    assert len(fetched) == 2
    cache.drop("key")
    cache.drop("never there")
    cache.get("key", 10, fetch)
    assert len(fetched) == 3


def test_half_a_file_is_fetched_anew(tmp_path):
    cache = DiskCache(str(tmp_path), 1e6)
    cache.get("key", 10, lambda: b"0123456789")
    for content in (b"01234", b"", b"01234567890123456789"):
        blocks(tmp_path)[0].write_bytes(content)
        assert cache.get("key", 10, lambda: b"9876543210") == b"9876543210"


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = DiskCache(str(tmp_path), 10_500)
    for number in range(10):
        cache.get(str(number), 1000, lambda: bytes(1000))
        os.utime(cache._path(str(number)), (1000 + number, 1000 + number))
    for number in (0, 3):
        cache.get(str(number), 1000, lambda: pytest.fail("it is there"))
    cache.get("10", 1000, lambda: bytes(1000))
    assert [name for name in map(str, range(11)) if cache._path(name).exists()] == ["0", "3", "4", "5", "6", "7", "8", "9", "10"]
    for number in range(11, 80):
        cache.get(str(number), 1000, lambda: bytes(1000))
        assert used(tmp_path) <= 10_500


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path):
    cache = DiskCache(str(tmp_path), 5000)
    cache.get("small", 1000, lambda: bytes(1000))
    assert cache.get("large", 6000, lambda: bytes(6000)) == bytes(6000)
    assert [file.stat().st_size for file in blocks(tmp_path)] == [1000]


def test_several_processes_share_one_limit(tmp_path):
    def fill(name: int) -> None:
        cache = DiskCache(str(tmp_path), 1e6)
        for number in range(100):
            assert cache.get(f"{name} {number}", 9000, lambda: bytes(9000)) == bytes(9000)
            assert cache.get(f"all {number}", 900, lambda: b"b" * 900) == b"b" * 900

    with ThreadPoolExecutor(4) as pool:
        going = [pool.submit(in_child, lambda name=name: fill(name)) for name in range(4)]
        most = 0
        while not all(one.done() for one in going):
            most = max(most, used(tmp_path))
        assert [one.result() for one in going] == [0] * 4
    assert 800_000 < most <= 1_100_000
    assert not [file for file in blocks(tmp_path) if "partial" in file.name]


def test_a_process_reads_what_another_fetched(reader, shard, web):
    assert in_child(lambda: [Reader(reader.snapshot, reader.config, PARTS).sample(row) for row in range(150)]) == 0
    assert len(web.requests) == 3
    assert [reader.sample(row) for row in range(150)] == [as_written(shard, row) for row in range(150)]
    assert len(web.requests) == 3


@pytest.mark.parametrize("threads", [1, 16])
def test_neighbours_come_with_one_request(reader, shard, web, threads):
    web.latency = 0.1
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(reader.sample, range(64))) == [as_written(shard, row) for row in range(64)]
    assert len(web.requests) == 1
    reader.sample(64)
    assert len(web.requests) == 2


def test_prefetch_fetches_each_block_once(reader, shard, web):
    web.latency = 0.05
    assert [samples for _, samples in reader.prefetch((row, None) for row in range(150))] == [as_written(shard, row) for row in range(150)]
    assert len(web.requests) == 3


def test_pictures_and_captions_that_lie_apart_are_kept_apart(web, write_shard, pin, tmp_path):
    shard = write_shard(web.folder / "apart.tar", 130, 2000, mixed=False)
    reader = Reader(pin(web.url + "/apart.tar"), impatient(cache=str(tmp_path / "cache"), cache_gb=1.0), PARTS)
    web.requests.clear()
    assert [reader.sample(row) for row in range(130)] == [as_written(shard, row) for row in range(130)]
    assert len(web.requests) == 6
    assert used(tmp_path / "cache" / "bytes") < (web.folder / "apart.tar").stat().st_size


def test_samples_without_captions_do_not_make_blocks_large(web, write_shard, pin, tmp_path):
    shard = write_shard(web.folder / "bare.tar", 130, 2000, captions=False)
    reader = Reader(pin(web.url + "/bare.tar", empty_captions=True), impatient(cache=str(tmp_path / "cache"), cache_gb=1.0), PARTS)
    web.requests.clear()
    assert reader.sample(129) == {"picture": shard["0129.png"], "caption": b""}
    assert len(web.requests) == 1
    assert used(tmp_path / "cache" / "bytes") < 10_000
    assert [reader.sample(row)["picture"] for row in range(64)] == [shard[f"{row:04d}.png"] for row in range(64)]
    assert len(web.requests) == 2


def test_a_damaged_block_is_healed(reader, shard, web, tmp_path):
    reader.sample(5)
    (block,) = blocks(tmp_path / "cache")
    content = bytearray(block.read_bytes())
    content[content.index(shard["0005.png"]) + 1000] ^= 1
    block.write_bytes(content)
    assert reader.sample(6) == as_written(shard, 6)
    assert len(web.requests) == 1
    assert reader.sample(5) == as_written(shard, 5)
    for _ in range(2):
        assert [reader.sample(row) for row in range(64)] == [as_written(shard, row) for row in range(64)]
    assert len(web.requests) == 3


def test_bytes_damaged_on_the_way_do_not_stay(reader, shard, web):
    before = web.counts["/0.tar"]
    web.faults = lambda path, number, wanted: "corrupt" if number == before else None
    assert reader.sample(63) == as_written(shard, 63)
    assert [reader.sample(row) for row in range(64)] == [as_written(shard, row) for row in range(64)]


def test_a_store_that_damages_bytes_is_told(reader, web):
    web.faults = lambda *_: "corrupt"
    with pytest.raises(TryAgainError, match="are not those of the index, twice"):
        reader.sample(63)


def test_shards_of_the_same_name_are_told_apart(web, write_shard, pin, tmp_path):
    first = write_shard(web.folder / "setA" / "0.tar", 8, 2000, seed=1)
    second = write_shard(web.folder / "setB" / "0.tar", 8, 2000, seed=2)
    config, snapshots = impatient(cache=str(tmp_path / "cache"), cache_gb=1.0), [pin(f"{web.url}/{name}/0.tar") for name in ("setA", "setB")]
    assert snapshots[0].span(7, "caption")[:2] == snapshots[1].span(7, "caption")[:2]
    web.requests.clear()
    for _ in range(2):
        for snapshot, shard in zip(snapshots, (first, second), strict=True):
            assert Reader(snapshot, config, PARTS).sample(3) == as_written(shard, 3)
    assert len(web.requests) == 2


def test_a_full_disk_costs_one_warning(shard, web, pin, small_disk, capfd):
    reader = Reader(pin(web.url + "/0.tar"), impatient(cache=str(small_disk), cache_gb=1.0), PARTS)
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    web.requests.clear()
    assert [reader.sample(row) for row in range(0, 150, 10)] == [as_written(shard, row) for row in range(0, 150, 10)]
    assert len(web.requests) == 15
    assert capfd.readouterr().err.count("keeps nothing more (No space left on device); reading goes on without it.") == 1
    assert not [file for file in blocks(small_disk) if "partial" in file.name]


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, capfd):
    (tmp_path / "file").touch()
    cache = DiskCache(str(tmp_path / "file" / "cache"), 1e6)
    for _ in range(3):
        assert cache.get("key", 3, lambda: b"abc") == b"abc"
    cache.drop("key")
    assert capfd.readouterr().err.count("reading goes on without it") == 1


def test_a_folder_that_may_only_be_read_is_read(tmp_path):
    tmp_path.chmod(0o755)
    DiskCache(str(tmp_path), 1e6).get("key", 3, lambda: b"abc")

    def work() -> None:
        os.chdir(tmp_path)
        if not os.geteuid():
            os.seteuid(65534)
        else:
            tmp_path.chmod(0o555)
        cache = DiskCache(".", 2000)
        assert cache.get("key", 3, lambda: b"never") == b"abc"
        assert cache.get("more", 1900, lambda: bytes(1900)) == bytes(1900)
        cache.drop("key")

    assert in_child(work) == 0
    assert DiskCache(str(tmp_path), 1e6).get("key", 3, lambda: b"never") == b"abc"
