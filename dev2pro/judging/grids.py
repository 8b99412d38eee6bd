"""Pictures for people: thumbnails of cells, as grids of the report and as PNG sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dev2pro.contact_sheet import contact_sheet, stack_vertically
from dev2pro.judging.cell_store import CellFiles
from dev2pro.judging.comparison import Cell
from dev2pro.judging.report import LARGEST, Grid
from dev2pro.judging.selection import Point

GRID_SEEDS = 2  # grids per style
SIDE = 64  # pixels of a thumbnail on a sheet
TUNED_PROMPTS, TUNED_SIDE = 4, 160  # of a sheet of tune


def thumbnails(files: CellFiles, meaning: Tensor) -> list[list[Image.Image]]:
    """The pictures of the first seeds and of the first prompt of each meaning, of up to LARGEST pixels: [seed][meaning].

    `meaning` (P,): the number of each prompt's meaning; a cell has as many pictures of each prompt, one after the other.
    """
    seeds = files.batches[-1].stop // len(meaning)
    first = [int((meaning == number).nonzero()[0]) for number in meaning.unique()]
    shown = {seed: [prompt * seeds + seed for prompt in first] for seed in range(min(seeds, GRID_SEEDS))}
    rows = sorted(row for some in shown.values() for row in some)
    images = dict(zip(rows, map(_thumbnail, files.read_rows(rows)), strict=True))
    return [[images[row] for row in some] for some in shown.values()]


def _thumbnail(picture: Tensor) -> Image.Image:
    ready = picture if picture.dtype == torch.uint8 else (picture * 255).round().byte()
    image = Image.fromarray(ready.permute(1, 2, 0).numpy())
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def arrange(cells: Sequence[Cell], styles: Sequence[str], prompts: list[str]) -> list[Grid]:
    """A grid for every style and seed, a row for every cell."""
    own = {style: [c for c in cells if c.style == style] for style in styles}
    sampled = {style: [f"guidance {c.guidance:g}" + (f", CFG {c.cfg_scale:g}" if c.cfg_scale != 1 else "") for c in own[style]] for style in styles}
    return [
        Grid(style, seed, prompts, [(f"{c.arm} on {c.inference}", c.thumbnails[seed]) for c in own[style]], sampled[style])
        for style in styles
        for seed in range(len(cells[0].thumbnails))
    ]


def write_sheets(folder: Path, grids: Sequence[Grid]) -> None:
    """A PNG for every grid, with the guidance and the CFG scale of every row."""
    folder.mkdir(exist_ok=True)
    for number, grid in enumerate(grids):
        rows = [(f"{label}, {how}", pictures) for (label, pictures), how in zip(grid.rows, grid.sampled, strict=True)]
        contact_sheet(f"{grid.style}, seed {grid.seed}", grid.prompts, rows, SIDE).save(folder / f"{number:02d}.png")


Pictures = Mapping[Point, Sequence[Image.Image]]  # one for each prompt


def write_tune_sheets(
    folder: Path, prompts: Sequence[str], without: Sequence[Image.Image], steps: Pictures, settings: Pictures, chosen: Point | None
) -> None:
    """steps.png: a row for every step, a column for every prompt. settings.png: a block for every prompt, strengths as rows, guidances as columns."""
    folder.mkdir(exist_ok=True)
    shown, point, (guidances, strengths) = prompts[:TUNED_PROMPTS], next(iter(steps)), _axes(settings)
    step = next(iter(settings)).step

    def label(name: str, value: float) -> str:
        return f"{name} {value:g}{', chosen' if chosen and getattr(chosen, name) == value else ''}"

    rows = [("no LoRA", without[: len(shown)]), *((label("step", one.step), pictures[: len(shown)]) for one, pictures in steps.items())]
    contact_sheet(f"strength {point.strength:g}, guidance {point.guidance:g}", shown, rows, TUNED_SIDE).save(folder / "steps.png")
    headers, blocks = [label("guidance", guidance) for guidance in guidances], list[Image.Image]()
    for number, prompt in enumerate(shown):
        grid = [(label("strength", s), [settings[Point(step, s, g)][number] for g in guidances]) for s in strengths]
        blocks.append(contact_sheet(prompt, headers, grid, TUNED_SIDE))
    stack_vertically(blocks).save(folder / "settings.png")


def _axes(settings: Pictures) -> tuple[list[float], list[float]]:
    """The guidances and the strengths of a grid of points."""
    return list(dict.fromkeys(one.guidance for one in settings)), list(dict.fromkeys(one.strength for one in settings))
