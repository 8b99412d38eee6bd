"""Captions where people put them: beside the picture, in tables, in the names of folders."""

import json
import unicodedata
from pathlib import Path

import pytest

from data import sources
from data.folders.files import AS_IT_IS, Reading, survey
from data.folders.samples import find_samples
from data.shards import snapshot
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.shards import jpeg

Found = dict[str, tuple[str, ...]]


def write(folder: Path, **files: str) -> Path:
    """Files by name; a picture for the text ``.``."""
    for number, (name, text) in enumerate(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number) if text == "." else text.encode())
    return folder


def captions(folder: Path, reading: Reading = AS_IT_IS, table: Path | None = None) -> Found:
    return {sample.name: sample.captions for sample in find_samples(survey(folder, table is not None), reading, table)}


def refusal(folder: Path, reading: Reading = AS_IT_IS) -> str:
    with pytest.raises(DataError) as caught:
        captions(folder, reading)
    return str(caught.value)


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
PLACES: dict[str, tuple[dict[str, str], Found]] = {
    "caption": ({"a.jpg": ".", "a.caption": "x"}, {"a.jpg": ("x",)}),
    "TXT": ({"a.jpg": ".", "a.TXT": "x"}, {"a.jpg": ("x",)}),
    "whole name": ({"a.jpg": ".", "a.jpg.txt": "x", "b.c.JPG": ".", "b.c.Caption": "y"}, {"a.jpg": ("x",), "b.c.JPG": ("y",)}),
    "json": ({"a.jpg": ".", "a.json": '{"prompt": "x"}', "b.jpg": ".", "b.jpg.json": '["p", "q"]'}, {"a.jpg": ("x",), "b.jpg": ("p", "q")}),
    "twice the same": ({"a.jpg": ".", "a.txt": "x", "a.caption": " x\n"}, {"a.jpg": ("x",)}),
    "notes in a json": ({"a.jpg": ".", "a.txt": "x", "a.json": '{"width": 3}'}, {"a.jpg": ("x",)}),
    "NFD and NFC": ({f"{NFD}.jpg": ".", f"{NFC}.txt": "x"}, {f"{NFD}.jpg": ("x",)}),
    "NFD in a table": ({f"{NFD}.jpg": ".", "metadata.jsonl": json.dumps({"file_name": f"{NFC}.jpg", "text": "x"})}, {f"{NFD}.jpg": ("x",)}),
    "a table in a subfolder": (
        {"s/a.jpg": ".", "s/metadata.jsonl": '{"file_name": "a.jpg", "text": "x"}', "b.jpg": ".", "b.txt": "y"}, {"s/a.jpg": ("x",), "b.jpg": ("y",)},
    ),
    "semicolons": ({"a.jpg": ".", "metadata.csv": 'file_name;caption\na.jpg;"x; y, z"\n'}, {"a.jpg": ("x; y, z",)}),
    "tabs": ({"a.jpg": ".", "metadata.csv": "Image\tPrompt\na.jpg\tx, y\n"}, {"a.jpg": ("x, y",)}),
    "tsv": ({"a.jpg": ".", "Metadata.TSV": "path\tcaptions\na.jpg\tx\n"}, {"a.jpg": ("x",)}),
    "a mark before the columns": ({"a.jpg": ".", "metadata.csv": "\ufefffilename;text\r\na.jpg;x\r\n"}, {"a.jpg": ("x",)}),
    "lines": ({"a.jpg": ".", "a.txt": "x\n\ny"}, {"a.jpg": ("x\n\ny",)}),
    "numbered folders": ({"01_a/a.jpg": ".", "01_a/a.txt": "x", "2024_b/b.jpg": ".", "2024_b/b.txt": "y"},
        {"01_a/a.jpg": ("x",), "2024_b/b.jpg": ("y",)}),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), PLACES.values(), ids=PLACES)
def test_where_captions_are_found(tmp_path, files, expected):
    assert captions(write(tmp_path / "set", **files)) == expected


