"""Pictures of every kind in folders and tars: read, altered or left out, and always said."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data import index, pack, sources
from data.folders.files import survey
from data.shards import pictures, sidecar
from data.shards.pictures import FRAMES, TRANSPARENT
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.shards import called, encoded, indexed, noise, tar

RED, MAGENTA, TEAL = (255, 0, 0), (255, 0, 255), (0, 128, 128)


def write(folder: Path, files: dict[str, bytes]) -> str:
    """The pictures, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"about {name}")
    return str(folder)


def members(shard: str) -> dict[str, bytes]:
    """Name -> bytes of the pictures in a shard."""
    samples = webdataset.WebDataset(shard, shardshuffle=False)
    return {f"{sample['__key__']}.{end}": sample[end] for sample in samples for end in sample if end in pictures.SUFFIXES}


KINDS = {
    "k0.avif": "AVIF", "k1.gif": "GIF", "k2.bmp": "BMP", "k3.tiff": "TIFF", "k4.jfif": "JPEG", "k5.JPE": "JPEG", "k6.tif": "TIFF", "k7.apng": "PNG",
}  # fmt: skip


def test_every_kind_is_packed_with_its_own_bytes_and_the_suffix_of_its_kind(tmp_path):
    files = {name: encoded(noise(seed), form) for seed, (name, form) in enumerate(KINDS.items())}
    (shard,) = pack.pack(write(tmp_path / "set", files), str(tmp_path / "out"))
    names = ["k0.avif", "k1.gif", "k2.bmp", "k3.tiff", "k4.jpg", "k5.jpg", "k6.tiff", "k7.png"]
    assert members(shard) == dict(zip(names, files.values(), strict=True))
    for seed, content in enumerate(files.values()):
        assert np.abs(np.asarray(pictures.upright(content)).astype(int) - np.asarray(noise(seed))).mean() < 60


def test_a_tar_of_every_kind_is_indexed(tmp_path):
    content = tar([one for name, form in KINDS.items() for one in ((name, encoded(noise(), form)), (name[:2] + ".txt", b"x"))])
    assert indexed(tmp_path / "a.tar", content).samples == len(KINDS)


@pytest.mark.parametrize(
    ("name", "form", "kept"),
    [("a.jpg", "PNG", "a.jpg"), ("a.png", "WEBP", "a.png"), ("a.jpg", "GIF", "a.gif"), ("a.bmp", "JPEG", "a.jpg")],
)
def test_a_picture_with_the_suffix_of_another_kind_works(tmp_path, name, form, kept):
    (shard,) = pack.pack(write(tmp_path / "set", {name: encoded(noise(), form)}), str(tmp_path / "out"))
    assert list(members(shard)) == [kept]


def test_what_is_left_out_is_named_with_its_cure(tmp_path, monkeypatch):
    for suffix in pictures.PLUGINS:
        monkeypatch.delitem(pictures.SUFFIXES, suffix, raising=False)
    folder = write(tmp_path / "set", {"a.png": encoded(noise()), "h.heic": b"x", "i.HEIC": b"x", "j.jxl": b"x", "k.psd": b"x", ".l.png": b"x"})
    (tmp_path / "set/Thumbs.db").write_bytes(b"x")
    code, stdout, _ = called(pack.main, folder, tmp_path / "out", "--workers", "1")
    assert code == 0
    assert stdout.startswith(
        "pack: left out: 4 .txt (h.txt, i.txt, j.txt, ...; of no picture that is read), "
        "2 .heic (h.heic, i.HEIC; read only with pillow-heif: pip install pillow-heif), 1 .db (Thumbs.db), "
        "1 .jxl (j.jxl; read only with pillow-jxl-plugin: pip install pillow-jxl-plugin), "
        "1 .psd (k.psd; pictures of a kind that is not read; convert them to PNG), 1 hidden (.l.png)\n"
    )
    with pytest.raises(DataError, match=r"holds no pictures .* Left out: 1 \.heic \(h\.heic; read only with pillow-heif"):
        pack.pack(write(tmp_path / "heic", {"h.heic": b"x"}), str(tmp_path / "none"))


def test_a_kind_that_needs_a_package_is_named_in_a_tar_and_indexed_once_it_is_there(tmp_path, monkeypatch):
    for suffix in pictures.PLUGINS:
        monkeypatch.delitem(pictures.SUFFIXES, suffix, raising=False)
    path = tmp_path / "a.tar"
    outcome = indexed(path, tar([("a.heic", encoded(noise())), ("a.txt", b"x"), ("b.png", encoded(noise())), ("b.txt", b"x")]))
    assert [bad["reason"] for bad in outcome.rejected] == ["a .heic is read only where pillow-heif is installed (pip install pillow-heif)"]
    monkeypatch.setitem(pictures.SUFFIXES, "heic", "heic")
    again = indexed(path)
    assert (again.reused, again.samples) == (False, 2)


HALF = Image.fromarray(np.concatenate([np.full((16, 8, 4), (*RED, 255), np.uint8), np.full((16, 8, 4), (*MAGENTA, 0), np.uint8)], axis=1))


def palette() -> bytes:
    image = HALF.convert("RGB").quantize(4)
    return encoded(image, transparency=image.getpixel((15, 0)))


