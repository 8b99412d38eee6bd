"""Single GETs against real servers: valid bytes, detected changes, transient and final errors."""

import datetime
import email.utils
import socket
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.storage.http import LONGEST_PAUSE, ChangedError, FileInfo, TransientError
from dev2pro.errors import DataError
from tests.servers import Fault, Server

SIZE = 100_000  # of /a
OLD = "Wed, 25 Nov 2020 15:58:45 GMT"


def always(fault):
    return lambda *_: fault


@given(start=st.integers(0, SIZE), length=st.integers(1, SIZE))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_range_has_the_bytes_that_lie_there_and_fewer_at_the_end(web, client, start, length):
    body, info = client.get_range(web.url + "/a", start, length)
    assert body == (web.folder / "a").read_bytes()[start : start + length]
    assert info.size == SIZE


def test_a_stamp_tells_size_etag_and_change(web, client):
    _, info = client.get_range(web.url + "/a", 0, 1)
    assert info.size == SIZE
    assert len(info.etag) == 64
    assert email.utils.parsedate_to_datetime(info.modified).timestamp() == pytest.approx((web.folder / "a").stat().st_mtime, abs=1)
    assert web.requests == [("/a", "bytes=0-0")]


@pytest.mark.parametrize(
    "fault", [None, Fault(status=416, body="<Error><Code>InvalidRange</Code></Error>"), Fault(status=416, body="", headers={"Content-Length": "9"})]
)
def test_an_empty_file_has_a_stamp_and_no_bytes(web, client, fault):
    (web.folder / "empty").touch()
    web.faults = lambda path, *_: fault if path == "/empty" else None
    body, info = client.get_range(web.url + "/empty", 0, 1)
    assert (body, info.size) == (b"", 0)
    assert len(client.get_range(web.url + "/a", 5, 10)[0]) == 10


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 410, 451, 301, 308, "whole", "html"])
def test_what_no_second_try_would_mend_is_told_at_once(web, client, fault):
    web.faults = always(fault)
    with pytest.raises(DataError, match=f"^{web.url}/a ") as caught:
        client.get_range(web.url + "/a", 0, 10)
    assert len(web.requests) == 1
    assert {301: "redirects", 308: "redirects", "whole": "whole files", "html": "whole files"}.get(fault, f"status {fault}") in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("same", [True, False], ids=["to the same host", "to another host"])
def test_redirects_are_not_followed(web, client, tmp_path, status, same):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(bytes(SIZE))
    with Server(tmp_path / "other") as other:
        web.faults = always(Fault(status=status, headers={"Location": f"{web.url if same else other.url}/b?secret=1"}))
        with pytest.raises(DataError, match="redirects") as caught:
            client.get_range(web.url + "/a", 0, 10)
        assert other.requests == []
    assert len(web.requests) == 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["whole", "flood", "more"])
def test_no_more_is_held_than_was_asked_for(web, client, kind):
    with (web.folder / "big").open("wb") as file:
        file.truncate(1 << 33)
    web.faults = always(kind)
    tracemalloc.start()
    try:
        with pytest.raises((DataError, TransientError)):
            client.get_range(web.url + "/big", 0, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20  # of which the server, in this process, has its pieces of 1 MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fault", [408, 425, 429, 500, 502, 503, 504, 520, 599])
def test_overload_and_breakdown_may_pass(web, client, fault):
    web.faults = always(fault)
    with pytest.raises(TransientError, match=f"status {fault}"):
        client.get_range(web.url + "/a", 0, 10)


def in_a_while(seconds: float) -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [("7", 7), ("Wed, 21 Oct 2099 07:28:00 GMT", LONGEST_PAUSE), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("999999999", LONGEST_PAUSE),
     ("9" * 500, LONGEST_PAUSE), ("soon", 0), ("garbage GMT", 0), ("-3", 0), ("\u00b2", 0), ("", 0), ("Wed, 21 Oct 99999 07:28:00 GMT", 0)],
)  # fmt: skip
def test_a_server_may_ask_for_a_pause(web, client, retry_after, pause):
    web.faults = always(Fault(status=503, headers={"Retry-After": retry_after}))
    with pytest.raises(TransientError) as caught:
        client.get_range(web.url + "/a", 0, 10)
    assert caught.value.pause == pause


