"""An s3 store (moto, on loopback) and web servers that imitate a faulty one: reads, writes, and that no secret is printed."""

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import index
from data.loading.read import Reader
from data.shards import sidecar, snapshot
from data.storage import http, urls
from data.storage.http import ChangedError
from data.storage.transport import Transport
from dev2pro.errors import DataError, TryAgainError
from tests.servers import SECRET, Bucket, Fault, Server, environment, impatient, in_child, moto, s3_environment

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def store() -> Iterator[Bucket]:
    with moto() as bucket:
        yield bucket


@pytest.fixture
def bucket(store: Bucket, request) -> Bucket:
    """A bucket of the test's own."""
    name = f"shards-{abs(hash(request.node.name))}"
    store.client.create_bucket(Bucket=name)
    return Bucket(name, store.client)


@pytest.fixture
def used() -> Transport:
    return Transport(impatient(idle_timeout=20, connect_timeout=20))


def chain(error: BaseException) -> str:
    """The traceback of an error, and the reprs of its causes."""
    text, one = "".join(traceback.format_exception(error)), error
    while one := one.__cause__ or one.__context__:  # type: ignore[assignment]
        text += f"{one!r} {one}"
    return text


@pytest.mark.parametrize("key", ["0.tar", "a folder/\u00fc+%41 &=.tar", "a//b.tar", "2026/01/0.tar"])
def test_an_object_is_read_by_ranges(bucket, used, key):
    content = bytes(range(256)) * 40
    url = bucket.put(key, content)
    info = used.info(url)
    assert (info.size, len(info.etag)) == (10240, 32)
    assert used.read(url, 1000, 300, info) == content[1000:1300]
    assert used.read_all(url, 1 << 20) == content
    assert urls.expand(url, "data.train") == [url]


def test_an_object_that_was_written_over_is_another_one(bucket, used):
    url = bucket.put("0.tar", b"0123456789")
    info = used.info(url)
    bucket.put("0.tar", b"9876543210")
    with pytest.raises(ChangedError, match=f"^{url} changed since it was indexed"):
        used.read(url, 0, 5, info)


def test_an_empty_object_has_no_bytes(bucket, used):
    assert used.read_all(bucket.put("empty", b""), 10) == b""


def test_what_is_not_there_is_told_at_once(bucket, used):
    for url in (bucket.url("none.tar"), "s3://no-such-bucket/0.tar"):
        for ask in (used.info, lambda one: used.read(one, 0, 5), lambda one: used.read_all(one, 5)):
            with pytest.raises(DataError, match=f"^{url} .*404.*Correct the address"):
                ask(url)


def test_patterns_find_objects(bucket):
    for key in ("b/2.tar", "b/0.tar", "b/1.tar", "b/0.tar.index", "c/0.tar"):
        bucket.put(key, b"x")
    find = lambda pattern: urls.expand(bucket.url(pattern), "data.train")  # noqa: E731
    assert find("b/*.tar") == [bucket.url(f"b/{number}.tar") for number in range(3)]
    assert find("{c,b}/{0..1}.tar") == [bucket.url(name) for name in ("c/0.tar", "c/1.tar", "b/0.tar", "b/1.tar")]
    assert find("*/0.tar") == [bucket.url("b/0.tar"), bucket.url("c/0.tar")]
    assert find("b/[12].tar") == [bucket.url("b/1.tar"), bucket.url("b/2.tar")]
    with pytest.raises(DataError, match=r"data\.train: nothing matches"):
        find("none/*.tar")


def test_a_sidecar_is_written_beside_its_shard_and_read_back(bucket, used, write_shard, tmp_path):
    write_shard(tmp_path / "0.tar", 5)
    url = bucket.put("0.tar", (tmp_path / "0.tar").read_bytes())
    assert index.index(url, used, empty_captions=False, allow_partial=False).samples == 5
    entry = sidecar.read(url, used)
    assert len(entry) == 5
    assert entry.info == used.info(url)
    assert index.index(url, used, empty_captions=False, allow_partial=False).reused


def test_a_finished_file_is_moved_into_a_bucket(bucket, used, tmp_path):
    (tmp_path / "made").write_bytes(bytes(range(256)) * 4000)
    used.move(str(tmp_path / "made"), bucket.url("to/0.tar"))
    assert used.read_all(bucket.url("to/0.tar"), 2 << 20) == bytes(range(256)) * 4000
    assert not (tmp_path / "made").exists()
    (tmp_path / "made").touch()
    with pytest.raises(DataError, match=r"^s3://no-such-bucket/0\.tar cannot be had from s3"):
        used.move(str(tmp_path / "made"), "s3://no-such-bucket/0.tar")
    assert (tmp_path / "made").exists()


