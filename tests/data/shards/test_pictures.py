"""Picture headers and captions: what is parsed, and which are refused."""

import json
import warnings

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.shards import pictures
from data.shards.pictures import BadContent
from tests.shards import encoded, noise

TURNED = ("JPEG", "PNG", "WEBP", "AVIF")  # which have EXIF data; a TIFF has a tag
FORMS = (*TURNED, "TIFF", "BMP", "GIF")


def trouble(work) -> str:
    """Half a sentence."""
    with pytest.raises(BadContent) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return exif


# ---- sizes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*TURNED, "TIFF"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_width_and_height_are_those_of_the_upright_picture(form, orientation):
    where = {"tiffinfo": {pictures.ORIENTATION: orientation}} if form == "TIFF" else {"exif": turned(orientation or 0)}
    content = encoded(noise(), form, **({} if orientation is None else where))
    assert pictures.size(content) == ((24, 32) if orientation in (5, 6, 7, 8) else (32, 24))
    assert pictures.upright(content).size == pictures.size(content)


def test_a_png_that_tells_its_orientation_behind_its_pixels():
    content = encoded(noise(), "PNG", exif=turned(6))
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert moved.index(b"IDAT") < moved.index(b"eXIf")
    assert pictures.size(moved) == pictures.upright(moved).size == (24, 32)


def test_the_orientation_of_xmp_data():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded(noise(), "JPEG", xmp=xmp)
    assert pictures.size(content) == pictures.upright(content).size == (24, 32)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!!", b"Exif\0\0", turned(6).tobytes()[:20], b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_damaged_exif_data_harm_no_picture_and_are_not_talked_about(exif):
    content = encoded(noise(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.size(content) == pictures.upright(content).size == (32, 24)


def test_the_orientation_in_a_png_s_text():
    exif = turned(6).tobytes()[6:].hex()
    info = PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif) // 2:8}\n{exif}\n", zip=True)
    content = encoded(noise(), "PNG", pnginfo=info)
    assert pictures.size(content) == pictures.upright(content).size == (24, 32)


@pytest.mark.parametrize("form", FORMS)
def test_a_size_is_told_from_the_header_alone(form):
    content = encoded(noise(), form)
    assert pictures.size(content[: -len(content) // 3] if form not in ("WEBP", "AVIF") else content) == (32, 24)


@pytest.mark.parametrize("form", [*FORMS, "EPS", "ICO", "PPM", "TGA"])
def test_pictures_are_known_by_their_bytes(form):
    content = encoded(noise(), form)
    if form in FORMS:
        assert pictures.open_image(content).format == form
    else:
        assert trouble(lambda: pictures.open_image(content)).startswith("it is no readable picture (JPEG, PNG, WEBP, ")


def test_a_camera_s_jpeg_with_a_second_picture_behind_it():
    content = encoded(noise(), "MPO", save_all=True, append_images=[noise(1)])
    assert pictures.size(content) == (32, 24)
    assert pictures.upright(content).size == (32, 24)
    assert pictures.suffix(content) == "jpg"


def test_a_picture_s_own_suffix():
    assert [pictures.suffix(encoded(noise(), form)) for form in FORMS] == ["jpg", "png", "webp", "avif", "tiff", "bmp", "gif"]


# ---- captions ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "suffix", "expected"),
    [
        (b" a cat \r\n", "txt", ["a cat"]),
        ("naïve, 日本, 🙂\nsecond line".encode(), "txt", ["naïve, 日本, 🙂\nsecond line"]),
        (b"\xef\xbb\xbfa cat", "txt", ["a cat"]),
        (b'{"a": 1}', "txt", ['{"a": 1}']),
        (b'"a cat"', "json", ["a cat"]),
        (b'["a cat", " ", "one"]', "json", ["a cat", "one"]),
        (b'{"captions": ["x", " y "], "caption": "z"}', "json", ["x", "y"]),
        (b'{"caption": "z", "text": "t", "url": 3}', "json", ["z"]),
        (b'{"text": ["t"]}', "json", ["t"]),
        (b'{"captions": null, "text": "t"}', "json", ["t"]),
        (b'\xef\xbb\xbf{"text": "t"}', "json", ["t"]),
        (json.dumps({"text": "🙂"}).encode(), "json", ["🙂"]),
    ],
    ids=repr,
)
def test_what_a_caption_says(content, suffix, expected):
    assert pictures.captions(content, suffix) == expected


NOTHING = [
    (b"", "txt", "its caption is empty"),
    (b" \r\n\t\xe2\x80\x83", "txt", "its caption is empty"),
    ("naïve".encode("latin-1"), "txt", "its caption is not UTF-8 text ('utf-8' codec can't decode byte 0xef in position 2"),
    ("naïve".encode("utf-16"), "txt", "its caption is not UTF-8 text"),
    (b"x" * ((1 << 16) + 1), "txt", "its caption has 65537 bytes, more than 65536"),
    (b"", "json", "its caption is not JSON"),
    (b"{", "json", "its caption is not JSON"),
    (b'"na\xefve"', "json", "its caption is not JSON"),
    (b"[" * 60_000, "json", "its caption is not JSON"),
    (b"9" * 6000, "json", "its caption is not JSON"),
    (b'""', "json", "its caption is empty"),
    (b'[" "]', "json", "its caption is empty"),
    (b"[]", "json", "its caption is empty"),
    (b"3", "json", "holds no caption"),
    (b"null", "json", "holds no caption"),
    (b'["a", 3]', "json", "holds no caption"),
    (b'{"width": 3}', "json", "holds no caption"),
    (b'{"caption": {"en": "x"}}', "json", "holds no caption"),
    (b'"\\ud83d cut"', "json", "its caption has half a character"),
    (b'["whole", "\\ude00"]', "json", "its caption has half a character"),
]


@pytest.mark.parametrize(("content", "suffix", "expected"), NOTHING, ids=lambda value: repr(value)[:20])
def test_a_caption_that_says_nothing(content, suffix, expected):
    assert expected in trouble(lambda: pictures.captions(content, suffix))
