import io
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data import pictures
from data.pictures import DataConfig, Picture
from dev2pro.errors import DataError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int = 8, height: int = 8, colour: object = RED) -> bytes:
    return encoded(Image.new("RGB", (width, height), colour))


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_folder(path: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def refusal(work) -> str:
    """What a DataError says: one paragraph."""
    with pytest.raises(DataError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def told(found: list[Picture]) -> list[tuple[str, str]]:
    return [(p.key, p.caption) for p in found]


# ---- what is found -----------------------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_tar_hold_the_same_pictures(tiny_data):
    folder, shard = (pictures.read([str(tiny_data / name)], "data.train") for name in ("folder", "shard.tar"))
    assert told(folder) == told(shard)
    assert len(folder) == 6
    for one, other in zip(folder, shard, strict=True):
        assert one.encoded == other.encoded
        assert (one.pixels(16) == other.pixels(16)).all()
    assert [p.place for p in folder][:1] == [f"{tiny_data}/folder/0000.png"]
    assert [p.place for p in shard][:1] == [f"{tiny_data}/shard.tar:0000.png"]


def test_every_kind_of_picture_in_folders_below_folders(tmp_path):
    image = Image.new("RGB", (8, 8), RED)
    files = {
        "b.JPG": encoded(image, "JPEG"), "b.txt": b"jpeg", "a/c.webp": encoded(image, "WEBP"), "a/c.txt": b"webp",
        "a/d.e.png": png(), "a/d.e.txt": b" png \n", "f.jpeg": encoded(image, "JPEG"), "f.txt": "jpeg, naïve".encode(),
        "notes.md": b"no picture", "lonely.txt": b"a caption of nothing",
    }  # fmt: skip
    found = pictures.read([write_folder(tmp_path / "set", files)], "data.train")
    assert sorted(told(found)) == [("a/c", "webp"), ("a/d.e", "png"), ("b", "jpeg"), ("f", "jpeg, naïve")]
    assert all(abs(p.pixels(4)[0] - 1).max() < 0.05 for p in found)


def test_tars_by_glob_and_braces_in_the_order_given(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"train-{number:03d}.tar", {f"{number}.png": png(), f"{number}.txt": b"x"})

    def keys(*sources: str) -> list[str]:
        return [p.key for p in pictures.read([f"{tmp_path}/{s}" for s in sources], "data.train")]

    assert keys("train-*.tar") == ["0", "1", "2"]
    assert keys("train-{000..001}.tar") == ["0", "1"]
    assert keys("train-{002,000}.tar", "train-001.tar") == ["2", "0", "1"]


def test_members_of_a_sample_in_any_order_with_others_beside_them(tmp_path):
    members = {"a.txt": b"first", "a.json": b"{}", "a.png": png(), "deep/b.PNG": png(), "deep/b.txt": b"second"}
    assert told(pictures.read([write_tar(tmp_path / "a.tar", members)], "data.train")) == [("a", "first"), ("deep/b", "second")]


def test_sources_are_every_tar_and_folder_by_role(tmp_path):
    for name in ("one", "two", "held"):
        write_folder(tmp_path / name, {f"{name}.png": png(), f"{name}.txt": b"x"})
    for number in range(2):
        write_tar(tmp_path / f"t{number}.tar", {f"{number}.png": png(), f"{number}.txt": b"x"})
    config = DataConfig(name="x", train=[f"{tmp_path}/t*.tar", f"{tmp_path}/{{one,two}}"], heldout=[f"{tmp_path}/held"], resolution=8)
    places = [str(tmp_path / name) for name in ("t0.tar", "t1.tar", "one", "two")]
    assert config.sources() == {f"data.train {p}": p for p in places} | {f"data.heldout {tmp_path}/held": f"{tmp_path}/held"}
    train, held_out = config.read()
    assert ([p.key for p in train], [p.key for p in held_out]) == (["0", "1", "one", "two"], ["held"])


@pytest.mark.parametrize("name", ["a b.tar", "a#b.tar", "a?b.tar", "a%41b.tar", "a::b.tar", "a&b;c=d+e.tar", "ä-日本.tar", "pipe:cat.tar"])
def test_names_that_other_programs_read_as_syntax(tmp_path, name):
    write_tar(tmp_path / name, {"0.png": png(), "0.txt": b"x"})
    assert [p.key for p in pictures.read([str(tmp_path / name)], "data.train")] == ["0"]


def test_webdataset_s_own_writer_is_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "set.tar")) as shard:
        shard.write({"__key__": "a", "png": np.zeros((8, 8, 3), np.uint8), "txt": "a caption"})
    (found,) = pictures.read([str(tmp_path / "set.tar")], "data.train")
    assert found.caption == "a caption"
    assert (found.pixels(8) == -1).all()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2", "RANK": "1"}, {"NUM_WORKERS": "2", "WORKER": "1"}])
