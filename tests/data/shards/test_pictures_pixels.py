"""Decoded pixels of pictures of any kind, size and orientation, and which ones are refused."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.shards import pictures
from data.shards.pictures import BadContent
from tests.shards import encoded, noise

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def refusal(content: bytes) -> str:
    with pytest.raises(BadContent) as caught:
        pictures.upright(content)
    return str(caught.value)


def pixels(content: bytes, width: int = 8, height: int = 0, **where: float) -> np.ndarray:
    """As a training step has them: upright, scaled while decoded if it may be, cropped. (H, W, 3) uint8."""
    target = (width, height or width)
    return np.asarray(pictures.crop_resize(pictures.upright(content, max(target)), target, **where))


def stripes(*colours: tuple[int, int, int], side: int = 8) -> Image.Image:
    """Squares of `side` beside each other."""
    return Image.fromarray(np.concatenate([np.full((side, side, 3), colour, np.uint8) for colour in colours], axis=1))


def is_all(actual: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(actual.astype(int) - np.array(colour)).max() < 7)


def test_pixels_are_what_the_picture_has():
    actual = pixels(encoded(Image.new("RGB", (8, 8), (0, 51, 255))), 4)
    assert (actual.shape, actual.dtype) == ((4, 4, 3), np.uint8)
    assert actual[1, 2].tolist() == [0, 51, 255]
    assert (pixels(encoded(noise(side := 32, side, side)), side) == np.asarray(noise(side, side, side))).all()


def test_the_middle_is_cropped_to_a_square():
    assert is_all(pixels(encoded(stripes(RED, GREEN, BLUE))), GREEN)
    assert is_all(pixels(encoded(stripes(RED, GREEN, BLUE).rotate(90, expand=True))), GREEN)
    assert not is_all(pixels(encoded(stripes(RED, GREEN))), GREEN)


@pytest.mark.parametrize(("where", "colour"), [({"across": 0.0}, RED), ({}, GREEN), ({"across": 1.0}, BLUE), ({"across": 1.0, "down": 0.0}, BLUE)])
def test_another_part_than_the_middle(where, colour):
    assert is_all(pixels(encoded(stripes(RED, GREEN, BLUE)), **where), colour)
    high = encoded(stripes(RED, GREEN, BLUE).transpose(Image.Transpose.TRANSPOSE))
    assert is_all(pixels(high, down=where.get("across", 0.5)), colour)


@pytest.mark.parametrize(("width", "height"), [(24, 8), (12, 4), (48, 16), (21, 7)])
def test_a_picture_of_the_wanted_form_is_scaled_and_not_cropped(width, height):
    actual = pixels(encoded(stripes(RED, GREEN, BLUE)), width, height)
    assert actual.shape == (height, width, 3)
    for third, colour in enumerate((RED, GREEN, BLUE)):
        assert is_all(actual[:, third * width // 3 + width // 8 : (third + 1) * width // 3 - width // 8], colour)


@pytest.mark.parametrize(("width", "height"), [(16, 8), (8, 16), (5, 3), (3, 5), (1, 1)])
def test_any_form_is_cut_from_any_form(width, height):
    for image in (noise(0, 33, 17), noise(0, 17, 33), noise(0, 1, 40), noise(0, 2, 2)):
        actual = pixels(encoded(image), width, height)
        assert actual.shape == (height, width, 3)
        scale = min(image.width / width, image.height / height)
        box = ((image.width - scale * width) / 2, (image.height - scale * height) / 2)
        expected = image.resize((width, height), Image.Resampling.LANCZOS, box=(*box, box[0] + scale * width, box[1] + scale * height))
        assert (actual == np.asarray(expected)).all()


@pytest.mark.parametrize("side", [4, 8, 24])
def test_pictures_are_scaled_to_the_side(side):
    actual = pixels(encoded(stripes(RED, GREEN, side=16).crop((0, 0, 32, 16)).resize((32, 32))), side)
    assert actual.shape == (side, side, 3)
    assert is_all(actual[:, : side // 4], RED)
    assert is_all(actual[:, -(side // 4) :], GREEN)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, -90), (8, 90)])
def test_the_camera_s_orientation_is_applied(orientation, turn, form):
    image = stripes(RED, GREEN, side=16).resize((32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    kept = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    actual = pixels(encoded(image, form, exif=exif, **kept), 32).astype(int)
    assert np.abs(actual - pixels(encoded(image.rotate(turn)), 32)).mean() < 7
    assert orientation == 1 or np.abs(actual - pixels(encoded(image), 32)).mean() > 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation):
    turns = [None, *(getattr(Image.Transpose, name) for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
                                                                 "TRANSVERSE", "ROTATE_270"))]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_held = noise().transpose(turns[orientation - 1]) if turns[orientation - 1] is not None else noise()
    assert (np.asarray(pictures.upright(encoded(as_held, exif=exif))) == np.asarray(noise())).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK", "RGB"])
def test_every_kind_of_pixels_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128) if mode != "1" else (255, 255, 255)).convert(mode)
    for form in ("JPEG",) if mode == "CMYK" else ("PNG", "WEBP") if mode in ("RGB", "RGBA") else ("PNG",):
        actual = pixels(encoded(image, form))
        assert actual.shape == (8, 8, 3)
        assert abs(actual.mean() - (255 if mode == "1" else 128)) < 4


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    actual = np.asarray(pictures.upright(encoded(Image.fromarray(ramp))))[:, :, 0]
    assert np.abs(actual - ramp / 257).max() <= 1


@pytest.mark.parametrize("encode", [lambda image: image, lambda image: image.quantize(4)], ids=["RGBA", "palette"])
def test_no_colour_of_a_transparent_pixel_is_seen(encode):
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((255, 0, 255, 0), (0, 0, 8, 4))
    actual = pixels(encoded(encode(image), "PNG"))
    assert is_all(actual[:4], (255, 255, 255))
    assert is_all(actual[4:], RED)
    with pytest.raises(BadContent, match="every pixel of it is transparent"):
        pictures.upright(encoded(Image.new("RGBA", (8, 8), (*RED, 0)), "PNG"))


@pytest.mark.parametrize(("target", "size"), [(0, (1024, 768)), (96, (256, 192)), (100, (512, 384)), (250, (1024, 768)), (2000, (1024, 768))])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_at_least_twice_the_target(target, size):
    image = Image.linear_gradient("L").resize((1024, 768)).convert("RGB")
    content = encoded(image, "JPEG", quality=100)
    actual = pictures.upright(content, target)
    assert actual.size == size
    fine, coarse = (np.asarray(pictures.crop_resize(one, (64, 48))).astype(int) for one in (image, actual))
    assert np.abs(fine - coarse).max() < 6
    assert pictures.upright(encoded(image), target).size == image.size


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


def header_only(width: int, height: int) -> bytes:
    """A PNG whose header states a large size and that has no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000])
