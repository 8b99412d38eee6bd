import os

import pytest

from data.storage import urls
from dev2pro.errors import TryAgainError
from dev2pro.redact import redact_url
from tests.servers import environment, moto, s3_environment
from tests.shards import refusal


def touched(folder, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def expand_in(folder, pattern: str) -> list[str]:
    return [os.path.relpath(url, folder) for url in urls.expand(f"{folder}/{pattern}", "data.train")]


# ---- what a pattern names ------------------------------------------------------------------------------------------------------------


def test_stars_and_braces_in_order(tmp_path):
    touched(tmp_path, *(f"train-{i:03d}.tar" for i in (2, 0, 1)), "heldout-000.tar", ".hidden.tar")
    assert expand_in(tmp_path, "train-*.tar") == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert expand_in(tmp_path, "train-{000..001}.tar") == ["train-000.tar", "train-001.tar"]
    assert expand_in(tmp_path, "train-{002,000}.tar") == ["train-002.tar", "train-000.tar"]
    assert expand_in(tmp_path, "{train,heldout}-*.tar") == ["train-000.tar", "train-001.tar", "train-002.tar", "heldout-000.tar"]
    assert expand_in(tmp_path, "train-00?.tar") == expand_in(tmp_path, "train-*.tar")


@pytest.mark.parametrize("pattern", ["nothing.tar", "train-*.tar", "train-{0..3.tar", "train-{000..003}.tar", "{train,no}-*.tar", "a.tar::pipe:ls"])
def test_what_is_missing_is_an_error_and_never_left_out(tmp_path, pattern):
    touched(tmp_path, "train-000.tar", "train-001.tar", "train-003.tar", *(["no"] if "*" in pattern else []))
    if pattern == "train-*.tar":
        tmp_path = tmp_path / "empty"
    message = refusal(lambda: expand_in(tmp_path, pattern))
    assert message.startswith("data.train: nothing matches ")
    missing = {"train-{000..003}.tar": "train-002.tar", "{train,no}-*.tar": "no-*.tar"}.get(pattern, pattern)
    assert f"{tmp_path}/{missing}" in message
    assert f"{tmp_path}/{pattern}" in message
    assert message.endswith("Correct the path or address, or bring the file back.")


@pytest.mark.parametrize(
    "name",
    ["a b.tar", "a#b.tar", "a?b.tar", "a%41b.tar", "a::b.tar", "a&b;c=d+e.tar", "ä-日本.tar", "pipe:cat.tar", "[ab].tar", "{a,b}.tar", "a\\b.tar"],
)
def test_a_file_of_that_very_name_goes_before_a_pattern(tmp_path, name):
    touched(tmp_path, name, "a.tar", "b.tar", "axb.tar")
    assert expand_in(tmp_path, name) == [name]


def test_a_name_that_is_not_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(b"")
    (url,) = urls.expand(f"{tmp_path}/*.tar", "x")
    assert os.fsencode(url).endswith(b"/\xff.tar")
    assert redact_url(url).endswith("/\\udcff.tar")


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, "a.tar")
    assert urls.expand("a.tar", "x") == urls.expand("./*.tar", "x") == urls.expand(f"file://{tmp_path}/a.tar", "x") == [f"{tmp_path}/a.tar"]
    assert urls.normalize("pipe:cat /etc/passwd") == f"{tmp_path}/pipe:cat /etc/passwd"


def test_addresses_are_expanded_by_braces_alone():
    assert urls.expand("https://host/{a,b}/{08..10}.tar", "x") == [f"https://host/{f}/{n}.tar" for f in "ab" for n in ("08", "09", "10")]
    assert "http has no folders" in refusal(lambda: urls.expand("http://host/*.tar", "x"))
    assert urls.expand("s3://bucket/a.tar", "x") == ["s3://bucket/a.tar"]


