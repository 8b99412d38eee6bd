import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data import pack
from data.folders.files import Reading, survey
from data.folders.samples import find_samples
from data.shards import sidecar
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.shards import ROOT, called, encoded, jpeg, noise


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def captioned(folder: Path, *names: str) -> Path:
    """Different pictures, each with a .txt."""
    return write(
        folder, {name: jpeg(i) for i, name in enumerate(names)} | {str(Path(name).with_suffix(".txt")): f"picture of {name}" for name in names}
    )


def read(out: Path) -> list[dict]:
    """The samples that plain webdataset reads. Checks that the indexes list all of them."""
    paths = sorted(str(path) for path in out.glob("*.tar"))
    result = [sample for path in paths for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert len(result) == sum(len(sidecar.read(path, Transport(ReadConfig()))) for path in paths)
    return result


def captions_of(folder: Path, table: Path | None = None) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in find_samples(survey(folder, table is not None), Reading(), table)}


def refusal(folder: Path, table: Path | None = None, out: Path | None = None) -> str:
    """The error message. Checks that no output was left, not even a partial one."""
    out = out or folder.parent / "out"
    with pytest.raises(DataError) as caught:
        pack.pack(str(folder), str(out), str(table) if table else None)
    assert list(folder.parent.glob("*.partial")) == []
    return str(caught.value)