def test_a_picture_bomb_is_refused_from_its_header(side):
    assert f"{side}x{side} pixels are more" in refusal(header_only(side, side)) or f"({side * side} pixels)" in refusal(header_only(side, side))
    with pytest.raises(BadContent, match="pixels"):
        pictures.size(header_only(side, side))


def test_a_picture_of_as_many_pixels_as_allowed_is_read(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 32 * 24)
    assert pictures.upright(encoded(noise())).size == (32, 24)
    assert "33x24 pixels are more than the 768 that are read" in refusal(encoded(noise(0, 33, 24)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        encoded(noise())[:900],
        encoded(noise(), "JPEG")[:600],
        encoded(noise(), "TGA"),
        encoded(noise(), "PPM"),
        header_only(8, 8),
    ],
    ids=["empty", "words", "half a PNG", "half a JPEG", "a TGA", "a PPM", "a PNG without pixels"],
)
def test_an_unreadable_picture(content):
    assert re.match("it is no readable picture \\(JPEG, |its pixels cannot be decoded", refusal(content))


def test_a_lack_of_memory_is_not_the_picture_s_fault(monkeypatch):
    def open_nothing(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pictures.Image, "open", open_nothing)
    with pytest.raises(MemoryError):
        pictures.upright(encoded(noise()))
