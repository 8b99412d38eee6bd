"""Tables and sidecars: deterministic bytes, no code, and any damage is detected."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from data.shards import sidecar, table
from data.shards.sidecar import COLUMNS
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.shards import indexed, pairs, refusal, scanned, tar

FORM, VERSION = "dev2pro test", 3
HEAD = {"name": "ä", "list": [1, 2.5, None], "nested": {"b": 1, "a": "\udcff"}}
COLUMN = {"long": np.arange(5, dtype="<u8") << 40, "byte": np.array([0, 1, 255, 3, 4], "u1"), "middle": np.arange(5, dtype="<u4")}


def decode_both(content: bytes, path) -> list[tuple[dict, dict] | DataError]:
    """Both ways to read a file: from memory and mapped."""
    path.write_bytes(content)
    result: list[tuple[dict, dict] | DataError] = []
    for way in (lambda: table.decode(content, FORM, VERSION, str(path)), lambda: table.open_mapped(str(path), FORM, VERSION)):
        try:
            result.append(way())
        except DataError as error:
            result.append(error)
    assert all(str(error).startswith(str(path)) for error in result if isinstance(error, DataError))
    return result


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("table") / "a.index"


def test_what_goes_in_comes_out(path):
    for columns in (COLUMN, {name: column[:0] for name, column in COLUMN.items()}, {}):
        for head, result in decode_both(table.encode(FORM, VERSION, HEAD, columns), path):
            assert head == {**HEAD, "form": FORM, "version": VERSION, "columns": table.columns_sum(columns)}
            assert {name: (c.dtype, c.tolist()) for name, c in result.items()} == {name: (c.dtype, c.tolist()) for name, c in columns.items()}


def test_a_large_file_is_mapped_and_not_held(path):
    _, (_, columns) = decode_both(table.encode(FORM, VERSION, HEAD, COLUMN), path)
    assert all(isinstance(column, np.memmap) and not column.flags.writeable for column in columns.values())


def test_the_same_values_are_the_same_bytes():
    def turned(values: dict) -> dict:
        return dict(reversed(values.items()))

    assert table.encode(FORM, VERSION, turned(HEAD), turned(COLUMN)) == table.encode(FORM, VERSION, HEAD, COLUMN)
    assert table.digest(turned(HEAD)) == table.digest(HEAD)
    other = {**COLUMN, "byte": COLUMN["byte"] + np.uint8(1)}
    assert table.columns_sum(other) != table.columns_sum(COLUMN)
    assert table.columns_sum({**COLUMN, "other": COLUMN["byte"]}) != table.columns_sum(COLUMN)


def test_what_was_read_can_be_written_again(path):
    content = table.encode(FORM, VERSION, HEAD, COLUMN)
    for head, columns in decode_both(content, path):
        assert table.encode(FORM, VERSION, head, columns) == content


@settings(max_examples=250)
@given(data=st.data())
def test_any_flipped_byte_is_noticed(path, data):
    content = table.encode(FORM, VERSION, HEAD, COLUMN)
    at = data.draw(st.integers(0, len(content) - 1))
    changed = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    for result in decode_both(changed, path):
        if not isinstance(result, DataError):  # JSON can be spelt in several ways
            assert table.encode(FORM, VERSION, *result) == content


@given(cut=st.integers(0, 10_000))
def test_any_cut_is_noticed(path, cut):
    content = table.encode(FORM, VERSION, HEAD, COLUMN)
    assert all(isinstance(result, DataError) for result in decode_both(content[: cut % len(content)], path))
    assert all(isinstance(result, DataError) for result in decode_both(content + b"x" * (cut + 1), path))


def test_a_changed_head_is_noticed_though_its_json_is_sound(path):
    content = table.encode(FORM, VERSION, {**HEAD, "size": 1234}, COLUMN)
    for result in decode_both(content.replace(b"1234", b"1235"), path):
        assert "its contents are not those it was written with" in str(result)


def forged(head: object) -> bytes:
    return save(dict(COLUMN), metadata={"head": head if isinstance(head, str) else json.dumps(head)})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is damaged or no dev2pro test"),
        (b"\xff" * 100, "is damaged or no dev2pro test"),
        (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "is damaged or no dev2pro test"),
        (save(COLUMN), "is no dev2pro test. Correct the path"),
        (save(COLUMN, metadata={"other": "x"}), "is damaged or no dev2pro test"),
        (forged("[" * 100_000), "is damaged or no dev2pro test"),
        (forged([1]), "is no dev2pro test"),
        (forged({}), "is no dev2pro test"),
        (table.encode("dev2pro other", VERSION, HEAD, COLUMN), "is no dev2pro test. Correct the path"),
        (table.encode(FORM, 4, HEAD, COLUMN), "is a dev2pro test of version 4; this dev2pro reads version 3. Make it again"),
    ],
    ids=["empty", "rubbish", "a pickle", "no head", "another head", "deep", "a list", "nothing", "another form", "another version"],
)
def test_other_files_are_refused(path, content, expected):
    for result in decode_both(content, path):
        assert expected in str(result)


def test_a_missing_file_and_a_folder(tmp_path):
    for name, expected in (("a\x1b[31mb", "No such file"), ("", "Is a directory")):
        message = refusal(lambda: table.open_mapped(f"{tmp_path}/{name}", FORM, VERSION))  # noqa: B023
        assert expected in message
        assert "Correct the path" in message


# ---- sidecars ------------------------------------------------------------------------------------------------------------------------


def test_a_sidecar_is_a_safetensors_file_without_code(tmp_path):
    outcome = indexed(tmp_path / "a.tar", tar(pairs()))
    with safe_open(tmp_path / "a.tar.index", "numpy") as file:
        assert {name: file.get_tensor(name).dtype for name in file.keys()} == {name: np.dtype(kind) for name, kind in COLUMNS.items()}  # noqa: SIM118
        head = json.loads(file.metadata()["head"])
    assert outcome.samples == 6
    assert (head["size"], head["policy"]) == ((tmp_path / "a.tar").stat().st_size, {"empty_captions": False, "allow_partial": False})


def test_a_damaged_sidecar_is_noticed_and_made_again(tmp_path):
    path, transport = tmp_path / "a.tar", Transport(ReadConfig())
    indexed(path, tar(pairs()))
    beside, good = tmp_path / "a.tar.index", (tmp_path / "a.tar.index").read_bytes()
    other = table.encode(sidecar.FORM, sidecar.VERSION, scanned(path).head, COLUMN)
    size = b'size\\": ' + str(path.stat().st_size).encode()
    assert size in good
    for bad in (b"", good[:-1], good[:-1] + b"x", good.replace(size, size[:-1] + b"9"), other):
        beside.write_bytes(bad)
        message = refusal(lambda: sidecar.read(str(path), transport))
        assert message.startswith(f"{path} is not indexed ({beside} is damaged")
        assert f"Index it with `python -m data.index {path}`" in message
        assert not indexed(path).reused
        assert beside.read_bytes() == good
        assert len(sidecar.read(str(path), transport)) == 6


def test_a_shard_without_a_sidecar_says_how_to_make_one(tmp_path):
    path = tmp_path / "it's here.tar"
    message = refusal(lambda: sidecar.read(str(path), Transport(ReadConfig())))
    assert f"{path} is not indexed ({path}.index does not exist" in message
    assert f"""`python -m data.index '{tmp_path}/it'"'"'s here.tar'`""" in message


def test_where_a_sidecar_lies():
    assert sidecar.path_of("/a/b.tar") == "/a/b.tar.index"
    names = [sidecar.path_of(path, "/to") for path in ("/a/b.tar", "/c/b.tar", "https://h/a/b.tar", "/a/\udcffä;rm.tar", f"/a/{'x' * 300}.tar")]
    assert len(set(names)) == 5
    for name in names:
        assert name.startswith("/to/")
        assert len(name.removeprefix("/to/")) < 140
        assert name.removeprefix("/to/").replace(".", "").replace("_", "").replace("-", "").isalnum()
        assert name.isascii()


def test_keys_have_numbers_of_their_own():
    assert len({sidecar.key_number(key) for key in ("a", "b", "a/b", "ä", "\udcff", "")}) == 6
    assert sidecar.key_number("a") == 3405396810240292928  # as `printf a | b2sum -l 64` has it, read backwards


@pytest.mark.parametrize(
    "wrong",
    [{"repeat": 0}, {"repeat": 10**9}, {"repeat": True}, {"altered": 3}, {"altered": {"x": {}}}, {"altered": {"x": {"count": "1", "names": []}}}],
)
def test_a_sidecar_with_notes_or_repeats_that_no_index_has(tmp_path, wrong):
    path = tmp_path / "a.tar"
    indexed(path, tar(pairs(1)))
    entry = sidecar.read(str(path), Transport(ReadConfig()))
    Path(f"{path}.index").write_bytes(sidecar.Sidecar({**entry.head, **wrong}, entry.columns).encode())
    assert "notes or repeats" in refusal(lambda: sidecar.read(str(path), Transport(ReadConfig())))
