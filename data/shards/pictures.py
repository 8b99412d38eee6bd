"""From the bytes of a picture or caption to what they say: allowed kinds only, within limits, upright, cropped to a size."""

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
    """A picture or caption whose bytes arrived whole and cannot be used. It says why, in half a sentence."""


@contextmanager
def _decoding(trouble: str) -> Iterator[None]:
    """Decoders meet broken bytes with exceptions of every kind; all of them are the picture's fault, but for a lack of memory.

    Their warnings name no picture, and say nothing that matters here: of damaged EXIF data, of sizes whose limit is ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, BadContent):
        raise
    except UnidentifiedImageError as error:  # its text holds nothing but an address in memory
        raise BadContent(trouble) from error
    except Exception as error:
        raise BadContent(f"{trouble} ({str(error) or type(error).__name__})") from error


def open_image(encoded: bytes) -> Image.Image:
    """The picture with its header read and its pixels not. Raises BadContent for other kinds and for picture bombs."""
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
    """Looks at the heads of a PNG's chunks: what is wanted may lie behind the pixels, and Pillow would decode them all to get there."""
    at = 8
    while at + 8 <= len(png) and not png.startswith(PNG_EXIF, at + 4):
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return at + 8 <= len(png)


def upright(encoded: bytes, target: int = 0) -> Image.Image:
    """The RGB picture as its camera held it. A JPEG may come at a fraction of its size, both sides at least twice `target` pixels."""
    image = open_image(encoded)
    with _decoding("its pixels cannot be decoded"):
        if target and image.format == "JPEG":
            image.draft(None, (2 * target, 2 * target))  # libjpeg scales while it decodes: several times faster for camera pictures
        if image.mode.startswith("I;16"):  # which Pillow would clip to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        ImageOps.exif_transpose(image, in_place=True)  # which copies nothing, nor does what follows
        return image if image.mode == "RGB" else image.convert("RGB")


def crop_resize(image: Image.Image, target: tuple[int, int], across: float = 0.5, down: float = 0.5) -> Image.Image:
    """The largest part of the form of `target` (width, height), scaled to it (Lanczos). `across` and `down`, 0 to 1, say which: 0.5 is the middle."""
    width, height = target
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) * across, (image.height - scale * height) * down
    box = (left, top, left + scale * width, top + scale * height)
    return image if box == (0, 0, *image.size) and image.size == target else image.resize(target, Image.Resampling.LANCZOS, box=box)


def captions(encoded: bytes, suffix: str) -> list[str]:
    """What a caption file says: the text of a .txt; of a .json a string, a list of them, or such under "captions", "caption" or "text".

    Raises BadContent where that is nothing.
    """
    if len(encoded) > MAX_CAPTION:
        raise BadContent(f"its caption has {len(encoded)} bytes, more than {MAX_CAPTION}")
    try:
        found = encoded.decode("utf-8-sig") if suffix == "txt" else json.loads(encoded)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadContent(f"its caption is not {'UTF-8 text' if suffix == 'txt' else 'JSON'} ({error})") from error
    if isinstance(found, dict):
        found = next((found[key] for key in ("captions", "caption", "text") if found.get(key) is not None), None)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadContent('its .json holds no caption: a string or a list of strings, alone or under "captions"')
    kept = [text.strip() for text in texts if text.strip()]
    if not kept:
        raise BadContent("its caption is empty")
    try:
        "".join(kept).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and no text encoder takes it
        raise BadContent(f"its caption has half a character ({error.reason})") from error
    return kept
