"""Decodes images and captions: allowed kinds only, within limits, upright, on a background, cropped to a size."""

import importlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

SUFFIXES = {  # of a file -> of its kind
    "jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "jfif": "jpg", "jpe": "jpg", "apng": "png", "avif": "avif", "tif": "tiff",
    "tiff": "tiff", "bmp": "bmp", "gif": "gif",
}  # fmt: skip
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "TIFF": "tiff", "BMP": "bmp", "GIF": "gif"}  # Pillow's name -> suffix
PLUGINS = {"heic": "pillow-heif", "heif": "pillow-heif", "hif": "pillow-heif", "jxl": "pillow-jxl-plugin"}  # suffix -> the package that reads it
WHITE = "white"
TRANSPARENT, FRAMES = "transparent", "frames"  # what decoding alters: pixels that are not opaque, pages or frames after the first
MAX_PIXELS = 100_000_000  # larger than any camera's picture; a picture bomb is refused from its header
MAX_BYTES = 1 << 28  # of one picture
MAX_CAPTION = 1 << 16  # bytes
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
INVISIBLE = "every pixel of it is transparent"
PNG_EXIF = (b"eXIf", b"tEXtRaw profile type exif", b"zTXtRaw profile type exif", b"iTXtXML:com.adobe.xmp")  # how chunks with EXIF data begin


def _load_plugins() -> None:
    """Makes Pillow read HEIC and JPEG XL where their packages are installed."""
    with suppress(ImportError, OSError):
        importlib.import_module("pillow_heif").register_heif_opener()
        FORMATS["HEIF"] = "heic"
        SUFFIXES.update({"heic": "heic", "heif": "heic", "hif": "heic"})
    with suppress(ImportError, OSError):
        importlib.import_module("pillow_jxl")
        FORMATS["JXL"] = SUFFIXES["jxl"] = "jxl"


_load_plugins()


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
    with _decoding(f"it is no readable picture ({', '.join(FORMATS)})"):
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=tuple(FORMATS))
    if image.width * image.height > MAX_PIXELS:
        raise BadContent(f"its {image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} that are read")
    if image.mode in ("I", "F"):  # whose range no header tells; Pillow would clip it to 0 to 255
        raise BadContent("its pixels are signed, 32-bit or floating-point numbers; save it with 8 or 16 bits a channel")
    return image


def suffix(encoded: bytes) -> str:
    """The suffix of its kind, such as jpg, png or webp."""
    return {**FORMATS, "MPO": "jpg"}[str(open_image(encoded).format)]


def size(encoded: bytes) -> tuple[int, int]:
    """(width, height) in pixels once the picture stands upright."""
    image, turned = open_image(encoded), False
    if image.format in ("JPEG", "MPO", "WEBP", "AVIF") or (image.format == "PNG" and _has_exif(encoded)):  # Pillow turns the others itself
        with _decoding("its EXIF data cannot be read"):
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def alterations(encoded: bytes) -> tuple[str, ...]:
    """What `upright` will alter: TRANSPARENT, FRAMES. Decodes only pictures that may have transparent pixels.

    Raises BadContent for a picture without any visible pixel. One that cannot be decoded alters nothing: it is found when it is read.
    """
    if encoded.startswith(b"\xff\xd8"):  # JPEG has neither
        return ()
    least, most, several = 255, 255, False
    with suppress(BadContent), _decoding("its pixels cannot be decoded"):
        image = open_image(encoded)
        if image.has_transparency_data:
            least, most = _visible(_rgba(image, encoded))
        several = getattr(image, "is_animated", False)
    if most == 0:
        raise BadContent(INVISIBLE)
    return tuple(what for what, found in ((TRANSPARENT, least < 255), (FRAMES, several)) if found)


def _has_exif(png: bytes) -> bool:
    """Looks at the heads of a PNG's chunks: EXIF may follow the pixel data, and Pillow would decode all pixels to reach it."""
    position = 8
    while position + 8 <= len(png) and not png.startswith(PNG_EXIF, position + 4):
        position += 12 + int.from_bytes(png[position : position + 4], "big")
    return position + 8 <= len(png)


