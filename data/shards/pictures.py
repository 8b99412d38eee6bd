"""Decodes images and captions: allowed kinds only, within limits, upright, cropped to a size."""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000  # larger than any camera's picture; a picture bomb is refused from its header
MAX_BYTES = 1 << 28  # of one picture
MAX_CAPTION = 1 << 16  # bytes
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
PNG_EXIF = (b"eXIf", b"tEXtRaw profile type exif", b"zTXtRaw profile type exif", b"iTXtXML:com.adobe.xmp")  # how chunks with EXIF data begin


class BadContent(ValueError):
    """A picture or caption that was read completely and is unusable. The message is half a sentence."""


@contextmanager
def _decoding(message: str) -> Iterator[None]:
    """Turns every decoder exception into BadContent, except MemoryError.

    Suppresses decoder warnings, which name no file and are irrelevant here: of damaged EXIF data, of sizes whose limit is ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, BadContent):
        raise
    except UnidentifiedImageError as error:  # its text holds nothing but an address in memory
        raise BadContent(message) from error
    except Exception as error:
        raise BadContent(f"{message} ({str(error) or type(error).__name__})") from error


def open_image(encoded: bytes) -> Image.Image:
    """Opens the image: reads the header, not the pixels. Raises BadContent for other kinds and for picture bombs."""
    with _decoding("it is no readable JPEG, PNG or WebP picture"):
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadContent(f"its {image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} that are read")
    return image


def suffix(encoded: bytes) -> str:
    """jpg, png or webp."""
    return {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[str(open_image(encoded).format)]


def size(encoded: bytes) -> tuple[int, int]:
    """(width, height) in pixels once the picture stands upright."""
    image, turned = open_image(encoded), False
    if image.format != "PNG" or _has_exif(encoded):
        with _decoding("its EXIF data cannot be read"):
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _has_exif(png: bytes) -> bool:
    """Looks at the heads of a PNG's chunks: EXIF may follow the pixel data, and Pillow would decode all pixels to reach it."""
    position = 8
    while position + 8 <= len(png) and not png.startswith(PNG_EXIF, position + 4):
        position += 12 + int.from_bytes(png[position : position + 4], "big")
    return position + 8 <= len(png)


def upright(encoded: bytes, target: int = 0) -> Image.Image:
    """The RGB image with its EXIF orientation applied. A JPEG may come at a fraction of its size, both sides at least twice `target` pixels."""
    image = open_image(encoded)
    with _decoding("its pixels cannot be decoded"):
        if target and image.format == "JPEG":
            image.draft(None, (2 * target, 2 * target))  # libjpeg scales while it decodes: several times faster for camera pictures
        if image.mode.startswith("I;16"):  # which Pillow would clip to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        ImageOps.exif_transpose(image, in_place=True)  # which copies nothing, nor does what follows
        return image if image.mode == "RGB" else image.convert("RGB")


def crop_resize(image: Image.Image, target: tuple[int, int], across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Crops to the aspect ratio of `target` (width, height) and resizes to it (Lanczos). `across` and `down`, 0 to 1, position the crop."""
    width, height = target
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) * across, (image.height - scale * height) * down
    box = (left, top, left + scale * width, top + scale * height)
    return image if box == (0, 0, *image.size) and image.size == target else image.resize(target, Image.Resampling.LANCZOS, box=box)


def captions(encoded: bytes, suffix: str) -> list[str]:
    """Parses a caption file: the text of a .txt; of a .json a string, a list of them, or such under "captions", "caption" or "text".

    Raises BadContent if there is no caption.
    """
    if len(encoded) > MAX_CAPTION:
        raise BadContent(f"its caption has {len(encoded)} bytes, more than {MAX_CAPTION}")
    try:
        value = encoded.decode("utf-8-sig") if suffix == "txt" else json.loads(encoded)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadContent(f"its caption is not {'UTF-8 text' if suffix == 'txt' else 'JSON'} ({error})") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("captions", "caption", "text") if value.get(key) is not None), None)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadContent('its .json holds no caption: a string or a list of strings, alone or under "captions"')
    nonempty = [text.strip() for text in texts if text.strip()]
    if not nonempty:
        raise BadContent("its caption is empty")
    try:
        "".join(nonempty).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and no text encoder takes it
        raise BadContent(f"its caption has half a character ({error.reason})") from error
    return nonempty