def test_every_process_reads_everything(tiny_data, tmp_path, monkeypatch, variables):
    shutil.copy(tiny_data / "shard.tar", tmp_path / "0.tar")
    write_tar(tmp_path / "1.tar", {"other.png": png(), "other.txt": b"x"})
    alone = told(pictures.read([f"{tmp_path}/*.tar"], "data.train"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert told(pictures.read([f"{tmp_path}/*.tar"], "data.train")) == alone
    assert len(alone) == 7


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_nothing_matches(tmp_path):
    for source in ("nothing.tar", "train-*.tar", "train-{0..3}.tar", "train-{0..3.tar"):
        said = refusal(lambda: pictures.read([f"{tmp_path}/{source}"], "data.heldout"))  # noqa: B023
        assert said.startswith("data.heldout")
        assert source in said


@pytest.mark.parametrize("sources", [[], ["empty"], ["empty", "empty.tar"]])
def test_nothing_is_in_there(tmp_path, sources):
    write_folder(tmp_path / "empty", {"notes.md": b"no picture"})
    write_tar(tmp_path / "empty.tar", {})
    said = refusal(lambda: pictures.read([f"{tmp_path}/{s}" for s in sources], "data.train"))
    assert said.startswith("data.train=")
    assert "holds no pictures" in said
    assert all(s in said for s in sources)


def test_a_missing_caption(tmp_path):
    folder = write_folder(tmp_path / "set", {"a.png": png(), "a.txt": b"x", "b.png": png()})
    said = refusal(lambda: pictures.read([folder], "data.train"))
    assert f"{folder}/b.png has no caption" in said
    assert f"{folder}/b.txt" in said
    tar = write_tar(tmp_path / "set.tar", {"a.png": png(), "a.txt": b"x", "b.png": png()})
    assert f"{tar}:b.png has no caption" in refusal(lambda: pictures.read([tar], "data.train"))


def test_a_caption_without_a_picture_in_a_tar(tmp_path):
    tar = write_tar(tmp_path / "set.tar", {"a.png": png(), "a.txt": b"x", "b.txt": b"y"})
    assert f"{tar}:b has no picture" in refusal(lambda: pictures.read([tar], "data.train"))
    dotted = write_tar(tmp_path / "dots.tar", {"v1.5.png": png(), "v1.5.txt": b"y"})
    assert "a key ends at its first dot" in refusal(lambda: pictures.read([dotted], "data.train"))


@pytest.mark.parametrize(
    ("caption", "said"), [(b"", "empty"), (b" \n\t", "empty"), ("naïve".encode("latin-1"), "not UTF-8")], ids=["empty", "blank", "latin-1"]
)
def test_a_caption_that_says_nothing_readable(tmp_path, caption, said):
    files = {"a.png": png(), "a.txt": caption}
    folder, tar = write_folder(tmp_path / "set", files), write_tar(tmp_path / "set.tar", files)
    for source, place in ((folder, f"{folder}/a.png"), (tar, f"{tar}:a.png")):
        assert re.search(rf"The caption of {re.escape(place)} .*{said}", refusal(lambda: pictures.read([source], "x")))  # noqa: B023


def test_the_same_key_twice(tmp_path):
    one = write_tar(tmp_path / "one.tar", {"a.png": png(), "a.txt": b"x"})
    two = write_folder(tmp_path / "two", {"a.png": png(), "a.txt": b"x"})
    said = refusal(lambda: pictures.read([one, two], "data.train"))
    assert f"{two}/a.png" in said
    assert f"{one}:a.png" in said
    assert "same key, a" in said
    assert "data.train" in said
    assert "same key, a" in refusal(lambda: pictures.read([write_folder(tmp_path / "three", {"a.png": png(), "a.jpg": png(), "a.txt": b"x"})], "x"))
    assert "twice.tar" in refusal(lambda: pictures.read([_tar_with_a_double(tmp_path / "twice.tar")], "x"))


def _tar_with_a_double(path: Path) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.png", png()), ("a.txt", b"x"), ("a.png", png())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def damaged_header(good: bytes) -> bytes:
    """The header of the third member has a wrong checksum."""
    third = next(i for i in range(512, len(good), 512) if good[i : i + 5] == b"b.png")
    return good[: third + 20] + b"\xff" + good[third + 21 :]


DAMAGES = {
    "no tar": lambda good: b"this is no tar at all" * 100,
    "empty": lambda good: b"",
    "cut off in the first picture": lambda good: good[:700],
    "cut off in a later picture": lambda good: good[: good.index(b"b.png") + 600],
    "cut off between two samples": lambda good: good[: good.index(b"c.png")],
    "a damaged header": damaged_header,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tar_is_an_error_and_never_a_smaller_set(tmp_path, damage):
    members = {name: content for key in "abc" for name, content in ((f"{key}.png", encoded(_noise())), (f"{key}.txt", key.encode()))}
    tar = tmp_path / "set.tar"
    write_tar(tar, members)
    tar.write_bytes(damage(tar.read_bytes()))
    assert str(tar) in refusal(lambda: pictures.read([str(tar)], "data.train"))


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert f"{tmp_path}/a.png cannot be read as a WebDataset tar" in refusal(lambda: pictures.read([f"{tmp_path}/*.png"], "data.train"))


def _noise(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
