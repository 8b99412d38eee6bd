"""A held-out picture that is trained on is refused, whatever it is called and however it was saved; one that only looks like it is named."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import fingerprints, index, overlap, sources
from data.shards import snapshot
from data.sources import DataConfig, RunSnapshots
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import DataError
from tests.shards import encoded, tar

ROOT = Path(__file__).resolve().parents[2]


def photograph(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Clouds of colour with detail at every scale, as photographs have it."""
    draw, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for octave in range(1, 6):
        coarse = Image.fromarray(draw.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 2**octave
    return Image.fromarray((255 * (total - total.min()) / (total.max() - total.min())).astype(np.uint8))


def folder(path: Path, **images: bytes) -> str:
    """`name__suffix` -> the picture's bytes, each with a caption."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        stem, suffix = name.split("__")
        (path / f"{stem}.{suffix}").write_bytes(content)
        (path / f"{stem}.txt").write_text(f"what {stem} shows")
    return str(path)


def shard(path: Path, **images: bytes) -> str:
    path.write_bytes(tar([one for n, content in images.items() for one in ((n.replace("__", "."), content), (n.split("__")[0] + ".txt", b"a text"))]))
    assert not index.index(str(path), Transport(ReadConfig())).error
    return str(path)


@pytest.fixture
def pin(tmp_path: Path) -> Callable[..., RunSnapshots]:
    def pinned(train: list[str], heldout: list[str], resuming: bool = False) -> RunSnapshots:
        read = ReadConfig(workers=0, threads=2, retries=0, cache=f"{tmp_path}/cache")
        config = DataConfig(name="x", train=train, heldout=heldout, resolution=64, read=read)
        return RunSnapshots(config, f"{tmp_path}/out", resuming=resuming)

    return pinned


OTHERS = {f"t{i}__png": encoded(photograph(i)) for i in range(4)}
HELD = {f"h{i}__png": encoded(photograph(100 + i)) for i in range(2)}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown a quarter turn to the right


def test_a_folder_of_held_out_pictures_within_the_training_folder(pin, tmp_path):
    train = folder(tmp_path / "all", **OTHERS)
    held = folder(tmp_path / "all/heldout", **HELD)
    with pytest.raises(DataError) as refused:
        pin([train], [held])
    assert str(refused.value) == (
        f"2 of the 2 pictures of data.heldout are in data.train, too: {held}/h0.png; {held}/h1.png. What is trained on cannot judge: {held} lies in "
        f"{train}, and a folder is read with the folders in it: move it out of there, or name the other folders one by one."
    )
    os.rename(held, tmp_path / "heldout")
    assert not pin([train], [f"{tmp_path}/heldout"]).shared.same


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("another name", HELD["h0__png"]),
        ("another lossless kind", encoded(photograph(100), "WEBP", lossless=True)),
        ("another compression", encoded(photograph(100), "PNG", compress_level=0)),
        ("turned by its EXIF", encoded(photograph(100).transpose(Image.Transpose.ROTATE_90), "PNG", exif=TURNED)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["folder", "tar", "snapshot"])
def test_the_same_pixels(pin, tmp_path, name, copy, form):
    suffix = "webp" if copy[8:12] == b"WEBP" else "png"
    images = {**OTHERS, f"copy__{suffix}": copy}
    train = folder(tmp_path / "train", **images) if form == "folder" else shard(tmp_path / "train.tar", **images)
    if form == "snapshot":
        snapshot.build([train], Transport(ReadConfig())).write(f"{tmp_path}/a.snapshot")
        train = f"{tmp_path}/a.snapshot"
    with pytest.raises(DataError, match=rf"1 of the 2 pictures of data\.heldout are in data\.train, too: .*h0\.png is .*copy\.{suffix}\. What is"):
        pin([train], [folder(tmp_path / "held", **HELD)])


def test_symbolic_links_to_held_out_pictures(pin, tmp_path):
    train, held = folder(tmp_path / "train", **OTHERS), folder(tmp_path / "held", **HELD)
    os.symlink(f"{held}/h1.png", f"{train}/link.png")
    (tmp_path / "train/link.txt").write_text("a link")
    with pytest.raises(DataError, match=r"1 of the 2 .*held/h1\.png is .*train/link\.png\. .*take them out of data\.train or of data\.heldout"):
        pin([train], [held])


def test_a_jpeg_of_the_same_pixels_and_flat_pictures(pin, tmp_path):
    """JPEGs are compared at a fraction of their size first, and a flat picture has no look of its own."""
    photo = encoded(photograph(7, 640, 480), "JPEG", quality=90)
    decoded = encoded(Image.open(io.BytesIO(photo)))
    flat = {"white__png": encoded(Image.new("RGB", (64, 64), "white")), "grey__png": encoded(Image.new("RGB", (64, 64), "#888"))}
    train = folder(tmp_path / "train", photo__jpg=photo, white__webp=encoded(Image.new("RGB", (64, 64), "white"), "WEBP", lossless=True))
    with pytest.raises(DataError, match=r"2 of the 3 .*photo\.png is .*photo\.jpg; .*white\.png is .*white\.webp\."):
        pin([train], [folder(tmp_path / "held", photo__png=decoded, **flat)])
    fine = folder(tmp_path / "fine", white__png=encoded(Image.new("RGB", (64, 64), "#fefefe")), bigger__png=encoded(Image.new("RGB", (65, 64))))
    found = pin([fine], [folder(tmp_path / "held", photo__png=decoded, **flat)]).shared
    assert (found.same, found.near) == ({}, {})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda image: encoded(image, "JPEG", quality=60), True),
        (lambda image: encoded(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)), True),
        (lambda image: encoded(image.point(lambda value: min(255, int(value * 1.1)))), True),
        (lambda image: encoded(image.convert("L").convert("RGB")), True),
        (lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), False),
        (lambda image: encoded(image.crop((0, 0, image.width // 2, image.height))), False),
    ],
    ids=["saved again as JPEG", "scaled", "brightened", "without colour", "mirrored", "one half"],
)
def test_what_looks_like_a_held_out_picture(pin, tmp_path, change, found):
    copy = change(photograph(100, 320, 240))
    train = folder(tmp_path / "train", **OTHERS, **{f"copy__{'jpg' if copy[:2] == bytes([255, 216]) else 'png'}": copy})
    pins = pin([train], [folder(tmp_path / "held", h0__png=encoded(photograph(100, 320, 240)), **{"h1__png": HELD["h1__png"]})])
    assert not pins.shared.same
    assert len(pins.shared.near) == found
    for row, other in pins.shared.near.items():
        words = overlap.in_words({row: other}, pins.heldout, pins.train, pins.config.read, "looks like")
        assert words.startswith(f"{tmp_path}/held/h0.png looks like {tmp_path}/train/copy.")


@pytest.mark.parametrize("style", ["ink", "chalk", "sideways", "halftone", "poster"])
def test_the_bundled_digits_are_no_copies_of_each_other(pin, style):
    shards = ROOT / "data/miniature/shards" / style
    found = pin([f"{shards}/train-*.tar"], [f"{shards}/heldout-*.tar"]).shared
    assert found == overlap.Overlap({}, {}, "")


def test_a_picture_that_cannot_be_decoded_is_skipped(pin, tmp_path):
    """Its header is sound, so that the index takes it; the run puts it in quarantine."""
    broken = HELD["h0__png"][:-200]
    train = shard(tmp_path / "train.tar", **OTHERS, broken__png=broken)
    assert pin([train], [shard(tmp_path / "held.tar", **{"h1__png": HELD["h1__png"]}, broken__png=broken)]).shared.same == {}


def test_beyond_the_bound_the_bytes_are_compared_and_the_rest_is_said(tmp_path):
    read = ReadConfig(workers=0, cache=f"{tmp_path}/cache")
    resaved = encoded(photograph(101), "PNG", compress_level=0)
    larger = encoded(photograph(5, 128, 128))
    train = shard(tmp_path / "a.tar", **OTHERS, copy__png=HELD["h0__png"], resaved__png=resaved, larger__png=larger)
    train, held = (sources.build_snapshot([path], "x", Transport(read)) for path in (train, shard(tmp_path / "b.tar", **HELD)))
    assert overlap.find(train, held, read, most=2) == overlap.Overlap(
        {0: 4}, {}, "of 7 training pictures, only those with the bytes of a held-out one were looked for. `python -m data.report` compares all."
    )
    of_one_size = overlap.find(train, held, read, most=8)
    assert of_one_size.same == {0: 4, 1: 5}
    assert "; the 6 with the size of a held-out one were decoded and compared. " in of_one_size.left
    assert overlap.find(train, held, read, most=9) == overlap.Overlap({0: 4, 1: 5}, {}, "")
    assert overlap.find(train, held, read, most=float("inf")).left == ""


def test_fingerprints_are_computed_once_a_shard(pin, tmp_path, monkeypatch):
    train, held = shard(tmp_path / "train.tar", **OTHERS), folder(tmp_path / "held", **HELD)
    pin([train], [held])
    cached = sorted((tmp_path / "cache/fingerprints").iterdir())
    assert len(cached) == 2  # a file per shard
    decoded = []
    monkeypatch.setattr(fingerprints, "_of_row", lambda row, kind: decoded.append(row) or bytes(1 + kind.size))
    pin([train], [held])
    shutil.copy(train, tmp_path / "copy.tar")
    pin([shard(tmp_path / "copy.tar", **OTHERS)], [held])
    assert not decoded
    cached[0].write_bytes(cached[0].read_bytes()[:-1])
    pin([train], [held])
    assert decoded  # a damaged file counts for nothing


def test_a_run_that_has_begun_is_not_compared_again(pin, tmp_path):
    train, held = folder(tmp_path / "train", **OTHERS), folder(tmp_path / "held", **HELD)
    pins = pin([train], [held])
    (tmp_path / "out").mkdir()
    pins.write_and_verify()
    shutil.rmtree(tmp_path / "cache/fingerprints")
    pin([train], [held], resuming=True)
    assert not (tmp_path / "cache/fingerprints").exists()


def test_duplicates_and_lookalikes_in_one_set(tmp_path):
    read = ReadConfig(workers=0, cache=f"{tmp_path}/cache")
    again = encoded(photograph(1), "JPEG", quality=80)
    path = shard(tmp_path / "a.tar", **OTHERS, again__jpg=again, twice__png=OTHERS["t2__png"])
    built = sources.build_snapshot([path], "x", Transport(read))
    assert overlap.duplicates(built) == {5: 2}
    assert overlap.lookalikes(built, read) == {4: 1}


@pytest.mark.parametrize("stem", ["\u043a\u043e\u0444\u0435", "long" * 30, "a/" * 40 + "deep" * 20, "plain", "caf\u00e9 #1"])
def test_pairs_have_the_names_that_people_gave(pin, tmp_path, stem):
    train, held = tmp_path / "train" / stem, folder(tmp_path / "held", **HELD)
    folder(tmp_path / "train", **OTHERS)
    train.parent.mkdir(parents=True, exist_ok=True)
    train.with_name(train.name + ".png").write_bytes(HELD["h1__png"])
    train.with_name(train.name + ".txt").write_text("a copy")
    with pytest.raises(DataError) as refused:
        pin([f"{tmp_path}/train"], [held])
    assert f"{held}/h1.png is {tmp_path}/train/{stem}.png." in str(refused.value)