def test_a_pause_may_be_given_as_a_date(web, client):
    web.faults = always(Fault(status=429, headers={"Retry-After": in_a_while(20)}))
    with pytest.raises(TransientError) as caught:
        client.get_range(web.url + "/a", 0, 10)
    assert 15 < caught.value.pause <= 20


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("reset", "broke"), ("reset middle", "broke"), ("short", "broke"), ("stall", "silent"), ("stall middle", "silent"), ("drip", "only .* of 5000"),
     ("more", "more bytes"), ("flood", "more bytes"), ("wrong range", "another range"), (Fault(headers={"Content-Range": None}), "Content-Range"),
     (Fault(headers={"Content-Range": "bytes 0-4999/*"}), "Content-Range"), (Fault(headers={"Content-Range": "bytes 0-9/\u00b2"}), "Content-Range"),
     (Fault(headers={"Content-Range": "bytes 0-4999/" + "9" * 5000}), "Content-Range"), (Fault(headers={"Content-Length": "-1"}), "silent"),
     (Fault(headers={"Content-Length": None, "Transfer-Encoding": "chunked"}), "broke")],
    ids=str,
)  # fmt: skip
def test_what_breaks_on_the_way_may_pass_and_leaves_no_trace(web, client, fault, reason):
    url = web.url + "/a"
    client.get_range(url, 0, 1)
    web.faults = always(fault)
    before = time.monotonic()
    with pytest.raises(TransientError, match=reason) as caught:
        client.get_range(url, 0, 5000)
    assert time.monotonic() - before < 3
    assert len(str(caught.value)) < 200
    web.faults = None
    assert client.get_range(url, 7, 5000)[0] == (web.folder / "a").read_bytes()[7:5007]


def test_nothing_is_unpacked_on_the_way(web, client):
    web.faults = always(Fault(headers={"Content-Encoding": "gzip"}))
    assert client.get_range(web.url + "/a", 0, 5000)[0] == (web.folder / "a").read_bytes()[:5000]


def test_a_host_that_takes_no_connection_is_waited_for_as_long_as_was_said(client):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]  # until the queue of connections is full
        for one in fillers:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        before = time.monotonic()
        with pytest.raises(TransientError, match="no connection"):
            client.get_range(f"http://127.0.0.1:{listener.getsockname()[1]}/a", 0, 1)
        assert 0.4 < time.monotonic() - before < 3
        for one in fillers:
            one.close()


@pytest.mark.parametrize(("address", "reason"), [("http://nowhere.invalid/a", "name is not known"), ("http://127.0.0.1:1/a", "no connection")])
def test_a_host_that_is_not_there_may_come_back(client, address, reason):
    with pytest.raises(TransientError, match=reason):
        client.get_range(address, 0, 1)


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999/a", "http://h\u00fc..x/a"])
def test_what_is_no_address_is_told_at_once(client, address):
    with pytest.raises(DataError, match="no address"):
        client.get_range(address, 0, 1)


# ---- is it still the same file? -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "why"), [(None, "its ETag is another one"), ("deaf", r"its etag is \w{64}, not \w{64}")])
def test_another_etag_is_another_file(web, client, fault, why):
    _, info = client.get_range(web.url + "/a", 0, 1)
    (web.folder / "a").write_bytes(b"x" * SIZE)
    web.faults = always(fault)
    with pytest.raises(ChangedError, match=rf"changed since it was indexed \({why}\)"):
        client.get_range(web.url + "/a", 0, 10, info)
    assert len(web.requests) == 2


@pytest.mark.parametrize("etag", [None, 'W/"weak"', "bare", '""', '"x\x1b[31my"'])
@pytest.mark.parametrize("how", ["longer", "later", "not at all"])
def test_without_a_strong_etag_size_and_time_tell(web, client, etag, how):
    web.faults = always(Fault("deaf", headers={"ETag": etag}))
    body, info = client.get_range(web.url + "/a", 0, 10)
    assert info.etag == ""
    if how == "longer":
        (web.folder / "a").write_bytes(b"x" * (SIZE + 1))
    web.faults = always(Fault("deaf", headers={"ETag": etag} | ({"Last-Modified": OLD} if how == "later" else {})))
    if how == "not at all":
        assert client.get_range(web.url + "/a", 0, 10, info) == (body, info)
    else:
        with pytest.raises(ChangedError, match="100001 bytes, not 100000" if how == "longer" else "its modified is .*2020"):
            client.get_range(web.url + "/a", 0, 10, info)


def test_messages_hold_no_characters_that_a_terminal_would_obey(web, client):
    web.faults = always(Fault("deaf", headers={"Last-Modified": "\x1b]0;owned\x07", "ETag": None}))
    with pytest.raises(ChangedError) as caught:
        client.get_range(web.url + "/a", 0, 10, FileInfo(SIZE, modified=OLD))
    assert str(caught.value).isprintable()