# ---- what is packed ------------------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_shards_that_plain_webdataset_reads(tmp_path):
    image = noise()
    files = {
        "b.JPG": encoded(image, "JPEG"), "b.txt": " a jpeg \n", "a/c.webp": encoded(image, "WEBP"), "a/c.txt": "webp", "a/d.e.png": encoded(image),
        "a/d.e.txt": "png", "f.jpeg": jpeg(7), "f.txt": "naïve", "notes.md": "x", ".hidden.jpg": b"x", ".git/g.jpg": b"x", "a/.h/i.jpg": b"x",
        "__MACOSX/._b.JPG": b"x", "lonely.txt": "a caption of nothing", "ä 日本#;?.png": encoded(noise(9)), "ä 日本#;?.txt": "odd",
    }  # fmt: skip
    assert pack.pack(str(write(tmp_path / "set", files)), str(tmp_path / "out")) == [f"{tmp_path}/out/000000.tar"]
    samples = {sample["__key__"]: sample for sample in read(tmp_path / "out")}
    assert {key: sample["txt"].decode() for key, sample in samples.items()} == {
        "a/c": "webp", "a/d_e": "png", "b": "a jpeg", "f": "naïve", "ä 日本#;?": "odd",
    }  # fmt: skip
    assert samples["a/d_e"]["png"] == files["a/d.e.png"]
    assert samples["b"]["jpg"] == files["b.JPG"]
    assert samples["f"]["jpg"] == files["f.jpeg"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["000000.tar", "000000.tar.index"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "set"]


def test_full_shards_are_closed(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", *(f"{i}.jpg" for i in range(7)))
    monkeypatch.setattr(pack, "SHARD_SAMPLES", 3)
    assert [Path(path).name for path in pack.pack(str(folder), str(tmp_path / "out"))] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [sample["__key__"] for sample in read(tmp_path / "out")] == [str(i) for i in range(7)]
    write(folder, {f"{i}.jpg": jpeg(i, 128, 128) for i in range(7)})  # of more bytes than tarfile writes at a time
    monkeypatch.setattr(pack, "SHARD_BYTES", 20_000)
    assert len(pack.pack(str(folder), str(tmp_path / "by bytes"))) == 7
    assert [sample["__key__"] for sample in read(tmp_path / "by bytes")] == [str(i) for i in range(7)]


def test_the_same_folder_gives_the_same_bytes(tmp_path, monkeypatch):
    one = captioned(tmp_path / "one", "a.jpg", "sub/b.jpg", "c.jpg")
    other = captioned(tmp_path / "other", "c.jpg", "sub/b.jpg", "a.jpg")
    for name, content in {file.relative_to(one): file.read_bytes() for file in one.rglob("*.*")}.items():
        (other / name).write_bytes(content)
        os.utime(other / name, ns=(1, 1))
        (other / name).chmod(0o600)
    pack.pack(str(one), str(tmp_path / "1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "somebody")
    pack.pack("other", "2", workers=3)
    pack.pack("one", "deep/3", workers=2)
    shards = [(tmp_path / out / "000000.tar").read_bytes() for out in ("1", "2", "deep/3")]
    assert shards[0] == shards[1] == shards[2]


TABLES = {
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "one\u2028line"}\n\n{"file_name": "./sub/b.jpg", "text": ["two", " three "], "more": 1}\n',
    "metadata.csv": '\ufefffile_name,text,more\na.jpg,"one, and more",x\nsub/b.jpg,two,y\nsub/b.jpg,"three\n""quoted""",y\n',
}


@pytest.mark.parametrize("name", [*TABLES, "metadata.parquet"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the folder", "given"])
def test_captions_of_a_table(tmp_path, name, inside):
    folder = captioned(tmp_path / "set", "a.jpg", "sub/b.jpg")
    table = (folder if inside else tmp_path) / name
    if name.endswith("parquet"):
        rows = {"file_name": ["a.jpg", "sub/b.jpg"], "text": [["one"], ["two", "three"]], "n": [1, 2]}
        pyarrow.parquet.write_table(pyarrow.table(rows), table)
    else:
        table.write_text(TABLES[name])
    third = {"metadata.csv": 'three\n"quoted"'}.get(name, "three")
    first = {"metadata.csv": "one, and more", "metadata.jsonl": "one\u2028line"}.get(name, "one")
    assert captions_of(folder, None if inside else table) == {"a.jpg": (first,), "sub/b.jpg": ("two", third)}
    pack.pack(str(folder), str(tmp_path / "out"), None if inside else str(table))
    assert [sample.get("txt", b"").decode() for sample in read(tmp_path / "out")] == [first, ""]
    assert json.loads(read(tmp_path / "out")[1]["json"]) == {"captions": ["two", third]}


# ---- what is refused: everything at once, each with its cure -------------------------------------------------------------------------


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    files = {
        "no.jpg": jpeg(20),
        "blank.jpg": jpeg(21),
        "blank.txt": " ",
        "latin.jpg": jpeg(22),
        "latin.txt": "naïve".encode("latin-1"),
        "a.b.jpg": jpeg(23),
        "a.b.txt": "x",
        "a_b.jpg": jpeg(24),
        "a_b.txt": "x",
        "two.jpg": jpeg(25),
        "two.png": encoded(noise(5)),
        "two.txt": "x",
    }
    folder = write(captioned(tmp_path / "set", "good.jpg"), files)  # fmt: skip
    (folder / "linked").symlink_to(tmp_path)
    message = refusal(folder).splitlines()
    assert message[0] == f"{folder} cannot be packed; mend these 6, or move them away:"
    assert message[1:] == [
        f"  {folder}/blank.jpg: its caption is empty",
        f"  {folder}/latin.jpg: its caption is not UTF-8 text ('utf-8' codec can't decode byte 0xef in position 2: invalid continuation byte)",
        f"  {folder}/no.jpg: it has no caption; write what it shows into no.txt beside it",
        f"  {folder}/linked: a link to a folder, which is not followed",
        f"  {folder}/a_b.jpg: {folder}/a.b.jpg has the same (the name in a shard, where dots become _ and the ending does not count)",
        f"  {folder}/two.png: {folder}/two.jpg has the same (the name in a shard, where dots become _ and the ending does not count)",
    ]


def test_every_picture_is_decoded_before_anything_is_written(tmp_path):
    good = jpeg(9, 64, 64)
    files = {"cut.jpg": good[: len(good) // 2], "words.png": b"no picture", "tga.jpg": encoded(Image.new("L", (8, 8)), "TGA")}
    folder = write(tmp_path / "set", files | {"twice.jpg": jpeg(0), "\x1b[31m.jpg": b"x"})
    captioned(folder, "good.jpg")
    write(folder, {str(Path(name).with_suffix(".txt")): "x" for name in (*files, "twice.jpg", "\x1b[31m.jpg")})
    message = refusal(folder).splitlines()
    assert message[0].endswith("mend these 5, or move them away:")
    assert [line.removeprefix(f"  {folder}/").partition(":")[0] for line in message[1:]] == [
        "\\x1b[31m.jpg", "cut.jpg", "tga.jpg", "words.png", "twice.jpg"
    ]  # fmt: skip
    assert "its pixels cannot be decoded" in message[2]
    assert message[5].endswith(f"{folder}/good.jpg has the same (every byte of the picture)")


def test_a_long_list_is_cut(tmp_path):
    message = refusal(write(tmp_path / "set", {f"{i:03d}.jpg": b"x" for i in range(100)})).splitlines()
    assert (len(message), message[-1]) == (32, "  ... and 70 more")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "file_name,words\na.jpg,x\n", "(row 1: KeyError, 'text')"),
        ("t.csv", "file_name,text\na.jpg,a cat, on a mat\n", "(row 1: ValueError, more values than columns: a caption with commas needs quotes"),
        ("t.csv", "file_name,text\na.jpg,x\nb.jpg," + "x" * 200_000, "(row 2: Error, field larger than field limit"),
        ("t.csv", b"file_name,text\na.jpg,na\xefve\n", "UnicodeDecodeError"),
        ("t.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file_name"', "(row 2: JSONDecodeError"),
        ("t.jsonl", '["a.jpg", "x"]', "(row 1: TypeError"),
        ("t.jsonl", '{"file_name": "a.jpg", "text": 3}', "a text that is neither words nor a list of them, 3"),
        ("t.jsonl", '{"file_name": "a.jpg", "text": {"en": "x"}}', "a text that is neither words nor a list of them"),
        ("t.jsonl", '{"file_name": null, "text": "x"}', "(row 1: TypeError"),
        ("t.jsonl", "[" * 100_000, "(row 1: RecursionError"),
        ("t.parquet", "no parquet", "(row 1: ArrowInvalid"),
        ("t.txt", "a.jpg x", "can be .csv, .jsonl or .parquet"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_names_the_row(tmp_path, name, content, expected):
    folder = captioned(tmp_path / "set", "a.jpg")
    write(tmp_path, {name: content})
    message = refusal(folder, tmp_path / name)
    assert message.startswith(f"{tmp_path}/{name} is no table of captions (row ")
    assert expected in message
    assert message.endswith("It needs the columns file_name and text, and can be .csv, .jsonl or .parquet.")


def test_rows_without_a_picture_and_pictures_without_a_row(tmp_path):
    folder = captioned(tmp_path / "set", "a.jpg", "b.jpg", "c.jpg")
    rows = [{"file_name": name, "text": text} for name, text in (("a.jpg", "x"), ("gone.jpg", "x"), ("sub\\b.jpg", "x"), ("c.jpg", None))]
    write(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, rows))})
    assert refusal(folder, tmp_path / "t.jsonl").splitlines()[1:] == [
        f"  {folder}/b.jpg: it is not in the table of captions",
        f"  {folder}/c.jpg: its caption is empty",
        f"  {tmp_path}/t.jsonl: gone.jpg is no picture in {folder}",
        f"  {tmp_path}/t.jsonl: sub\\b.jpg is no picture in {folder}",
    ]


def test_no_folder_no_table_and_a_folder_without_pictures(tmp_path):
    assert refusal(tmp_path / "none").startswith(f"{tmp_path}/none is no folder")
    write(tmp_path, {"file": b"x", "set/a.tga": b"x"})
    assert refusal(tmp_path / "file").startswith(f"{tmp_path}/file is no folder")
    assert f"{tmp_path}/set holds no pictures (jpg, jpeg, png, webp, " in refusal(tmp_path / "set")
    assert refusal(tmp_path / "set", tmp_path / "t.csv") == f"{tmp_path}/t.csv cannot be read: No such file or directory. Correct the path."


def test_an_out_that_holds_something_is_left_alone(tmp_path):
    folder = captioned(tmp_path / "set", "a.jpg")
    write(tmp_path, {"out/old.tar": b"x", "file": b"x"})
    for out in ("out", "file"):
        assert refusal(folder, out=tmp_path / out) == f"{tmp_path}/{out} exists and is no empty folder. Choose another one, or remove it."
    (tmp_path / "empty").mkdir()
    assert pack.pack(str(folder), str(tmp_path / "empty")) == [f"{tmp_path}/empty/000000.tar"]


def test_an_out_that_another_process_made_meanwhile_is_left_alone(tmp_path, monkeypatch):
    really = pack._write
    monkeypatch.setattr(pack, "_write", lambda *given: [*really(*given), *map(str, [write(tmp_path, {"out/000000.tar": b"x"})])])
    assert "out exists and is no empty folder" in refusal(captioned(tmp_path / "set", "a.jpg"))
    assert (tmp_path / "out" / "000000.tar").read_bytes() == b"x"


def test_a_picture_that_would_be_lost_in_a_shard_is_told(tmp_path):
    folder = captioned(tmp_path / "set", "a.jpg", "__skipped__/b.jpg")  # webdataset takes this for its own
    assert "A shard lost samples" in refusal(folder)
    assert not (tmp_path / "out").exists()


# ---- as a command --------------------------------------------------------------------------------------------------------------------


def test_the_command_says_how_to_go_on_and_what_was_left_out(tmp_path, monkeypatch):
    folder = write(captioned(tmp_path / "set", "a.jpg"), {"b.tga": b"x", "c.NPZ": b"x", "d.npz": b"x", "README": b"x"})
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = called(pack.main, folder, "out")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [
        "pack: left out: 2 .npz (c.NPZ, d.npz), 1 README (README), 1 .tga (b.tga; pictures of a kind that is not read; convert them to PNG)",
        "pack: 1 indexed shards in out. Train on them with \"data.train=['out/*.tar']\"",
    ]
    assert len(read(tmp_path / "out")) == 1
    assert called(pack.main, folder, "out") == (3, "", "pack: out exists and is no empty folder. Choose another one, or remove it.\n")


STOPPING = "lambda *x: (os.kill(os.getpid(), signal.SIGSTOP), write(*x))"
STOPS_ITSELF = f"import os, signal; from data import pack; write = pack._write_shard; pack._write_shard = {STOPPING}; pack.main()"


def test_interrupted_it_leaves_nothing_and_says_so(tmp_path):
    folder = captioned(tmp_path / "set", "a.jpg", "b.jpg")
    child = subprocess.Popen([sys.executable, "-c", STOPS_ITSELF, folder, tmp_path / "out"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])  # it is about to write the first shard
    assert list(tmp_path.glob("out.*.partial"))
    child.terminate()
    child.send_signal(signal.SIGCONT)
    assert (child.communicate(timeout=300)[1], child.returncode) == ("pack: interrupted. Nothing is half done; run the same command again.\n", 130)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_killed_it_leaves_no_out_and_is_no_hindrance(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", *(f"{i:03d}.jpg" for i in range(60)))
    monkeypatch.setattr(pack, "SHARD_SAMPLES", 1)
    child = multiprocessing.get_context("fork").Process(target=pack.pack, args=(str(folder), str(tmp_path / "out")))
    child.start()
    while not list(tmp_path.glob("out.*.partial/*.tar")):
        assert child.is_alive(), "it should have taken longer"
        time.sleep(0.002)
    child.kill()
    child.join()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    pack.pack(str(folder), str(tmp_path / "out"))
    assert len(read(tmp_path / "out")) == 60