TRANSPARENT_PICTURES: dict[str, Callable[[], bytes]] = {
    "RGBA PNG": lambda: encoded(HALF), "WebP": lambda: encoded(HALF, "WEBP", lossless=True, exact=True), "TIFF": lambda: encoded(HALF, "TIFF"),
    "palette with tRNS": palette, "RGB with tRNS": lambda: encoded(HALF.convert("RGB"), transparency=MAGENTA),
    "GIF": lambda: encoded(HALF.convert("RGB").quantize(4), "GIF", transparency=HALF.convert("RGB").quantize(4).getpixel((15, 0))),
    "LA": lambda: encoded(HALF.convert("LA")),
}  # fmt: skip


@pytest.mark.parametrize("make", TRANSPARENT_PICTURES.values(), ids=TRANSPARENT_PICTURES)
def test_hidden_colours_are_not_trained_on(make):
    content = make()
    assert pictures.alterations(content) == (TRANSPARENT,)
    for background, colour in ((pictures.WHITE, (255, 255, 255)), ("teal", TEAL)):
        image = pictures.upright(content, background=background)
        assert (image.mode, image.getpixel((15, 15))) == ("RGB", colour)
        assert image.getpixel((0, 0)) in (RED, (76, 76, 76))


def test_sixteen_bit_grey_with_one_transparent_value():
    values = np.array([[0, 0x8000, 0x8001, 65535]], np.uint16)
    content = encoded(Image.fromarray(values))
    chunk = b"\0\0\0\2tRNS\x80\0" + zlib.crc32(b"tRNS\x80\0").to_bytes(4, "big")
    content = content[:33] + chunk + content[33:]
    assert list(np.asarray(pictures.upright(content, background="#ff00ff"))[0, :, 1]) == [0, 0, 127, 255]


def test_half_transparent_pixels_are_blended_and_opaque_ones_stay_as_they_are():
    assert pictures.upright(encoded(Image.new("RGBA", (4, 4), (*RED, 128)))).getpixel((0, 0)) == (255, 127, 127)
    opaque = noise().convert("RGBA")
    assert pictures.alterations(encoded(opaque)) == ()
    assert (np.asarray(pictures.upright(encoded(opaque), background="teal")) == np.asarray(noise())).all()


def test_a_picture_of_which_nothing_is_visible_is_refused(tmp_path):
    folder = write(tmp_path / "set", {"a.png": encoded(Image.new("RGBA", (8, 8), (*RED, 0))), "b.png": encoded(noise())})
    with pytest.raises(DataError, match=r"a\.png: every pixel of it is transparent"):
        pack.pack(folder, str(tmp_path / "out"))
    content = tar([("a.png", (tmp_path / "set/a.png").read_bytes()), ("a.txt", b"x")])
    assert [bad["reason"] for bad in indexed(tmp_path / "a.tar", content).rejected] == ["every pixel of it is transparent"]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_used(form):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), TEAL)
    content = encoded(first, form, save_all=True, append_images=[second])
    assert pictures.alterations(content) == (FRAMES,)
    assert np.abs(np.asarray(pictures.upright(content)).astype(int) - RED).max() < 12
    assert pictures.alterations(encoded(first, form)) == ()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode):
    with pytest.raises(pictures.BadContent, match="8 or 16 bits a channel"):
        pictures.upright(encoded(noise().convert(mode), "TIFF"))


def test_what_is_altered_is_counted_in_the_index_and_in_every_snapshot(tmp_path, capsys):
    frames = encoded(noise(2), "GIF", save_all=True, append_images=[noise(3)])
    folder = write(tmp_path / "set", {"a.png": encoded(noise()), "b.gif": frames, "c.png": encoded(HALF)})
    (tmp_path / "set/notes.md").write_text("x")
    transport = Transport(ReadConfig(cache=f"{tmp_path}/cache"))
    for _ in range(2):  # the second time it is packed already
        snap = sources.build_snapshot([folder], "data.train", transport)
        assert snap.altered == {FRAMES: {"count": 1, "names": ["b"]}, TRANSPARENT: {"count": 1, "names": ["c"]}}
        assert sources.describe_notes(snap, "data.train", "white") == [
            f"data.train: left out of {folder}: 1 .md (notes.md)",
            "data.train: 1 picture has several frames or pages, of which the first is used: b",
            "data.train: 1 picture has transparent pixels, which become white: c",
        ]
    shard = snap.shards[0].url
    assert "altered" in sidecar.read(shard, transport).head
    assert called(index.main, shard, "--to", tmp_path, "--workers", "1")[1].startswith("index: 1 picture has several frames or pages")
    json.dumps(survey(tmp_path / "set").left_out)


def test_training_batches_and_held_out_squares_show_the_background(tmp_path):
    folder = write(tmp_path / "set", {"a.png": encoded(HALF), "b.png": encoded(HALF.transpose(Image.Transpose.FLIP_LEFT_RIGHT))})
    read = ReadConfig(workers=0, cache=f"{tmp_path}/cache")
    held = write(tmp_path / "held", {"c.png": encoded(HALF.rotate(90))})
    config = sources.DataConfig(name="x", train=[folder], heldout=[held], resolution=16, background="teal", read=read)
    pins = sources.RunSnapshots(config, str(tmp_path / "out"), resuming=False)
    stream = pins.stream(0, 2)
    assert (stream.fixed, stream.background) == (True, "#008080")
    batches = [*stream.steps(0, 1, [range(2)]), *pins.reference(1), *sources.squares([folder], "x", 16, background="teal")]
    colours = {tuple(pixel) for batch in batches for pixel in batch.pixels.reshape(-1, 3).tolist()}
    assert colours == {RED, TEAL}
