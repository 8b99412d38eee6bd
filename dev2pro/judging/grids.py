"""Pictures for people: thumbnails of cells, as grids of the report and as PNG sheets."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from dev2pro.contact_sheet import contact_sheet
from dev2pro.judging.comparison import Cell
from dev2pro.judging.report import Grid

GRID_SEEDS = 2  # grids per style
SIDE = 64  # pixels of a thumbnail on a sheet


def thumbnails(images: Tensor, meaning: Tensor) -> list[list[Image.Image]]:
    """The pictures (P, R, 3, H, W) of the first seeds and of the first prompt of each meaning, as PIL images: [seed][meaning]."""
    first = [int((meaning == number).nonzero()[0]) for number in meaning.unique()]
    ready = (images[first, :GRID_SEEDS] * 255).round().byte().permute(1, 0, 3, 4, 2).numpy()
    return [[Image.fromarray(picture) for picture in row] for row in ready]


def arrange(cells: Sequence[Cell], styles: Sequence[str], prompts: list[str]) -> list[Grid]:
    """A grid for every style and seed, a row for every cell."""
    return [
        Grid(style, seed, prompts, [(f"{c.arm} on {c.inference}", c.thumbnails[seed]) for c in cells if c.style == style])
        for style in styles
        for seed in range(len(cells[0].thumbnails))
    ]


def write_sheets(folder: Path, grids: Sequence[Grid]) -> None:
    """A PNG for every grid."""
    folder.mkdir(exist_ok=True)
    for number, grid in enumerate(grids):
        contact_sheet(f"{grid.style}, seed {grid.seed}", grid.prompts, grid.rows, SIDE).save(folder / f"{number:02d}.png")
