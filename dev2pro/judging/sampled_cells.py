"""The planned cells and their pictures: samples what is not on disk yet, and reads embeddings, distances and thumbnails from what is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dev2pro.artifacts import record
from dev2pro.judging import cell_store, metrics
from dev2pro.judging.cell_store import CellFiles
from dev2pro.judging.cells import Inference
from dev2pro.judging.forecast import Forecast, in_words
from dev2pro.judging.judge import ImageJudge
from dev2pro.judging.sampler import Sampler
from dev2pro.judging.shares import share
from dev2pro.log import Progress


@dataclass(frozen=True)
class PlannedCell:
    """A style's arm on an inference base; without a `lora` the pictures are the same for every style, and so are their `files`."""

    style: str
    arm: str
    inference: Inference
    lora: str | None
    files: CellFiles
    strength: float = 1.0

    @classmethod
    def of(
        cls, style: str, arm: str, inference: Inference, lora: str | None, strength: float, *, sampler: Sampler, root: Path, exact: bool, out: str
    ) -> "PlannedCell":
        """A cell as this sampler samples it, with its files in `root`; see `CellFiles` for `exact` and `out`."""
        what = sampler.identity(inference, lora, strength)
        files = CellFiles(root, what, count=sampler.count, batch=sampler.config.batch, exact=exact, out=out)
        return cls(style, arm, inference, lora, files, strength)


class SampledCells:
    """Pictures are in the cells' files only; a rank holds those of the batch it works on. Call every method on every rank."""

    def __init__(self, planned: Sequence[PlannedCell], sampler: Sampler, accelerator: Accelerator) -> None:
        self.sampler, self.accelerator = sampler, accelerator
        cells = {cell.files.id: cell for cell in planned}
        if accelerator.is_main_process:
            for cell in cells.values():
                cell.files.create()
        accelerator.wait_for_everyone()
        batches = [(cell, number) for cell in cells.values() for number in range(len(cell.files.batches))]
        found = share(accelerator, batches, lambda batch: batch[0].files.check(batch[1]))
        self._hashes: dict[str, list[str]] = {id: [] for id in cells}
        for (cell, _), sha256 in zip(batches, found, strict=True):
            self._hashes[cell.files.id].append(sha256)
        missing = [batch for batch, sha256 in zip(batches, found, strict=True) if not sha256]
        self.forecast = self._announce(batches, missing)

    def _announce(self, batches: Sequence[tuple[PlannedCell, int]], missing: Sequence[tuple[PlannedCell, int]]) -> Forecast:
        """Says what is to be done. Raises SpaceError if its pictures would not fit on the disk."""
        pictures, to_sample = (sum(len(cell.files.batches[number]) for cell, number in some) for some in (batches, missing))
        forwards = sum(len(cell.files.batches[number]) * self.sampler.forwards(cell.inference) for cell, number in missing)
        root = batches[0][0].files.folder.parent
        self.accelerator.print(
            f"{pictures:,} pictures: {pictures - to_sample:,} are in {root} ({len(batches) - len(missing):,} of {len(batches):,} batches), "
            f"{to_sample:,} are to be sampled, in {forwards:,} forward passes of one picture"
        )
        cell_store.check_space(root, sum(cell.files.bytes_of(number) for cell, number in missing))
        return Forecast(pictures, pictures - to_sample, forwards, self.accelerator.num_processes)

    def sample(self, cell: PlannedCell, log: Progress) -> None:
        """Samples what a cell lacks; the ranks share its batches, and each is on disk before the next is begun."""
        hashes, ranks = self._hashes[cell.files.id], self.accelerator.num_processes
        missing = [number for number, sha256 in enumerate(hashes) if not sha256]
        sizes, forwards = [len(cell.files.batches[number]) for number in missing], self.sampler.forwards(cell.inference)

        def sample_one(turn: int) -> str:
            number, meanwhile = missing[turn], sum(sizes[turn - turn % ranks :][:ranks])
            self.sampler.apply(cell.inference, cell.lora, cell.strength)
            is_first = not self.forecast.seconds
            with self.forecast.timed(sizes[turn] * forwards):
                sha256 = cell.files.write(number, self.sampler.sample(cell.files.batches[number]))
            self.forecast.count(meanwhile, meanwhile * forwards)
            if is_first:
                self.accelerator.print(f"sampling takes about {in_words(self.forecast.seconds)} from here, on {ranks} rank(s)")
            log.step(self.forecast.done, minutes_left=self.forecast.seconds / 60)
            return sha256

        for number, sha256 in zip(missing, share(self.accelerator, range(len(missing)), sample_one), strict=True):
            hashes[number] = sha256

    def embeddings(self, cell: PlannedCell, by: ImageJudge) -> Tensor:
        """A judge's embeddings (P, R, D) of a cell, computed once; the ranks share the work."""
        files, pictures = cell.files, record.digest(self._hashes[cell.files.id])
        [found] = share(self.accelerator, [files], lambda files: files.read_embeddings(by.id, pictures))  # one rank reads for all
        if found is None:
            found = by.shared(self.accelerator, files.batches[-1].stop, files.read_rows)
            if self.accelerator.is_main_process:
                files.write_embeddings(by.id, pictures, found)
        return found.unflatten(0, (-1, self.sampler.seeds))

    def distance(self, cell: PlannedCell, ideal: PlannedCell) -> Tensor:
        """Mean squared difference (P, R) to the pictures of another cell; see `metrics.distance`."""
        numbers = range(len(cell.files.batches))
        distances = share(self.accelerator, numbers, lambda number: metrics.distance(cell.files.read(number), ideal.files.read(number)))
        return torch.cat(distances).unflatten(0, (-1, self.sampler.seeds))
