"""Shards: every damage is detected at its offset and never silently drops samples."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import scan
from data.shards.sidecar import PARTS, Sidecar
from dev2pro.errors import DataError
from tests.shards import (
    DAMAGES,
    END,
    FORMS,
    SILENT,
    header,
    header_offset,
    indexed,
    jpeg,
    member,
    pairs,
    parts,
    pax,
    refusal,
    rejected,
    rows,
    scanned,
    tar,
)  # fmt: skip


def plain_webdataset(path) -> list[dict]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


# ---- rejected shards -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_rejected_or_read_up_to_the_damage(tmp_path, damage):
    path, (content, offset, expected) = tmp_path / "a.tar", damage(tar(pairs()))
    message = refusal(lambda: scanned(path, content))
    assert message.startswith(f"{path} is rejected at byte {offset}: ")
    assert expected in message
    assert "Copy or write the shard again, or index it with --allow-partial" in message
    entry = scanned(path, allow_partial=True)
    whole = [i for i in range(6) if header_offset(tar(pairs()), f"{i:04d}.txt") + 512 + 9 <= offset]
    assert parts(path, entry, "caption") == [b"picture %d" % i for i in whole]
    assert entry.head["partial"]["offset"] == offset
    assert [row["picture_crc"] for row in rows(scanned(path, allow_partial=True, empty_captions=True))] == [zlib.crc32(jpeg(i)) for i in whole]


@pytest.mark.parametrize("damage", SILENT.values(), ids=SILENT)
def test_plain_webdataset_would_lose_samples_without_a_word(tmp_path, damage):
    (tmp_path / "a.tar").write_bytes(damage(tar(pairs()))[0])
    whole = [sample for sample in plain_webdataset(tmp_path / "a.tar") if {"jpg", "txt"} <= set(sample)]
    assert len(whole) == (6 if damage is SILENT["two tars joined"] else 3)  # of the joined ones, 12


@pytest.mark.parametrize("apart", [0, 4], ids=["adjacent", "apart"])
def test_the_same_name_twice(tmp_path, apart):
    content = tar([*pairs(1), *pairs(3)[2 : 2 + apart], ("0000.jpg", jpeg(7)), ("0000.txt", b"x")])
    second = content.rindex(b"0000.jpg")
    message = refusal(lambda: scanned(tmp_path / "a.tar", content))
    assert f"is rejected at byte {second}: '0000.jpg' is there twice" in message


def test_a_missing_shard(tmp_path):
    assert f"{tmp_path}/a.tar does not exist" in refusal(lambda: scanned(tmp_path / "a.tar"))
    (tmp_path / "b.tar").mkdir()
    assert f"{tmp_path}/b.tar is a folder" in refusal(lambda: scanned(tmp_path / "b.tar"))


def test_a_valid_empty_tar_holds_no_samples(tmp_path):
    entry = scanned(tmp_path / "a.tar", tar([]))
    assert len(entry) == 0
    assert {len(column) for column in entry.columns.values()} == {0}


def test_more_members_than_anyone_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_MEMBERS", 5)
    content = tar(pairs(3))
    message = refusal(lambda: scanned(tmp_path / "a.tar", content))
    assert f"at byte {header_offset(content, '0002.txt')}: more than 5 members; write smaller shards" in message


def test_a_sparse_member_and_a_link_reject_the_shard(tmp_path):
    good = b"".join(member(name.encode(), content) for name, content in pairs(1))
    for bad, expected in ((header(b"b", kind=b"S"), "sparse"), (pax(GNU_sparse_major="1"), "sparse"), (header(b"b.jpg", kind=b"2"), "symbolic link")):
        message = refusal(lambda: scanned(tmp_path / "a.tar", good + bad + END))  # noqa: B023
        assert f"at byte {len(good)}: " in message
        assert expected in message


# ---- any damage at all ---------------------------------------------------------------------------------------------------------------


def attempt(path: Path, content: bytes) -> Sidecar | None:
    """None for a shard that is rejected."""
    try:
        return scanned(path, content)
    except DataError as error:
        return None if f"{path} is rejected at byte" in str(error) else pytest.fail(str(error))


def same_or_named(good: Sidecar, damaged: Sidecar | None) -> bool:
    """Whether the shard or some samples are rejected, and all others are unchanged or have another CRC."""
    if damaged is None:
        return True
    old, new = ({row["key"]: {name: n for name, n in row.items() if "offset" not in name} for row in rows(one)} for one in (good, damaged))
    as_they_were = [new[key] == old[key] or any(new[key][f"{part}_crc"] != old[key][f"{part}_crc"] for part in PARTS) for key in set(old) & set(new)]
    return all(as_they_were) and (set(old) <= set(new) or bool(rejected(damaged)))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=120)
@given(data=st.data())
def test_no_flipped_byte_makes_a_smaller_or_another_set_in_silence(tmp_path_factory, form, data):
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    content = tar([(f"{'n' * 110}{name}", content) for name, content in pairs(2)] if form != "ustar" else pairs(2), FORMS[form])
    good = scanned(path, content)
    near = [st.integers(max(0, row["picture_offset"] - 2048), row["picture_offset"] - 1) for row in rows(good)]
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), *near))
    damaged = attempt(path, content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
    assert same_or_named(good, damaged)
    if damaged is not None:
        assert damaged.head["sha256"] != good.head["sha256"]
        inside = any(row["picture_offset"] <= at < row["picture_offset"] + row["picture_bytes"] for row in rows(good))
        assert not inside or rejected(damaged) or rows(damaged) != rows(good)


@settings(max_examples=60)
@given(start=st.integers(0, 30), length=st.integers(1, 30))
def test_no_zeroed_or_overwritten_blocks_make_a_smaller_or_another_set_in_silence(tmp_path_factory, start, length):
    path = tmp_path_factory.getbasetemp() / "blocks.tar"
    content = tar(pairs(3))
    good = scanned(path, content)
    old = content[512 * start : 512 * (start + length)]
    for new in (bytes(len(old)), content[: len(old)], np.random.default_rng(start).bytes(len(old))):
        assert same_or_named(good, attempt(path, content[: 512 * start] + new + content[512 * start + len(old) :]))


def test_a_flipped_byte_of_a_picture_is_in_the_crc_and_seen_by_nobody_else(tmp_path):
    good = scanned(path := tmp_path / "a.tar", content := tar(pairs(2)))
    at = rows(good)[0]["picture_offset"] + 700
    damaged = scanned(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert damaged.head["rejected"] == []
    assert rows(damaged)[0]["picture_crc"] != rows(good)[0]["picture_crc"]
    assert rows(damaged)[1] == rows(good)[1]
    assert len(plain_webdataset(path)) == 2


def test_an_index_is_the_same_for_the_same_shard(tmp_path):
    content = tar([*pairs(), ("bad.jpg", b"no picture"), ("bad.txt", b"x"), ("c.cls", b"1"), ("c.b", b"1")])
    one, other = (scanned(tmp_path / "a.tar", content if first else None).encode() for first in (True, False))
    assert one == other
    assert indexed(tmp_path / "a.tar").samples == 6
    assert (tmp_path / "a.tar.index").read_bytes() == one
