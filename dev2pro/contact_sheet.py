"""Contact sheets: labelled pictures side by side on one image."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dev2pro.escape import printable

PAPER, INK, GREY = "#fbfaf6", "#1f1e1b", "#615e56"


def contact_sheet(title: str, headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], side: int) -> Image.Image:
    """Rows of (label, one picture per header) as one picture; the longer side of each becomes `side` pixels. An empty title takes no space."""
    size = min(max(side // 5, 12), 20)
    font, small, large = (ImageFont.load_default(size * part) for part in (1, 0.85, 1.4))
    gap, line = max(2, side // 16), round(size * 1.3)
    resampling = Image.Resampling.NEAREST if max(rows[0][1][0].size) < side else Image.Resampling.LANCZOS
    images = [[ImageOps.contain(picture.convert("RGB"), (side, side), resampling) for picture in pictures] for _, pictures in rows]
    height = max(picture.height for row in images for picture in row)
    labels = [_wrap(label, font, 3 * side, height // line) for label, _ in rows]
    captions = [_wrap(header, small, side, 4) for header in headers]
    left = 2 * size + math.ceil(max(font.getlength(text) for lines in labels for text in lines))
    top = round((3.6 if title else 1) * size) + line * max(map(len, captions))
    sheet = Image.new("RGB", (left + len(captions) * (side + gap) + size, top + len(labels) * (height + gap) + size), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((size, size), printable(title), INK, large)
    for i, header in enumerate(captions):
        draw.multiline_text((left + i * (side + gap), top - gap), "\n".join(header), GREY, small, "ld", spacing=line - size)
    for j, (label, row) in enumerate(zip(labels, images, strict=True)):
        y = top + j * (height + gap)
        draw.multiline_text((size, y + height // 2), "\n".join(label), INK, font, "lm", spacing=line - size)
        for i, (_, picture) in enumerate(zip(captions, row, strict=True)):
            sheet.paste(picture, (left + i * (side + gap), y))
    return sheet


def stack_vertically(sheets: Sequence[Image.Image]) -> Image.Image:
    """Stacks sheets one below the other."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole


def _wrap(text: str, font: Any, width: float, max_lines: int) -> list[str]:
    """Wraps text to at most `max_lines` lines, and at least one, no wider than `width`. Breaks words and truncates text that are too long."""
    lines = [""]
    for word in map(printable, text.split()):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if not lines[-1] or font.getlength(joined) <= width else [*lines, word]
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1 and len(lines) <= max_lines:
            longest = min(len(lines[-1]) - 1, math.ceil(width))  # a letter is at least one pixel wide, and a caption may be one word of 64 kB
            fits = next(n for n in range(longest, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines = [*lines[:-1], lines[-1][:fits], lines[-1][fits:]]
    visible = lines[: max(max_lines, 1)]
    return [*visible[:-1], visible[-1][: max(len(visible[-1]) - 1, 0)] + "…"] if len(visible) < len(lines) else visible