def test_from_shards_in_a_bucket_to_samples(bucket, used, write_shard, tmp_path):
    shards = [write_shard(tmp_path / f"{number}.tar", 10, 1000, seed=number) for number in range(2)]
    for number in range(2):
        bucket.put(f"set/{number}.tar", (tmp_path / f"{number}.tar").read_bytes())
    for args in (["data.index"], ["data.snapshot", "--out", str(tmp_path / "all.snapshot")]):
        done = subprocess.run(
            [sys.executable, "-m", *args, bucket.url("set/*.tar")], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    snap = snapshot.check(snapshot.read(str(tmp_path / "all.snapshot")), used)
    assert b"Signature" not in (tmp_path / "all.snapshot").read_bytes()
    reader = Reader(snap, impatient(idle_timeout=20, cache=str(tmp_path / "cache"), cache_gb=1.0), ("picture", "caption"))
    samples = list(reader.prefetch((row, row) for row in range(20)))
    assert [job for job, _ in samples] == list(range(20))
    assert [sample["picture"] for _, sample in samples] == [shards[row // 10][f"{row % 10:04d}.png"] for row in range(20)]
    write_shard(tmp_path / "1.tar", 10, 1000, seed=9)
    bucket.put("set/1.tar", (tmp_path / "1.tar").read_bytes())
    with pytest.raises(ChangedError, match=r"set/1\.tar changed"):
        snapshot.check(snap, used)


def test_a_forked_process_signs_for_itself(bucket, used):
    url = bucket.put("0.tar", b"0123456789")
    info = used.info(url)

    def work() -> None:
        own = Transport(impatient(idle_timeout=20))
        assert own.read(url, 2, 3, info) == b"234"
        own.write(bucket.url(f"{os.getpid()}"), b"x")

    with ThreadPoolExecutor(3) as pool:
        going = pool.submit(lambda: [Transport(impatient()).info(url) for _ in range(20)])
        assert list(pool.map(lambda _: in_child(work), range(2))) == [0, 0]
        going.result()


def test_addresses_are_signed_in_the_way_that_every_store_knows_and_for_the_bucket_s_region(store, used):
    store.client.create_bucket(Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    url = os.environ["AWS_ENDPOINT_URL"]
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in used._client._request_url("s3://far/0.tar")
    with environment(AWS_ENDPOINT_URL=None, AWS_ENDPOINT_URL_S3=url):
        assert "%2Feu-central-1%2Fs3%2F" in Transport(impatient())._client._request_url("s3://far/0.tar")


def test_an_address_is_signed_again_before_borrowed_credentials_can_have_ended(store, used, monkeypatch):
    url, now = store.url("0.tar"), time.time()
    monkeypatch.setattr(http.time, "time", lambda: now)
    first = used._client._request_url(url)
    assert used._client._request_url(url) is first
    now += 600
    assert used._client._request_url(url) is not first


# ---- secrets ------------------------------------------------------------------------------------------------------------------------


def check_no_secrets(error: BaseException, log: str) -> None:
    text = chain(error) + log
    for secret in ("Signature", "X-Amz", "AKIA", SECRET, "Credential="):
        assert secret not in text, text


FAULTS = [
    "reset", "reset middle", "short", "stall", "stall middle", "drip", "whole", "wrong range", "html", "more", 400, 401, 403, 404, 500, 503,
    Fault(status=301, headers={"Location": "/elsewhere?X-Amz-Signature=1"}), Fault(headers={"ETag": '"other"'}),
    Fault(headers={"Content-Range": "?"}), Fault(headers={"Broken header": "x", "Content-Length": "no"}),
    Fault(status=403, body="<Error><StringToSign>AWS4-HMAC-SHA256 X-Amz</StringToSign></Error>"),
]  # fmt: skip


def test_no_failure_shows_a_signed_address(tmp_path, caplog):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(bytes(10_000))
    with Server(tmp_path) as server, environment(**s3_environment(server.url)), caplog.at_level(logging.DEBUG, "urllib3"):
        used, url = Transport(impatient(retries=0)), "s3://shards/0.tar"
        info = used.info(url)
        for fault in FAULTS:
            server.faults = lambda *_, fault=fault: fault
            with pytest.raises((DataError, TryAgainError), match=f"^{url} ") as caught:
                used.read(url, 0, 5000, info)
            check_no_secrets(caught.value, caplog.text)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "https://127.0.0.1:1", "http://127.0.0.1:99999", "nothing"])
def test_a_store_that_is_not_reached_is_told_without_secrets(caplog, url):
    with environment(**s3_environment(url), AWS_MAX_ATTEMPTS="1"):
        used = Transport(impatient(retries=0))
        for ask in (used.info, lambda object_url: used.read(object_url, 0, 9), lambda object_url: used.write(object_url, b"x")):
            with caplog.at_level(logging.DEBUG, "urllib3"), pytest.raises((DataError, TryAgainError)) as caught:
                ask("s3://shards/0.tar")
            check_no_secrets(caught.value, caplog.text)


def test_without_credentials_it_is_said_where_they_come_from(store):
    with environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None):
        used, url = Transport(impatient()), store.url("0.tar")
        for ask in (used.info, lambda url: used.write(url, b"x")):
            with pytest.raises(DataError, match=f"^{url} cannot be had from s3 .NoCredentialsError.*AWS_ACCESS_KEY_ID") as caught:
                ask(url)
            check_no_secrets(caught.value, "")


def test_wrong_credentials_are_told_at_once(tmp_path, caplog):
    with Server(tmp_path, faults=lambda *_: 403) as server, environment(**s3_environment(server.url)):
        with pytest.raises(DataError, match=r"403.*the right to read it") as caught:
            Transport(impatient()).info("s3://shards/0.tar")
        check_no_secrets(caught.value, caplog.text)
        assert len(server.requests) == 1


def test_a_write_that_is_not_allowed_or_has_no_bucket_is_told(store, used):
    with pytest.raises(DataError, match=r"^s3://no-such-bucket/x cannot be had from s3") as caught:
        used.write("s3://no-such-bucket/x", b"x")
    assert SECRET not in chain(caught.value)