def upright(encoded: bytes, target: int = 0, background: str = WHITE) -> Image.Image:
    """The RGB image with its EXIF orientation applied, its first frame, transparent pixels on `background`.

    A JPEG may come at a fraction of its size, both sides at least twice `target` pixels.
    """
    image = open_image(encoded)
    with _decoding("its pixels cannot be decoded"):
        if target and image.format == "JPEG":
            image.draft(None, (2 * target, 2 * target))  # libjpeg scales while it decodes: several times faster for camera pictures
        turned = image.format == "JXL"  # whose decoder turns it, and leaves the EXIF data as they were
        if image.has_transparency_data:
            image = _flatten(_rgba(image, encoded), background)
        elif image.mode.startswith("I;16"):
            image = _eight_bits(image)
        if not turned:
            ImageOps.exif_transpose(image, in_place=True)  # which copies nothing, nor does what follows
        return image if image.mode == "RGB" else image.convert("RGB")


def other_than_white(background: str) -> str:
    """A colour as #rrggbb, or "" for white. Raises ValueError for what is no opaque colour."""
    colour = ImageColor.getrgb(background)
    if len(colour) != 3:
        raise ValueError(f"{background} is not opaque")
    return "" if colour == (255, 255, 255) else "#{:02x}{:02x}{:02x}".format(*colour)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """An RGBA image on a background. One that is opaque keeps its colours bit for bit."""
    least, most = _visible(image)
    if most == 0:
        raise BadContent(INVISIBLE)
    return image if least == 255 else Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _visible(image: Image.Image) -> tuple[int, int]:
    """The least and the greatest alpha of an RGBA image."""
    least, most = image.getchannel("A").getextrema()
    return int(least), int(most)  # type: ignore[arg-type]


def _rgba(image: Image.Image, encoded: bytes) -> Image.Image:
    """RGBA, not premultiplied. Of a PNG whose transparency is one colour (tRNS), brings that colour to the 8 bits that Pillow reads."""
    image.load()
    key, deep = image.info.get("transparency"), image.format == "PNG" and encoded[24] != 8
    if image.mode.startswith("I;16"):
        mask = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        image = _eight_bits(image)
        image.putalpha(mask)
    elif deep and image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** encoded[24] - 1)
    elif deep and image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return image.convert("RGBA")


def _eight_bits(image: Image.Image) -> Image.Image:
    """L of a grey picture of 9 to 16 bits, which Pillow would clip to white."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** min(16, tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    grey = image.convert("I").point(lambda value: value / (white / 255)).convert("L")
    return ImageOps.invert(grey) if tags.get(PHOTOMETRIC) == 0 else grey  # of a TIFF where 0 is white


def crop_resize(image: Image.Image, target: tuple[int, int], across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Crops to the aspect ratio of `target` (width, height) and resizes to it (Lanczos). `across` and `down`, 0 to 1, position the crop."""
    width, height = target
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) * across, (image.height - scale * height) * down
    box = (left, top, left + scale * width, top + scale * height)
    return image if box == (0, 0, *image.size) and image.size == target else image.resize(target, Image.Resampling.LANCZOS, box=box)


def captions(encoded: bytes, suffix: str) -> list[str]:
    """Parses a caption file: the text of a .txt; of a .json a string, a list of them, or such under "captions", "caption", "text" or "prompt".

    Raises BadContent if there is no caption.
    """
    if len(encoded) > MAX_CAPTION:
        raise BadContent(f"its caption has {len(encoded)} bytes, more than {MAX_CAPTION}")
    try:
        value = encoded.decode("utf-8-sig") if suffix == "txt" else json.loads(encoded)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadContent(f"its caption is not {'UTF-8 text' if suffix == 'txt' else 'JSON'} ({error})") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("captions", "caption", "text", "prompt") if value.get(key) is not None), None)
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