def test_stars_in_a_bucket():
    with moto() as bucket:
        for key in ("a/1.tar", "a/0.tar", "a/0.tar.index", "b/2.tar"):
            bucket.put(key, b"x")
        assert urls.expand(bucket.url("a/*.tar"), "x") == [bucket.url("a/0.tar"), bucket.url("a/1.tar")]
        assert urls.expand(bucket.url("{b,a}/?.tar"), "x") == [bucket.url(key) for key in ("b/2.tar", "a/0.tar", "a/1.tar")]
        assert f"nothing matches {bucket.url('c/*.tar')}" in refusal(lambda: urls.expand(bucket.url("c/*.tar"), "x"))
        assert "s3://no-such-bucket/*.tar" in refusal(lambda: urls.expand("s3://no-such-bucket/*.tar", "x"))


def test_a_bucket_that_cannot_be_listed_says_what_to_set(monkeypatch):
    with moto() as bucket:
        bucket.put("a.tar", b"x")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        message = refusal(lambda: urls.expand(bucket.url("*.tar"), "x"))
    assert f"{bucket.url('*.tar')} cannot be listed" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_a_store_that_is_away_may_be_back_later():
    with environment(**s3_environment("http://127.0.0.1:1"), AWS_MAX_ATTEMPTS="1"):
        message = refusal(lambda: urls.expand("s3://bucket/*.tar", "x"), TryAgainError)
    assert message.startswith("s3://bucket/*.tar cannot be listed (EndpointConnectionError)")


@pytest.mark.parametrize("pattern", ["{1..99999999999}", "{9999..0001}{1..9999}", "{a,b}{0..2000000..2}", "{1..%s}" % ("9" * 3999)])
def test_braces_that_name_more_places_than_there_are(pattern):
    message = refusal(lambda: urls.expand(f"https://host/{pattern}", "data.train"))
    assert message == f"data.train: https://host/{pattern} names more than 1,000,000 places. Correct the numbers in its braces."


def test_braces_with_steps():
    assert urls.expand("https://host/{000..1000000..500000}", "x") == [f"https://host/{n}" for n in ("0000000", "0500000", "1000000")]


# ---- what is refused, and what is shown ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ftp://user:hunter2@host/a.tar", "ftp://host/a.tar cannot be read: of addresses only http://, https://, s3:// are"),
        ("gs://bucket/a.tar", "gs://bucket/a.tar cannot be read"),
        ("hf://datasets/a.tar", "hf://datasets/a.tar cannot be read"),
        ("https://user:hunter2@host/a.tar", "https://host/a.tar holds a password"),
        ("https://hunter2@host/a.tar", "https://host/a.tar holds a password"),
        ("https://host/a.tar?X-Amz-Signature=hunter2", "https://host/a.tar has a query"),
        ("https://host/a.tar#hunter2", "https://host/a.tar has a query"),
        ("http://[::1/a.tar", "http://[::1/a.tar is no address."),
        ("http://u:hunter2@\u2100/a.tar", "http://\u2100/a.tar is no address."),
    ],
)
def test_addresses_that_are_not_read(url, expected):
    message = refusal(lambda: urls.normalize(url))
    assert message.startswith(expected)
    assert "hunter2" not in message


def test_schemes_are_known_in_any_spelling():
    assert urls.normalize("HTTPS://Host/A.tar") == "https://Host/A.tar"
    assert urls.normalize("FILE:///a/../b.tar") == "/b.tar"
    assert urls.is_remote("s3://b/a.tar")
    assert not urls.is_remote("/s3://b/a.tar")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://u:p@host/a.tar?token=x#y", "https://host/a.tar"),
        ("https://u@v:p@host", "https://host"),
        ("s3://bucket/a b.tar", "s3://bucket/a b.tar"),
        ("/a?b#c.tar", "/a?b#c.tar"),
        ("/\x1b[31mred\x07\r\n\t\u202e\udcff\x9b.tar", "/\\x1b[31mred\\x07\\r\\n\\t\\u202e\\udcff\\x9b.tar"),
        ("/ä 日本 🙂 [bold].tar", "/ä 日本 🙂 [bold].tar"),
    ],
)
def test_what_is_shown_holds_no_hunter2_and_nothing_a_terminal_obeys(url, expected):
    assert redact_url(url) == expected
