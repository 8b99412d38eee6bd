"""Pictures' pixels: what a picture of any kind, size and orientation becomes, and which ones are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.pictures import Picture
from dev2pro.errors import DataError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def refusal(content: bytes) -> str:
    """What a DataError says: one paragraph that begins with the place."""
    with pytest.raises(DataError) as caught:
        Picture("a", "set.tar:a.png", content, "x").pixels(32)
    assert str(caught.value).startswith("set.tar:a.png")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(content: bytes, side: int = 8) -> np.ndarray:
    return Picture("a", "a.png", content, "x").pixels(side)


def stripes(*colours: tuple[int, int, int], side: int = 8) -> Image.Image:
    """Squares of `side` beside each other."""
    return Image.fromarray(np.concatenate([np.full((side, side, 3), colour, np.uint8) for colour in colours], axis=1))


def is_all(found: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(found - (np.array(colour) / 127.5 - 1)[:, None, None]).max() < 0.05)


def test_pixels_are_channels_first_from_minus_one_to_one():
    found = pixels(encoded(Image.new("RGB", (8, 8), (0, 51, 255))), 4)
    assert (found.shape, found.dtype) == ((3, 4, 4), np.float32)
    np.testing.assert_allclose(found[:, 1, 2], [-1, 51 / 127.5 - 1, 1], rtol=1e-6)


def test_the_middle_is_cropped_to_a_square():
    assert is_all(pixels(encoded(stripes(RED, GREEN, BLUE))), GREEN)
    assert is_all(pixels(encoded(stripes(RED, GREEN, BLUE).rotate(90, expand=True))), GREEN)
    assert not is_all(pixels(encoded(stripes(RED, GREEN))), GREEN)


@pytest.mark.parametrize("side", [4, 8, 24])
def test_pictures_are_scaled_to_the_side(side):
    found = pixels(encoded(stripes(RED, GREEN, side=16).crop((0, 0, 32, 16)).resize((32, 32))), side)
    assert found.shape == (3, side, side)
    assert is_all(found[:, :, : side // 4], RED)
    assert is_all(found[:, :, -(side // 4) :], GREEN)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, -90), (8, 90)])
def test_the_camera_s_orientation_is_applied(orientation, turn):
    image = stripes(RED, GREEN, side=16).resize((32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = pixels(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0), 32)
    expected = pixels(encoded(image.rotate(turn)), 32)
    assert np.abs(turned - expected).mean() < 0.05
    assert orientation == 1 or np.abs(turned - pixels(encoded(image), 32)).mean() > 0.3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_every_kind_of_pixels_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128) if mode != "1" else (255, 255, 255)).convert(mode)
    found = pixels(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert found.shape == (3, 8, 8)
    assert abs(found.mean() - (1 if mode == "1" else 128 / 127.5 - 1)) < 0.03


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims to be large and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 12_000, 60_000])
def test_a_picture_bomb_is_refused_from_its_header(side):
    assert "pixels" in refusal(header_only(side, side))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        encoded(noise())[:900],
        encoded(noise(), "JPEG")[:600],
        encoded(noise(), "GIF"),
        encoded(noise(), "TIFF"),
        header_only(8, 8),
    ],
    ids=["empty", "words", "half a PNG", "half a JPEG", "a GIF", "a TIFF", "a PNG without pixels"],
)
def test_an_unreadable_picture(content):
    said = refusal(content)
    assert "is no readable JPEG, PNG or WebP picture" in said
    assert "Replace or remove it" in said
