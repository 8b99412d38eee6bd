import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import index
from data.shards import snapshot, table
from data.shards.sidecar import key_number
from data.shards.snapshot import Filters, Snapshot
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.servers import Server
from tests.shards import indexed, jpeg, pairs, refusal, tar

TRANSPORT = Transport(ReadConfig())


def shard(path: Path, *samples: tuple[str, int, int, str], extra: tuple[tuple[str, bytes], ...] = ()) -> str:
    """An indexed tar of (key, width, height, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [one for i, (key, w, h, text) in enumerate(samples) for one in ((f"{key}.jpg", jpeg(i, w, h)), (f"{key}.txt", text.encode()))]
    assert indexed(path, tar([*members, *extra])).exit_code == 0
    return str(path)


def numbered(folder: Path, count: int = 3) -> list[str]:
    """Shards of 1, 2, 3 ... samples."""
    return [shard(folder / f"{i}.tar", *((f"{i}-{j}", 32, 24, "x" * (j + 1)) for j in range(i + 1))) for i in range(count)]


def built(shards: list[str], **options) -> Snapshot:
    return snapshot.build(shards, TRANSPORT, **options)


# ---- what it holds -------------------------------------------------------------------------------------------------------------------


def test_samples_are_numbered_in_the_order_of_the_shards(tmp_path):
    shards = numbered(tmp_path)
    snap = built(shards[::-1])
    assert len(snap) == 6
    assert [Path(snap.shard(row).url).name for row in range(6)] == ["2.tar"] * 3 + ["1.tar"] * 2 + ["0.tar"]
    assert [(one.first, one.samples, one.repeat) for one in snap.shards] == [(0, 3, 1), (3, 2, 1), (5, 1, 1)]
    for row, key in enumerate(("2-0", "2-1", "2-2", "1-0", "1-1", "0-0")):
        span = snap.span(row, "picture")
        content = Path(snap.shard(row).url).read_bytes()
        assert content[span.offset - 512 :].startswith(f"{key}.jpg".encode())
        assert int(snap.columns["key"][row]) == key_number(key)
        assert content[span.offset :][: span.bytes] == jpeg(int(key[-1]))


def test_what_is_written_is_read_again(tmp_path):
    snap = built(numbered(tmp_path), filters=Filters(min_side=8), sources=["a"], folders={"b": "c"})
    snap.write(str(tmp_path / "a.snapshot"))
    again = snapshot.read(str(tmp_path / "a.snapshot"))
    assert (again.id, again.shards, len(again)) == (snap.id, snap.shards, len(snap))
    assert {name: column.tolist() for name, column in again.columns.items()} == {name: column.tolist() for name, column in snap.columns.items()}
    assert (again.head["sources"], again.head["folders"]) == (["a"], {"b": "c"})
    again.write(str(tmp_path / "b.snapshot"))
    assert (tmp_path / "b.snapshot").read_bytes() == (tmp_path / "a.snapshot").read_bytes()


def test_an_id_is_of_what_the_samples_are_and_not_of_where_or_when(tmp_path):
    shards = numbered(tmp_path / "here")
    first = built(shards).id
    moved = [str(shutil.copy(path, tmp_path)) for path in shards]
    for path in moved:
        os.utime(path, ns=(5, 5))
        indexed(Path(path))
    others = {
        "another place and time": built(moved).id,
        "another order": built(shards[::-1]).id,
        "fewer": built(shards[:2]).id,
        "a filter": built(shards, filters=Filters(min_caption=2)).id,
        "repeats": built(shards, repeat=lambda sha256: 2).id,
    }
    assert others.pop("another place and time") == first
    assert len({first, *others.values()}) == 5
    assert built(shards, filters=Filters(min_side=3)).id == first, "a filter that leaves out nothing changes nothing"
    for policy in (False, True):
        indexed(tmp_path / "other.tar", tar([*pairs(2), ("x.jpg", jpeg(8))]), empty_captions=policy)
        others[policy] = built([f"{tmp_path}/other.tar"]).id
    assert others[False] != others[True]


def test_empty_shards_are_no_hindrance(tmp_path):
    empty = [shard(tmp_path / f"empty{i}.tar") for i in range(2)]
    fingerprint = json.dumps({"__metadata__": {"fingerprint": "{}"}}).encode()
    one = shard(tmp_path / "a.tar", ("a", 8, 8, "x"), extra=(("a.latents.safetensors", len(fingerprint).to_bytes(8, "little") + fingerprint),))
    snap = built([empty[0], one, empty[1]])
    assert [(shard.url, shard.samples) for shard in snap.shards] == [(one, 1)]
    assert snap.encodings == {"latents": {}}
    assert snap.span(0, "latents").bytes == len(fingerprint) + 8
    assert len(built(empty)) == 0


# ---- filters and weights -------------------------------------------------------------------------------------------------------------

SAMPLES = (("wide", 64, 16, "xx"), ("high", 16, 64, "xxxx"), ("small", 8, 8, "x" * 9), ("fine", 32, 32, "x" * 6))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(), "wide high small fine"),
        (Filters(min_side=16), "wide high fine"),
        (Filters(min_side=17), "fine"),
        (Filters(max_aspect=4.0), "wide high small fine"),
        (Filters(max_aspect=3.99), "small fine"),
        (Filters(min_caption=4), "high small fine"),
        (Filters(max_caption=6), "wide high fine"),
        (Filters(min_caption=3, max_caption=6, max_aspect=2), "fine"),
        (Filters(min_side=100), ""),
    ],
)
def test_filters(tmp_path, filters, kept):
    snap = built([shard(tmp_path / "a.tar", *SAMPLES)], filters=filters)
    assert [int(number) for number in snap.columns["key"]] == [key_number(key) for key in kept.split()]
    assert snap.head["filters"] == filters.json()


def test_quarantined_samples_are_left_out_of_their_own_shard_alone(tmp_path):
    one, other = shard(tmp_path / "a.tar", *SAMPLES), shard(tmp_path / "b.tar", *SAMPLES[::-1])
    sha256 = built([one]).shards[0].sha256
    snap = built([one, other], filters=Filters(without=frozenset({(sha256, key_number("high")), (sha256, key_number("no such"))})))
    assert [shard.samples for shard in snap.shards] == [3, 4]
    assert key_number("high") not in snap.columns["key"][:3].tolist()
    json.dumps(snap.head)


@settings(max_examples=40)
@given(data=st.data())
def test_filters_keep_what_python_would(data):
    count = data.draw(st.integers(0, 8))
    numbers = {name: data.draw(st.lists(st.integers(1, 2**32 - 1 if name == "caption_chars" else 5000), min_size=count, max_size=count))
               for name in ("width", "height", "caption_chars")}  # fmt: skip
    columns = {name: np.array(values, np.uint32) for name, values in numbers.items()} | {"key": np.arange(count, dtype=np.uint64)}
    filters = Filters(data.draw(st.integers(0, 5000)), data.draw(st.floats(0, 5)), data.draw(st.integers(0, 2**33)), data.draw(st.integers(0, 2**33)))
    expected = [
        min(w, h) >= filters.min_side
        and (not filters.max_aspect or max(w, h) <= filters.max_aspect * min(w, h))
        and filters.min_caption <= n and (not filters.max_caption or n <= filters.max_caption)
        for w, h, n in zip(*numbers.values(), strict=True)
    ]  # fmt: skip
    assert filters.mask("x", columns).tolist() == expected


# ---- what is refused -----------------------------------------------------------------------------------------------------------------


def test_the_same_shard_twice_is_refused(tmp_path):
    one, other = shard(tmp_path / "a.tar", *SAMPLES), str(tmp_path / "copy.tar")
    shutil.copy(one, other)
    indexed(Path(other))
    assert refusal(lambda: built([one, one])).startswith(f"{one} is given twice. Leave one out")
    assert f"{other} and {one} hold the same bytes. Leave one out" in refusal(lambda: built([one, other]))


def test_an_unindexed_shard_is_refused_with_the_command_to_run(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(pairs()))
    assert f"`python -m data.index {tmp_path}/a.tar`" in refusal(lambda: built([f"{tmp_path}/a.tar"]))


def test_shards_of_other_encodings_do_not_mix(tmp_path):
    def stored(name: str) -> tuple[tuple[str, bytes], ...]:
        head = json.dumps({"__metadata__": {"fingerprint": json.dumps({"vae": name})}}).encode()
        return (("a.latents.safetensors", len(head).to_bytes(8, "little") + head),)

    plain, one, other = (shard(tmp_path / f"{n}.tar", ("a", 8, 8, "x"), extra=extra) for n, extra in enumerate(((), stored("one"), stored("two"))))
    message = refusal(lambda: built([one, other]))
    assert f"{other} has other encodings than {one}. Encode both in the same way" in message
    assert "other encodings" in refusal(lambda: built([plain, one]))
    old = built([plain]).shards[0].sha256
    assert len(built([plain, one], repeat=lambda sha256: int(sha256 != old))) == 1, "a shard that is not used may be as it likes"


def test_a_shard_that_changed_is_refused_and_one_that_was_touched_is_not(tmp_path):
    path = shard(tmp_path / "a.tar", *SAMPLES)
    snap, content = built([path]), Path(path).read_bytes()
    assert snapshot.check(snap, TRANSPORT) is snap
    os.utime(path, ns=(7, 7))
    assert snapshot.check(snap, TRANSPORT) is snap
    Path(path).write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    assert "changed since it was indexed (its contents are others)" in refusal(lambda: snapshot.check(snap, TRANSPORT), ChangedError)
    Path(path).write_bytes(content + bytes(512))
    message = refusal(lambda: snapshot.check(snap, TRANSPORT), ChangedError)
    assert f"it has {len(content) + 512} bytes, not {len(content)}" in message
    Path(path).unlink()
    assert f"{path} does not exist" in refusal(lambda: snapshot.check(snap, TRANSPORT))


def test_a_served_shard_that_changed_is_refused(tmp_path):
    local = Path(shard(tmp_path / "served" / "a.tar", *SAMPLES))
    with Server(tmp_path / "served") as server:
        url = f"{server.url}/a.tar"
        assert index.index(url, TRANSPORT, str(tmp_path / "to")).samples == 4
        snap = built([url], folder=str(tmp_path / "to"))
        assert snapshot.check(snap, TRANSPORT) is snap
        local.write_bytes(tar(pairs()))
        assert f"{url} changed since it was indexed" in refusal(lambda: snapshot.check(snap, TRANSPORT), ChangedError)
        assert snapshot.check(snap, TRANSPORT, remote=False) is snap


@settings(max_examples=120)
@given(data=st.data())
def test_any_damage_to_a_snapshot_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    file, good = folder / "a.snapshot", folder / "good"
    if not good.exists():
        built(numbered(folder, 2)).write(str(good))
    content = good.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    file.write_bytes(content[:at] if cut else content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
    try:
        result = snapshot.read(str(file))
    except DataError:
        return
    assert not cut
    assert (result.id, result.shards) == (snapshot.read(str(good)).id, snapshot.read(str(good)).shards)  # JSON can be spelt in several ways


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({}, "is damaged (KeyError: 'shards')"),
        ({"shards": [{"place": "x"}]}, "is damaged (KeyError"),
        ({"shards": 3}, "is damaged (TypeError"),
        ({"shards": [], "encodings": {}, "id": "x"}, "its id is not that of its contents"),
    ],
)
def test_a_forged_snapshot_is_refused(tmp_path, head, expected):
    (tmp_path / "a.snapshot").write_bytes(table.encode(snapshot.FORM, snapshot.VERSION, head, {"key": np.arange(3, dtype="<u8")}))
    assert expected in refusal(lambda: snapshot.read(str(tmp_path / "a.snapshot")))


def test_other_files_are_no_snapshot(tmp_path):
    path = shard(tmp_path / "a.tar", *SAMPLES)
    for name, expected in (("a.tar.index", "is no dev2pro snapshot. Correct the path"), ("a.tar", "is damaged or no"), ("none", "No such file")):
        assert expected in refusal(lambda: snapshot.read(str(tmp_path / name)))  # noqa: B023
    snap = built([path])
    (tmp_path / "old").write_bytes(table.encode(snapshot.FORM, 0, snap.head, snap.columns))
    assert "is a dev2pro snapshot of version 0; this dev2pro reads version 1" in refusal(lambda: snapshot.read(str(tmp_path / "old")))
