"""Reads and writes: retries for transient failures, an immediate and clear error for final ones."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.storage import urls
from data.storage.http import ChangedError, FileInfo
from data.storage.transport import Transport
from dev2pro.errors import DataError, TryAgainError
from tests.servers import Fault, impatient, in_child


def first(count: int, fault):
    return lambda path, number, wanted: fault if number < count else None


@pytest.mark.parametrize(
    "fault",
    [429, 503, 500, "reset", "reset middle", "short", "stall", "stall middle", "drip", "more", "flood", "wrong range", Fault(delay=1)],
    ids=str,
)
def test_what_passes_is_tried_again_until_it_is_right(web, fault):
    web.faults = first(1, fault)
    result = Transport(impatient()).read(web.url + "/a", 100, 5000)
    assert result == (web.folder / "a").read_bytes()[100:5100]
    assert len(web.requests) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(503, "HTTP status 503"), ("reset", "broke"), ("stall", "silent"), ("short", "broke"), ("wrong range", "another range")],
)
@pytest.mark.parametrize("what", ["read", "info"])
def test_what_does_not_pass_ends_with_the_code_to_try_again(web, fault, reason, what):
    web.faults = lambda *_: fault
    used = Transport(impatient())
    with pytest.raises(TryAgainError, match=f"^{web.url}/a could not be read in 2 tries .the last: .*{reason}.*same command") as caught:
        used.read(web.url + "/a", 100, 5000) if what == "read" else used.info(web.url + "/a")
    assert caught.value.exit_code == 75
    assert len(web.requests) == 2


@pytest.mark.parametrize("fault", [404, 403, 410, 401, 301, "whole", "html"])
@pytest.mark.parametrize("what", ["read", "info", "read_all"])
def test_what_cannot_pass_is_asked_for_once(web, fault, what):
    web.faults = lambda *_: fault
    used, url = Transport(impatient(retries=5)), web.url + "/a"
    with pytest.raises(DataError, match=f"^{url} "):
        {"read": lambda: used.read(url, 0, 9), "info": lambda: used.info(url), "read_all": lambda: used.read_all(url, 1 << 20)}[what]()
    assert len(web.requests) == 1


def test_a_changed_file_is_asked_for_once(web):
    used = Transport(impatient(retries=5))
    info = used.info(web.url + "/a")
    (web.folder / "a").write_bytes(b"another one")
    with pytest.raises(ChangedError, match="changed since it was indexed"):
        used.read(web.url + "/a", 0, 9, info)
    assert len(web.requests) == 2


def test_a_server_is_given_the_pause_it_asked_for(web):
    web.faults = first(1, Fault(status=503, headers={"Retry-After": "1"}))
    before = time.monotonic()
    Transport(impatient()).read(web.url + "/a", 0, 10)
    assert time.monotonic() - before >= 1


def test_a_second_request_overtakes_one_that_hangs(web):
    web.faults = first(1, "stall")
    before = time.monotonic()
    assert len(Transport(impatient(idle_timeout=30, hedge=0.25)).read(web.url + "/a", 0, 5000)) == 5000
    assert time.monotonic() - before < 5
    assert len(web.requests) == 2


def test_one_that_hangs_overtakes_a_second_that_fails(web):
    web.faults = lambda path, number, wanted: Fault(delay=0.6) if number == 0 else 503
    assert len(Transport(impatient(idle_timeout=30, hedge=0.25)).read(web.url + "/a", 0, 5000)) == 5000
    assert len(web.requests) == 2


def test_a_read_that_flows_is_not_asked_for_twice(web):
    (web.folder / "large").write_bytes(bytes(3 << 20))
    web.faults = lambda *_: "slow"
    assert len(Transport(impatient(hedge=0.1)).read(web.url + "/large", 0, 3 << 20)) == 3 << 20
    assert len(web.requests) == 1


def test_many_threads_share_few_connections(web):
    content, used = (web.folder / "a").read_bytes(), Transport(impatient(threads=4, idle_timeout=30, connect_timeout=10))
    info = used.info(web.url + "/a")

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            start = draw.randrange(90_000)
            length = draw.randrange(1, 10_000)
            assert used.read(web.url + "/a", start, length, info) == content[start : start + length]

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert len(web.requests) == 32 * 200 + 1
    assert web.most <= 8
    assert web.connections <= 9


def test_a_small_file_is_read_whole_within_its_limit(web):
    used = Transport(impatient())
    assert used.read_all(web.url + "/a", 100_000) == used.read_all(str(web.folder / "a"), 100_000) == (web.folder / "a").read_bytes()
    for url in (web.url + "/a", str(web.folder / "a")):
        with pytest.raises(DataError, match="100,000 bytes, more than the 99,999"):
            used.read_all(url, 99_999)


def test_a_forked_process_reads_with_a_transport_of_its_own(web):
    used, url = Transport(impatient(idle_timeout=10)), web.url + "/a"
    content, info = (web.folder / "a").read_bytes(), used.info(url)
    used.read(url, 0, 10, info)

    def work() -> None:
        own = Transport(impatient(idle_timeout=10))
        for start in range(50):
            assert own.read(url, start, 1000, info) == content[start : start + 1000]
            assert own.read(str(web.folder / "a"), start, 1000) == content[start : start + 1000]

    busy = threading.Thread(target=lambda: [used.read(url, start, 5000, info) for start in range(100)])
    busy.start()
    assert [in_child(work) for _ in range(3)] == [0, 0, 0]
    busy.join()
    assert used.read(url, 5, 10, info) == content[5:15]


def test_nothing_is_written_to_the_web(web):
    with pytest.raises(DataError, match="cannot be written"):
        Transport(impatient()).write(web.url + "/b", b"x")
    assert web.requests == []


@pytest.mark.parametrize(
    "url", ["pipe:touch {}", "a.tar::pipe:touch {}", "pipe:touch {};", "file:a;touch {}", "$(touch {})", "`touch {}`", "|touch {}"]
)
def test_no_part_of_a_place_is_run(tmp_path, monkeypatch, url):
    monkeypatch.setenv("GOPEN_REWRITE", "a.tar=pipe:touch")
    monkeypatch.chdir(tmp_path)
    url, used = url.format("ran"), Transport(impatient())
    for ask in (used.info, lambda one: used.read(one, 0, 1), lambda one: used.read_all(one, 9), lambda one: urls.expand(one, "data.train")):
        with pytest.raises(DataError):
            ask(urls.normalize(url))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["hf", "ftp", "gs", "ais", "sftp", "pipe", "simplecache", "data", "ssh", "zip"])
def test_only_the_web_and_s3_are_addresses(scheme):
    with pytest.raises(DataError, match="of addresses only http://, https://, s3:// are"):
        urls.normalize(f"{scheme}://host/a.tar")


@pytest.mark.parametrize(
    "url", ["http://user:hush@host/a.tar", "s3://hush@bucket/a.tar", "https://host/a.tar?X-Amz-Signature=hush", "http://host/a#hush"]
)
def test_secrets_in_a_place_are_refused_and_not_repeated(url):
    with pytest.raises(DataError) as caught:
        urls.normalize(url)
    assert "hush" not in str(caught.value)


def test_a_stamp_is_known_by_its_numbers():
    info = FileInfo(5, "etag", "now")
    assert FileInfo(**info.json()) == info
    assert info.difference(FileInfo(5, "etag", "later")) == ""
    assert info.difference(FileInfo(6, "etag", "now")) == "it has 6 bytes, not 5"
    assert info.difference(FileInfo(5, "other", "now"))
    assert info.difference(FileInfo(5, "", "later"))
    assert not info.difference(FileInfo(5))
