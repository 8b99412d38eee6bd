import random
import time
from itertools import pairwise

import pytest
from PIL import Image, ImageColor

from dev2pro import contact_sheet


def noise(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side))


def _find(sheet: Image.Image, picture: Image.Image) -> tuple[int, int]:
    (side, _), pixels, wide, position = picture.size, picture.tobytes(), sheet.tobytes(), -1
    while (position := wide.find(pixels[: 3 * side], position + 1)) >= 0:
        y, x = divmod(position // 3, sheet.width)
        if position % 3 == 0 and sheet.crop((x, y, x + side, y + side)).tobytes() == pixels:
            return x, y
    raise AssertionError("the picture is not on the sheet")


def test_a_contact_sheet_holds_every_picture_in_its_place():
    rows = [(label, [noise(32 + 10 * j + i).resize((32, 32)) for i in range(3)]) for j, label in enumerate(["one", "another"])]
    sheet = contact_sheet.contact_sheet("a title", ["a", "b", "c"], rows, 64)
    assert sheet.mode == "RGB"
    positions = [[_find(sheet, picture.resize((64, 64), Image.Resampling.NEAREST)) for picture in pictures] for _, pictures in rows]
    for row in positions:
        assert len({y for _, y in row}) == 1
        assert all(b - a >= 64 for (a, _), (b, _) in pairwise(row))
    assert positions[1][0][1] - positions[0][0][1] >= 64
    assert [x for x, _ in positions[0]] == [x for x, _ in positions[1]]
    assert contact_sheet.contact_sheet("a title", ["a", "b", "c"], rows, 64).tobytes() == sheet.tobytes()
    assert contact_sheet.contact_sheet("another", ["a", "b", "c"], rows, 64).tobytes() != sheet.tobytes()


def test_no_title_takes_no_room():
    with_title, without = (contact_sheet.contact_sheet(title, ["a"], [("", [noise(64)])], 64) for title in ("a title", ""))
    assert without.height < with_title.height
    assert without.width == with_title.width


def test_sheets_one_below_the_other():
    whole = contact_sheet.stack_vertically([Image.new("RGB", (30, 10), "red"), Image.new("RGB", (20, 15), "blue")])
    assert whole.size == (30, 25)
    assert [whole.getpixel(at) for at in ((29, 9), (0, 10), (19, 24))] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert whole.getpixel((29, 24)) == ImageColor.getrgb(contact_sheet.PAPER)


@pytest.mark.parametrize("side", [16, 160])
def test_long_words_and_other_shapes(side):
    picture = Image.new("L", (100, 50), 128)
    rows = [("an arm with a long name " * 9, [picture, picture]), ("", [picture, picture])]
    assert contact_sheet.contact_sheet("a style", ["x" * 300, "word " * 90], rows, side).width < 2 * side + 4 * side + 100


def test_characters_that_cannot_be_drawn_are_spelt_out():
    row = [("a", [Image.new("RGB", (32, 32))])]
    spelt = contact_sheet.contact_sheet("t\\x1b[2J", ["h\\u202e"], row, 64)
    assert contact_sheet.contact_sheet("t\x1b[2J", ["h\u202e"], row, 64).tobytes() == spelt.tobytes()


def test_a_caption_of_one_endless_word_holds_nothing_up():
    began = time.monotonic()
    contact_sheet.contact_sheet("", ["W" * (1 << 16)], [("", [Image.new("RGB", (8, 8))])], 64)
    assert time.monotonic() - began < 20  # hours, before
