"""A run beside files that are none of its business, and what is told when its own files change."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data import index
from data.shards import snapshot, table
from data.sources import DataConfig, RunSnapshots
from data.storage.http import ChangedError
from data.storage.transport import ReadConfig
from dev2pro.errors import ConfigError, DataError
from tests.shards import called, encoded, jpeg, noise, tar


def pictures(folder: Path, first: int = 0, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def config(tmp_path) -> DataConfig:
    read = ReadConfig(workers=0, threads=2, retries=0, cache=f"{tmp_path}/cache")
    folders = [pictures(tmp_path / "train", 0), pictures(tmp_path / "held", 10)]
    return DataConfig(name="x", train=[str(folders[0])], heldout=[str(folders[1])], resolution=64, read=read)


def pin(config: DataConfig, out: Path, resuming: bool = False) -> RunSnapshots:
    snapshots = RunSnapshots(config, str(out), resuming=resuming)
    out.mkdir(exist_ok=True)
    snapshots.write_and_verify()
    return snapshots


UNRELATED = {
    "Thumbs.db": b"x", "0.npz": b"x", "0.safetensors": b"x", "notes.txt": b"x", "logs/run.json": b"{}", "desktop.ini": b"x", ".DS_Store": b"x",
    "run/artifact.json": b"{}", "run/previews/4.jpg": jpeg(99), "begun/config.json": b"{}", "begun/train.snapshot": b"", "begun/previews/0.jpg": b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", UNRELATED)
def test_files_of_others_hinder_no_run(config, tmp_path, name):
    first = pin(config, tmp_path / "out")
    for one in UNRELATED if name.startswith(("run", "begun")) else [name]:
        (tmp_path / "train" / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / one).write_bytes(UNRELATED[one])
    assert pin(config, tmp_path / "out", resuming=True).train.id == first.train.id
    assert pin(config, tmp_path / "new").train.id == first.train.id


def test_what_changed_is_named(config, tmp_path):
    pin(config, tmp_path / "out")
    for i in range(5, 10):
        (tmp_path / f"train/{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "train/0.txt").write_text("something else")
    (tmp_path / "train/1.jpg").unlink()
    with pytest.raises(ChangedError) as caught:
        pin(config, tmp_path / "out", resuming=True)
    assert "(its files are others: added 5.jpg, 6.jpg, 7.jpg and 2 more; removed 1.jpg, 1.txt; changed 0.txt)" in str(caught.value)


def test_a_folder_that_is_read_in_another_way_is_another_one(config, tmp_path):
    pin(config, tmp_path / "out")
    with pytest.raises(ChangedError, match="it is read in another way"):
        pin(replace(config, caption_lines="several"), tmp_path / "out", resuming=True)


def test_a_snapshot_that_identifies_all_files_still_works(config, tmp_path):
    pins = pin(config, tmp_path / "out")
    states = [(name, (tmp_path / "train" / name).stat()) for name in sorted(os.listdir(tmp_path / "train"))]
    listing = table.digest([(name, state.st_size, state.st_mtime_ns) for name, state in states])
    pins.train.head["folders"] = {str(tmp_path / "train"): listing}
    pins.train.write(f"{tmp_path}/out/train.snapshot")
    assert pin(config, tmp_path / "out", resuming=True).train.id == pins.train.id
    (tmp_path / "train/0.txt").write_text("something else")
    with pytest.raises(ChangedError, match=r"\(its files are others\)"):
        pin(config, tmp_path / "out", resuming=True)


@pytest.mark.parametrize("out", ["train/out", "train", "link/out", "held/deep/out", "other/../train/out"])
def test_an_out_in_a_folder_of_pictures_is_refused_before_anything_is_written(config, tmp_path, out, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "train")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"out=.* lies in .*/(train|held), a folder of data\.(train|heldout): .*Choose an out= elsewhere"):
        RunSnapshots(config, out, resuming=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_in_the_folder_of_a_run_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"train, a folder of data\.train, lies in out="):
        RunSnapshots(config, str(tmp_path), resuming=False)


def test_settings_of_folders_without_a_folder_are_refused(config, tmp_path):
    for role in ("train", "held"):
        number = 20 + len(role)
        (tmp_path / f"{role}.tar").write_bytes(tar([(f"{number}.jpg", jpeg(number)), (f"{number}.txt", b"x")]))
        assert called(index.main, tmp_path / f"{role}.tar", "--workers", "1")[0] == 0
    tars = replace(config, train=[f"{tmp_path}/train.tar"], heldout=[f"{tmp_path}/held.tar"])
    pin(tars, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"are about folders of pictures, and none is in data\.train or data\.heldout"):
        pin(replace(tars, repeats="ignore"), tmp_path / "out2")


# ---- extreme shapes ------------------------------------------------------------------------------------------------------------------


def shaped(folder: Path, **sizes: tuple[int, int]) -> None:
    for name, (width, height) in sizes.items():
        (folder / f"{name}.png").write_bytes(encoded(noise(width, width, height)))
        (folder / f"{name}.txt").write_text(name)


@pytest.mark.parametrize(
    ("sizes", "limits", "expected"),
    [
        ({"one": (1, 1)}, {}, r"data\.train: 1 picture is enlarged more than 8 times: one\.png \(64 times\)\. Take them out, lower data\.resolution"),
        ({"long": (4000, 20)}, {}, r"1 picture is cropped more than by 90\.0%: long\.png \(by 99\.5%\)\. Take them out, raise data\.aspect"),
        ({"a": (24, 24), "b": (23, 23)}, {"max_enlarge": 2.0}, r"5 pictures are enlarged more than 2 times: b\.png \(2\.78 times\), .*, \.\.\."),
        ({"wide": (200, 100)}, {"max_crop": 0.4}, r"1 picture is cropped more than by 40\.0%: wide\.png \(by 50\.0%\)"),
    ],
)
def test_pictures_beyond_the_limits_are_refused_by_name(config, tmp_path, sizes, limits, expected):
    shaped(tmp_path / "train", **sizes)
    with pytest.raises(DataError, match=expected):
        pin(replace(config, **limits), tmp_path / "out").stream(0, 2)


def test_extreme_pictures_within_the_limits_are_told(config, tmp_path, capsys):
    shaped(tmp_path / "train", one=(1, 1), long=(4000, 20))
    shaped(tmp_path / "held", tiny=(10, 10))
    pin(replace(config, max_enlarge=None, max_crop=None), tmp_path / "out").stream(0, 2)
    assert capsys.readouterr().out.splitlines() == [
        "data.train: 1 picture is enlarged more than 4 times: one.png (64 times)",
        "data.train: 1 picture is cropped more than by 50.0%: long.png (by 99.5%)",
        "data.heldout: 1 picture is enlarged more than 4 times: tiny.png (6.4 times)",
    ]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"max_enlarge": 0.5}, "data.max_enlarge=0.5 cannot work"), ({"max_crop": 2.0}, "data.max_crop=2.0 cannot work"),
        ({"max_crop": float("nan")}, "data.max_crop=nan cannot work"), ({"background": "nocolour"}, "data.background=nocolour is no colour"),
        ({"background": "#ffffff80"}, "is no colour"), ({"repeats": "10"}, "data.repeats=10 is unknown. Choose refuse, honour or ignore"),
        ({"caption_lines": "two"}, "data.caption_lines=two is unknown. Choose one or several"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(config, tmp_path, wrong, expected):
    with pytest.raises(ConfigError) as caught:
        pin(replace(config, **wrong), tmp_path / "out")
    assert expected in str(caught.value)


# ---- indexes without a sample --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members", [[], [("a.jpg", b"x"), ("a.txt", b"x")], [("a.txt", b"x")], [("a.jpg", jpeg())]], ids=["empty", "broken", "no picture", "no caption"]
)
def test_an_index_without_a_sample_is_no_success(tmp_path, members):
    (tmp_path / "a.tar").write_bytes(tar(members))
    (tmp_path / "good.tar").write_bytes(tar([("a.jpg", jpeg()), ("a.txt", b"x")]))
    for _ in range(2):  # the second time the index is there
        code, _, stderr = called(index.main, f"{tmp_path}/*.tar", "--workers", "1", "--report", tmp_path / "report.json")
        assert (code, json.loads((tmp_path / "report.json").read_text())["samples"]) == (3, 1)
        assert f"index: {tmp_path}/a.tar holds no sample that can be used" in stderr
    assert not snapshot.build([f"{tmp_path}/good.tar"], index.Transport(ReadConfig())).altered
