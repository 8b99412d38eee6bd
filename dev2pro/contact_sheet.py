"""Pictures side by side on one sheet, with what they show written over them."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dev2pro.escape import printable

PAPER, INK, GREY = "#fbfaf6", "#1f1e1b", "#615e56"


def contact_sheet(title: str, headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], side: int) -> Image.Image:
    """Rows of (label, one picture per header) as one picture; the longer side of each becomes `side` pixels. An empty title takes no room."""
    size = min(max(side // 5, 12), 20)
    font, small, large = (ImageFont.load_default(size * part) for part in (1, 0.85, 1.4))
    gap, line = max(2, side // 16), round(size * 1.3)
    how = Image.Resampling.NEAREST if max(rows[0][1][0].size) < side else Image.Resampling.LANCZOS
    shown = [[ImageOps.contain(picture.convert("RGB"), (side, side), how) for picture in pictures] for _, pictures in rows]
    tall = max(picture.height for row in shown for picture in row)
    labels = [_wrapped(label, font, 3 * side, tall // line) for label, _ in rows]
    over = [_wrapped(header, small, side, 4) for header in headers]
    left = 2 * size + math.ceil(max(font.getlength(text) for some in labels for text in some))
    top = round((3.6 if title else 1) * size) + line * max(map(len, over))
    sheet = Image.new("RGB", (left + len(over) * (side + gap) + size, top + len(labels) * (tall + gap) + size), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((size, size), printable(title), INK, large)
    for i, header in enumerate(over):
        draw.multiline_text((left + i * (side + gap), top - gap), "\n".join(header), GREY, small, "ld", spacing=line - size)
    for j, (label, row) in enumerate(zip(labels, shown, strict=True)):
        y = top + j * (tall + gap)
        draw.multiline_text((size, y + tall // 2), "\n".join(label), INK, font, "lm", spacing=line - size)
        for i, (_, picture) in enumerate(zip(over, row, strict=True)):
            sheet.paste(picture, (left + i * (side + gap), y))
    return sheet


def below(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets one below the other."""
    whole = Image.new("RGB", (max(one.width for one in sheets), sum(one.height for one in sheets)), PAPER)
    y = 0
    for one in sheets:
        whole.paste(one, (0, y))
        y += one.height
    return whole


def _wrapped(text: str, font: Any, width: float, most: int) -> list[str]:
    """The text in at most `most` lines, and at least one, no wider than `width`: too long words are broken, too long texts cut short."""
    lines = [""]
    for word in map(printable, text.split()):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if not lines[-1] or font.getlength(joined) <= width else [*lines, word]
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1 and len(lines) <= most:
            longest = min(len(lines[-1]) - 1, math.ceil(width))  # a letter has a pixel or more, and a caption may be one word of 64 kB
            fits = next(n for n in range(longest, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines = [*lines[:-1], lines[-1][:fits], lines[-1][fits:]]
    kept = lines[: max(most, 1)]
    return [*kept[:-1], kept[-1][: max(len(kept[-1]) - 1, 0)] + "…"] if len(kept) < len(lines) else kept
