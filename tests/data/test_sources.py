"""The data of a run is fixed: folders and tars become snapshots; later changes are reported, later additions ignored."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data import index, sources
from data.shards import snapshot
from data.sources import DataConfig, RunSnapshots
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import ConfigError, DataError
from tests.shards import jpeg, pairs, tar


@pytest.fixture
def read(tmp_path) -> ReadConfig:
    return ReadConfig(workers=0, threads=2, retries=0, cache=f"{tmp_path}/cache")


def shard(path: Path, first: int = 0, count: int = 6) -> str:
    members = [one for i in range(first, first + count) for one in ((f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", b"picture %d" % i))]
    path.write_bytes(tar(members))
    assert not index.index(str(path), Transport(ReadConfig())).error
    return str(path)


def pictures(folder: Path, count: int = 3) -> str:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(jpeg(100 + i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return str(folder)


@pytest.fixture
def config(tmp_path, read) -> DataConfig:
    shard(tmp_path / "train-0.tar")
    return DataConfig(name="x", train=[f"{tmp_path}/train-*.tar"], heldout=[pictures(tmp_path / "held")], resolution=64, read=read)


def pin(config: DataConfig, out: Path, resuming: bool = False, is_main_process: bool = True) -> RunSnapshots:
    snapshots = RunSnapshots(config, str(out), resuming=resuming, is_main_process=is_main_process)
    out.mkdir(exist_ok=True)
    snapshots.write_and_verify()
    return snapshots


def test_tars_and_folders_are_pinned_in_the_run_s_folder(config, tmp_path):
    pins = pin(config, tmp_path / "out")
    assert (len(pins.train), len(pins.heldout)) == (6, 3)
    assert snapshot.read(f"{tmp_path}/out/train.snapshot").id == pins.train.id
    assert pins.parents() == {
        "data.train": (f"{tmp_path}/out/train.snapshot", pins.train.id), "data.heldout": (f"{tmp_path}/out/heldout.snapshot", pins.heldout.id),
    }  # fmt: skip
    assert [os.path.abspath(path) for path in pins.local_inputs()] == [f"{tmp_path}/held", f"{tmp_path}/train-0.tar"]


def test_a_shard_that_appears_is_ignored_by_a_run_that_has_begun(config, tmp_path):
    first = pin(config, tmp_path / "out")
    shard(tmp_path / "train-1.tar", 6)
    assert pin(config, tmp_path / "out", resuming=True).train.id == first.train.id
    assert len(pin(config, tmp_path / "out").train) == 12  # nothing was made yet, so the run may as well start with both


def test_other_ranks_take_what_the_first_has_written(config, tmp_path):
    first = pin(config, tmp_path / "out")
    shard(tmp_path / "train-1.tar", 6)
    assert pin(config, tmp_path / "out", is_main_process=False).train.id == first.train.id


def test_a_shard_that_changed_stops_a_run_that_has_begun(config, tmp_path):
    pin(config, tmp_path / "out")
    shard(tmp_path / "train-0.tar", 1)
    with pytest.raises(ChangedError, match=r"train-0\.tar changed since it was indexed"):
        pin(config, tmp_path / "out", resuming=True)


def test_a_copy_with_other_times_is_as_good(config, tmp_path):
    first = pin(config, tmp_path / "out")
    os.utime(tmp_path / "train-0.tar", (1, 1))
    assert pin(config, tmp_path / "out", resuming=True).train.id == first.train.id


def test_a_folder_that_changed_stops_a_run_that_has_begun_and_is_packed_anew_for_the_next(config, tmp_path):
    first = pin(config, tmp_path / "out")
    (tmp_path / "held/0.txt").write_text("something else")
    with pytest.raises(ChangedError, match=r"held changed .*its files are others"):
        pin(config, tmp_path / "out", resuming=True)
    assert pin(config, tmp_path / "other").heldout.id != first.heldout.id


def test_a_folder_is_packed_once(config, tmp_path):
    pin(config, tmp_path / "out")
    (packed,) = (tmp_path / "cache/packed").glob("*/000000.tar")
    before = packed.stat()
    pin(config, tmp_path / "other")
    assert packed.stat().st_mtime_ns == before.st_mtime_ns
    shutil.rmtree(tmp_path / "cache")
    assert len(pin(config, tmp_path / "out", resuming=False).heldout) == 3


def test_a_given_snapshot_is_used_as_it_is(config, tmp_path, read):
    snap = snapshot.build([f"{tmp_path}/train-0.tar"], Transport(read), filters=snapshot.Filters(min_caption=1))
    snap.write(f"{tmp_path}/pinned.snapshot")
    given = replace(config, train=[f"{tmp_path}/pinned.snapshot"])
    snapshots = pin(given, tmp_path / "out")
    assert snapshots.train.id == snap.id
    assert snapshots.parents()["data.train"] == (f"{tmp_path}/pinned.snapshot", snap.id)
    assert not (tmp_path / "out/train.snapshot").exists()
    with pytest.raises(ConfigError, match="Give it alone"):
        pin(replace(config, train=[f"{tmp_path}/pinned.snapshot", f"{tmp_path}/train-0.tar"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"crop": "left"}, "data.crop=left is unknown"), ({"aspect": 0.5}, "data.aspect=0.5 cannot work"),
        ({"aspect": 2.0, "resolution": 100}, "data.resolution=100 is no multiple of data.bucket_step=64"),
        ({"stored": ["thoughts"]}, "names thoughts. Choose among latents, text"),
        ({"stored": ["latents"], "flip": True}, "freezes crop and mirroring"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work(config, tmp_path, wrong, expected):
    with pytest.raises(ConfigError) as caught:
        pin(replace(config, **wrong), tmp_path / "out")
    assert expected in str(caught.value)


def test_stored_encodings_that_are_not_there(config, tmp_path):
    with pytest.raises(DataError, match=r"data\.stored=\['latents'\], but the shards of data\.train hold no latents"):
        pin(replace(config, stored=["latents"]), tmp_path / "out")


def test_nothing_and_what_is_not_indexed(config, tmp_path):
    (tmp_path / "new.tar").write_bytes(tar(pairs(2)))
    with pytest.raises(DataError, match=r"new\.tar is not indexed.*python -m data\.index"):
        pin(replace(config, train=[f"{tmp_path}/new.tar"]), tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.train: nothing matches .*nothing-\*\.tar"):
        pin(replace(config, train=[f"{tmp_path}/nothing-*.tar"]), tmp_path / "out")
    (tmp_path / "empty.tar").write_bytes(tar([]))
    assert not index.index(f"{tmp_path}/empty.tar", Transport(ReadConfig())).error
    with pytest.raises(DataError, match=r"data\.train=.* holds no samples"):
        pin(replace(config, train=[f"{tmp_path}/empty.tar"]), tmp_path / "out")
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError, match=r"data\.heldout: .*bad holds no pictures"):
        pin(replace(config, heldout=[f"{tmp_path}/bad"]), tmp_path / "out")
    shutil.copy(tmp_path / "train-0.tar", tmp_path / "heldout.tar")
    assert not index.index(f"{tmp_path}/heldout.tar", Transport(ReadConfig())).error
    with pytest.raises(DataError, match=r"train-0\.tar is in data\.train and in data\.heldout\. What is trained on cannot judge"):
        pin(replace(config, heldout=[f"{tmp_path}/heldout.tar"]), tmp_path / "out")


def test_the_stream_of_a_run_is_described(config, tmp_path):
    snapshots = pin(replace(config, aspect=2.0), tmp_path / "out")
    stream = snapshots.stream(0, 4)
    assert [len(batch.rows) for batch in stream.steps(0, 2, [range(4)])] == [4, 4]
    stats = sources.describe(stream)
    assert (stats["steps_per_epoch"], stats["left_out_per_epoch"], stats["quarantined"]) == (1, 2, 0)
    assert [bucket["samples"] for bucket in stats["buckets"]] == [6]
    assert stats["cropped_away"] == pytest.approx(0.25)  # pictures of 32x24 in a square
    assert sources.summary_line(stream) == (
        "data: 6 samples (64x64: 6), 25.0% of their area cropped away; 1 steps an epoch, 2 samples left out of each in turn"
    )
    json.dumps(stats)
    (reference,) = snapshots.reference(2)
    assert (len(reference.rows), reference.size) == (2, (64, 64))


def test_squares_are_the_middles_of_every_picture(config, tmp_path):
    batches = list(sources.squares(config.train, "x", 16))
    assert [row for batch in batches for row in batch.rows] == list(range(6))
    assert all(batch.pixels.shape[1:] == (16, 16, 3) for batch in batches)


def test_some_squares_are_those_of_all(config):
    source = sources.open_snapshot(config.train, "x", Transport(config.read))
    (some,), (every,) = sources.squares_of(source, [1, 4], 16), sources.squares(config.train, "x", 16)
    assert some.rows == [1, 4]
    assert some.pixels.equal(every.pixels[[1, 4]])


@pytest.mark.parametrize(("count", "most", "rows"), [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (5, 5, [0, 1, 2, 3, 4]), (0, 5, [])])
def test_a_spread_of_numbers(count, most, rows):
    assert sources.spread(count, most) == rows


def test_recorded_training_pictures_are_found_again_unless_they_are_others_or_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pictures(tmp_path / "style")
    recorded = {"train": [folder], "heldout": []}
    id = sources.open_snapshot([folder], "x", Transport(ReadConfig())).id
    assert len(sources.recorded_training(recorded, id)) == 3
    (tmp_path / "style/3.jpg").write_bytes(jpeg(7))
    (tmp_path / "style/3.txt").write_text("one more")
    with pytest.raises(DataError, match="other pictures now"):
        sources.recorded_training(recorded, id)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="nothing matches"):
        sources.recorded_training(recorded, id)