def test_a_table_that_is_given_goes_before_one_in_the_folder(tmp_path):
    folder = write(tmp_path / "set", **{"a.jpg": ".", "a.txt": "beside", "metadata.jsonl": '{"file_name": "a.jpg", "text": "inside"}'})
    assert captions(folder) == {"a.jpg": ("inside",)}
    assert survey(folder).left_out == {".txt": {"count": 1, "names": ["a.txt"], "why": "a table has the captions"}}
    (tmp_path / "t.csv").write_text("file_name,text\na.jpg,given\n")
    assert captions(folder, table=tmp_path / "t.csv") == {"a.jpg": ("given",)}


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "two captions": ({"a.jpg": ".", "a.txt": "x", "a.caption": "y"}, "a.jpg: a.caption and a.txt have different captions; take one away"),
    "a json without any": ({"a.jpg": ".", "a.json": '{"width": 3}'}, "a.jpg: its .json holds no caption"),
    "case": ({"photo 1.jpg": ".", "Photo 1.txt": "x"}, "into photo 1.txt beside it. There is Photo 1.txt, whose name or folder differs"),
    "marks": ({"a_1.jpg": ".", "a-1.txt": "x"}, "There is a-1.txt, whose name or folder differs"),
    "another folder": ({"images/a.jpg": ".", "captions/a.txt": "x"}, "There is captions/a.txt, whose name or folder differs"),
    "two tables": (
        {"a.jpg": ".", "metadata.csv": "file_name,text\na.jpg,x\n", "metadata.jsonl": '{"file_name": "a.jpg", "text": "y"}'},
        "metadata.jsonl have different captions; take one away",
    ),
    "two columns": ({"a.jpg": ".", "metadata.csv": "file,caption,prompt\na.jpg,x,y\n"}, "the columns caption and prompt differ; call"),
    "no columns": ({"a.jpg": ".", "metadata.csv": "a.jpg,x\n"}, "a.jpg: it is not in the table of captions"),
    "a class": ({"10_sks cat/a.jpg": "."}, "or take its folder's word 'sks cat': data.folder_captions=true (--folder-captions of data.pack)"),
    "repeats": ({"10_cat/a.jpg": ".", "10_cat/a.txt": "x"}, "10_cat: its name asks, in kohya's manner, to take its pictures 10 times an epoch. Say"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_unclear_is_refused_and_the_near_miss_is_named(tmp_path, files, expected):
    assert expected in refusal(write(tmp_path / "set", **files))


def test_links_to_nothing_are_refused(tmp_path):
    folder = write(tmp_path / "set", **{"a.jpg": ".", "a.txt": "x"})
    (folder / "b.jpg").symlink_to("/nowhere.jpg")
    assert "b.jpg: a link to a file that does not exist" in refusal(folder)


def test_choices_of_the_configuration(tmp_path):
    folder = write(tmp_path / "set", **{"10_sks cat/a.jpg": ".", "b.jpg": ".", "b.txt": "x\n\n y\r\nz"})
    assert captions(folder, Reading("several", "ignore", folder_captions=True)) == {"10_sks cat/a.jpg": ("sks cat",), "b.jpg": ("x", "y", "z")}
    digests = {survey(folder).digest(reading) for reading in (AS_IT_IS, Reading("several"), Reading(repeats="ignore"), Reading(folder_captions=True))}
    assert len(digests) == 4, "each is packed by itself"


def test_repeats_are_honoured_by_the_order_of_an_epoch(tmp_path):
    folder = write(tmp_path / "set", **{"3_cat/a.jpg": ".", "3_cat/a.txt": "x", "b.jpg": ".", "b.txt": "y"})
    transport = Transport(ReadConfig(cache=f"{tmp_path}/cache"))
    snap = sources.build_snapshot([str(folder)], "data.train", transport, Reading(repeats="honour"))
    assert [(shard.samples, shard.repeat) for shard in snap.shards] == [(1, 1), (1, 3)]
    assert sources.describe_notes(snap, "data.train", "white") == ["data.train: 1 picture is taken 3 times an epoch"]
    packed = snapshot.build([shard.url for shard in snap.shards], transport)
    assert packed.id == snap.id, "as tars, too"
    once = sources.build_snapshot([str(folder)], "data.train", transport, Reading(repeats="ignore"))
    assert [(shard.samples, shard.repeat) for shard in once.shards] == [(2, 1)]
