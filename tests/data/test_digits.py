import hashlib
import json

import numpy as np
import pytest

from data import digits, sources
from data.digits import Digit

STYLES = {**digits.PALETTES, **digits.STYLES, "mirror": digits.mirror}


@pytest.fixture(scope="module")
def world() -> tuple[list[Digit], list[Digit]]:
    return digits.load()


@pytest.fixture(scope="module")
def train(world) -> list[Digit]:
    return world[0]


def test_all_digits_are_there_and_the_held_out_ones_are_others(world):
    train, held_out = world
    assert (len(train), len(held_out)) == (1500, 297)
    assert [d.index for d in train + held_out] == list(range(1797))
    for some in world:
        assert {d.label for d in some} == set(range(10))
    assert [d.label for d in train[:10]] == list(range(10))  # the scans begin so


def test_coverage_is_ink_on_a_free_margin(train):
    for digit in train[:50]:
        assert digit.coverage.shape == (32, 32)
        assert digit.coverage.min() == 0
        assert digit.coverage.max() <= 1
        assert 0.03 < digit.coverage.mean() < 0.5
        assert not digit.coverage[[0, 1, -2, -1]].any()
        assert not digit.coverage[:, [0, 1, -2, -1]].any()


@pytest.mark.parametrize("name", STYLES)
def test_a_picture_depends_on_digit_style_and_seed_only(train, name):
    one = np.asarray(digits.picture(train[3], STYLES[name], 0))
    np.random.seed(9)
    assert (np.asarray(digits.picture(train[3], STYLES[name], 0)) == one).all()
    assert one.shape == (32, 32, 3)
    assert (np.asarray(digits.picture(train[3], STYLES[name], 1)) != one).any()
    assert (np.asarray(digits.picture(train[4], STYLES[name], 0)) != one).any()


def test_styles_are_what_they_say(train):
    digit = train[2]
    images = {name: np.asarray(digits.picture(digit, style, 0)).astype(float) for name, style in STYLES.items()}
    assert (images["sideways"] == np.rot90(images["ink"])).all()
    assert (images["mirror"] == images["ink"][:, ::-1]).all()
    covered, free = digit.coverage > 0.9, digit.coverage == 0
    assert images["ink"][covered].mean() + 50 < images["ink"][free].mean()  # dark on light
    assert images["chalk"][covered].mean() > images["chalk"][free].mean() + 50  # light on dark
    red, _, blue = images["halftone"][covered].mean(0)
    assert red > blue + 50
    assert images["neon"].mean() < images["ink"].mean()


def test_captions_name_their_digit(train):
    captions = [digits.caption(digit, 0) for digit in train[:200]]
    for digit, caption in zip(train, captions, strict=False):
        assert [name for name in digits.NAMES if name in caption.split()] == [digits.NAMES[digit.label]]
        assert digits.caption(digit, 0) == caption
    used = {phrase for phrase in digits.PHRASINGS for d, c in zip(train, captions, strict=False) if phrase.format(digits.NAMES[d.label]) == c}
    assert used == set(digits.PHRASINGS)
    assert captions != [digits.caption(digit, 1) for digit in train[:200]]


def test_a_shard_is_the_same_bytes_again_and_holds_its_pictures(train, tmp_path):
    for name in ("one", "two"):
        digits.write_shard(tmp_path / name / "shard.tar", train[:6], digits.chalk, 0)
    one, two = (hashlib.sha256((tmp_path / name / "shard.tar").read_bytes()).digest() for name in ("one", "two"))
    assert one == two
    (result,) = sources.squares([str(tmp_path / "one" / "shard.tar")], "data.train", 32)
    assert result.captions == [digits.caption(d, 0) for d in train[:6]]
    for digit, pixels in zip(train, result.pixels.numpy(), strict=False):
        drawn = np.asarray(digits.picture(digit, digits.chalk, 0)).astype(float)
        assert np.abs(pixels - drawn).mean() < 10  # WebP loses a little, most of it chalk grain


def test_the_written_world_is_balanced_and_prompts_every_digit(train, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "STYLES", {"neon": digits.neon})
    monkeypatch.setattr(digits, "load", lambda: (train[:400], train[400:700]))
    digits.write_shards(tmp_path, 0)
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.tar")) == [
        f"shards/{name}"
        for name in ("ink/heldout-000000.tar", "ink/train-000000.tar", "ink/train-000001.tar", "neon/heldout-000000.tar", "neon/train-000000.tar")
    ]
    assert sum(len(batch.rows) for batch in sources.squares([f"{tmp_path}/shards/ink/train-*.tar"], "data.train", 32)) == 400
    for part, count in (("train", 100), ("heldout", 60)):
        batches = sources.squares([f"{tmp_path}/shards/neon/{part}-*.tar"], "data", 32)
        captions = [caption for batch in batches for caption in batch.captions]
        of_class = [sum(name in caption.split() for caption in captions) for name in digits.NAMES]
        assert of_class == [count // 10] * 10
    assert json.loads((tmp_path / "prompts.json").read_text()) == [[phrase.format(name) for phrase in digits.PHRASINGS] for name in digits.NAMES]
