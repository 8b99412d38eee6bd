"""Draws the miniature's pictures: real handwritten digits as ink on paper, and the same hand in several styles.

The digits are the 1,797 scans of 8x8 pixels and 17 grey levels in miniature/digits.csv.gz, as scikit-learn ships them (E. Alpaydin and C. Kaynak, UCI
"Optical Recognition of Handwritten Digits", https://archive.ics.uci.edu/dataset/80). A scan becomes an ink coverage map of
32x32 by bicubic enlargement and a soft threshold; a style decides what a covered and an uncovered spot look like.
"""

import colorsys
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data import index
from data.storage.transport import ReadConfig, Transport

SCANS = Path(__file__).with_name("miniature") / "digits.csv.gz"
SIDE = 32  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {}",
    "the digit {} written by hand",
    "a {} in ink on paper",
    "handwritten number {}",
    "someone wrote a {} with a pen",
)
STYLE_WORDS = {
    "ink": "in blue ink",
    "chalk": "in white chalk on a blackboard",
    "sideways": "lying on its side",
    "mirror": "in mirror writing",
    "halftone": "printed in red dots",
    "neon": "as a neon sign",
}  # only the judge is told them, so that its features know a style when they see one
HELD_OUT = 297  # the last scans: other writers than the first 1,500

Style = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Digit:
    """One scan: `coverage` (32, 32) in [0, 1], `label` 0 to 9, `index` in scikit-learn's order."""

    coverage: np.ndarray
    label: int
    index: int


def load() -> tuple[list[Digit], list[Digit]]:
    """(train, held-out) digits."""
    table = np.loadtxt(SCANS, np.uint8, delimiter=",")  # (N, 65): 64 grey levels and the label
    digits = [Digit(_coverage(row[:-1].reshape(8, 8)), int(row[-1]), i) for i, row in enumerate(table)]
    return digits[:-HELD_OUT], digits[-HELD_OUT:]


def _coverage(scan: np.ndarray) -> np.ndarray:
    """(8, 8) grey levels 0..16 -> (32, 32) ink coverage in [0, 1]."""
    inner = SIDE - 4  # a margin of two pixels, so that no stroke touches the frame
    enlarged = Image.fromarray((scan / 16).astype(np.float32)).resize((inner, inner), Image.Resampling.BICUBIC)
    edge = np.clip((np.pad(np.asarray(enlarged), 2) - 0.25) / 0.4, 0, 1)
    return edge * edge * (3 - 2 * edge)


# ---- styles: (coverage (32, 32), random numbers) -> picture (32, 32, 3) in [0, 1] ------------------------------------


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1)))


def _paint(coverage: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    return coverage[..., None] * ink + (1 - coverage[..., None]) * paper


def ink(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The models' training domain: blue-black ink on cream paper, slightly different on every sheet."""
    pen = _colour(rng.uniform(0.58, 0.68), rng.uniform(0.5, 0.9), rng.uniform(0.15, 0.4))
    paper = _colour(rng.uniform(0.08, 0.16), rng.uniform(0.02, 0.14), rng.uniform(0.92, 1.0))
    return _paint(coverage, pen, paper)


def chalk(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour: light on dark, so every pixel changes sign. White chalk with grain on a green blackboard."""
    board = _colour(rng.uniform(0.42, 0.46), 0.55, rng.uniform(0.18, 0.26))
    grain = rng.uniform(0.75, 1.0, coverage.shape)
    return _paint(coverage * grain, _colour(0.13, 0.06, 1.0), board)


def sideways(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Geometry: the sheet lies on its side, a quarter turn anticlockwise."""
    return ink(np.rot90(coverage), rng)


def mirror(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Geometry: mirror writing; only the judge's and the VAE's lessons have it."""
    return ink(coverage[:, ::-1], rng)


def halftone(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Texture: a riso print, red dots on a four-pixel screen over yellow paper."""
    y, x = np.mgrid[:SIDE, :SIDE]
    screen = 0.5 + 0.25 * (np.cos(2 * np.pi * (x + y) / 4) + np.cos(2 * np.pi * (x - y) / 4))
    dots = np.clip((coverage * 1.3 - screen * 0.75) * 4, 0, 1)
    return _paint(dots, _colour(rng.uniform(0.95, 1.0), 0.85, 0.85), _colour(rng.uniform(0.12, 0.15), 0.45, 0.98))


def neon(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour and texture: only the outline is left, a glowing tube on a night-blue wall; a lesson, not a style of the demo."""
    dy, dx = np.gradient(coverage)
    tube = np.clip(2.4 * np.hypot(dx, dy), 0, 1)
    return _paint(tube, _colour(rng.uniform(0.86, 0.92), 0.55, 1.0), _colour(rng.uniform(0.62, 0.7), 0.7, 0.16))


def poster(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Texture and geometry: a halftone print on its side."""
    return halftone(np.rot90(coverage), rng)


STYLES: dict[str, Style] = {"chalk": chalk, "sideways": sideways, "halftone": halftone, "poster": poster}
PALETTES: dict[str, Style] = {"ink": ink, "chalk": chalk, "halftone": halftone, "neon": neon}  # what judge and VAE learn to see


def picture(digit: Digit, style: Style, seed: int) -> Image.Image:
    """The digit drawn in a style; the same (digit, style, seed) is the same picture."""
    rng = np.random.default_rng([seed, digit.index])
    return Image.fromarray(np.round(np.clip(style(digit.coverage, rng), 0, 1) * 255).astype(np.uint8))


def caption(digit: Digit, seed: int) -> str:
    """One of the phrasings, by digit."""
    return PHRASINGS[np.random.default_rng([seed, 1, digit.index]).integers(len(PHRASINGS))].format(NAMES[digit.label])


# ---- shards ------------------------------------------------------------------------------------------------------------


def write_shard(path: Path, digits: Iterable[Digit], style: Style, seed: int) -> None:
    """One WebDataset tar of .webp and .txt pairs, and its index; the same arguments give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0, user="dev2pro", group="dev2pro") as shard:
        for digit in digits:
            encoded = io.BytesIO()
            picture(digit, style, seed).save(encoded, "WEBP", quality=92, method=6)
            shard.write({"__key__": f"{digit.index:04d}", "webp": encoded.getvalue(), "txt": caption(digit, seed)})
    outcome = index.index(str(path), Transport(ReadConfig()))
    assert not outcome.error, outcome.error


def write_shards(folder: Path, seed: int) -> None:
    """shards/<style>/{train,heldout}-*.tar, all of ink, 100 and 60 pictures of every other style; and prompts.json."""
    train, held_out = load()
    write_shard(folder / "shards/ink/train-000000.tar", train[: len(train) // 2], ink, seed)
    write_shard(folder / "shards/ink/train-000001.tar", train[len(train) // 2 :], ink, seed)
    write_shard(folder / "shards/ink/heldout-000000.tar", held_out, ink, seed)
    for name, style in STYLES.items():
        write_shard(folder / f"shards/{name}/train-000000.tar", _balanced(train, 100), style, seed)
        write_shard(folder / f"shards/{name}/heldout-000000.tar", _balanced(held_out, 60), style, seed)
    (folder / "prompts.json").write_text(json.dumps([[phrase.format(name) for phrase in PHRASINGS] for name in NAMES], indent=1) + "\n")


def _balanced(digits: list[Digit], count: int) -> list[Digit]:
    """The first `count` / 10 of every class."""
    return [digit for label in range(10) for digit in [d for d in digits if d.label == label][: count // 10]]
