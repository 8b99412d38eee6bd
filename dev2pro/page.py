"""A page that dev2pro writes: one HTML file that needs nothing else, without scripts and network.

Names, prompts and captions are untrusted: `render` escapes them, and the pages' content security policy forbids scripts.
"""

import base64
import io
import math
import pathlib
from typing import Any

import jinja2
from PIL import Image

from dev2pro.escape import printable

SHARED = pathlib.Path(__file__).parent  # page.css.j2, the style of all pages


def render(template: pathlib.Path, **values: Any) -> str:
    """The page of a template, which may import page.css.j2. Everything but the template's own text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_escape_controls,
    )  # fmt: skip
    return environment.get_template(template.name).render(values)


def _escape_controls(value: Any) -> Any:
    """Escapes the control characters of a text (see `printable`), except tabs and line breaks; returns other values unchanged."""
    return "".join(c if c in "\t\n" else printable(c) for c in value) if type(value) is str and not value.isprintable() else value


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """Formats a number, with a true minus sign; a dash for None and non-finite values."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0  # no minus before a zero
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", "−")


def picture(image: Image.Image, largest: int, smallest: int) -> dict[str, Any]:
    """A picture for the page: a data URI and the size to show it at, its longer side `smallest` to `largest` pixels.

    Small ones stay exact, large ones are made smaller.
    """
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    small.save(data, "WEBP", lossless=small.size == image.size, quality=80, method=6)
    zoom, code = math.ceil(smallest / max(small.size)), base64.b64encode(data.getvalue()).decode()
    return {"uri": f"data:image/webp;base64,{code}", "width": small.width * zoom, "height": small.height * zoom, "pixelated": zoom > 1}
