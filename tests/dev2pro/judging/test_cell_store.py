"""Cells on disk: what is written is read, and what is damaged, half written or another's is noticed."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.errors import DataError, SpaceError
from dev2pro.judging import cell_store, grids
from dev2pro.judging.cell_store import CellFiles

WHAT = {"transformer": "a", "resolution": 4}


def cell(root: Path, count: int = 5, exact: bool = True, out: str = "run", **what: object) -> CellFiles:
    files = CellFiles(root, {**WHAT, **what}, count=count, batch=2, exact=exact, out=out)
    files.create()
    return files


def filled(root: Path, **what: object) -> tuple[CellFiles, torch.Tensor]:
    files, pictures = cell(root, **what), torch.rand(5, 3, 4, 4)
    for number, rows in enumerate(files.batches):
        files.write(number, pictures[rows.start : rows.stop])
    return files, pictures


def test_exact_pictures_come_back_to_the_bit(tmp_path):
    files, pictures = filled(tmp_path)
    assert [list(rows) for rows in files.batches] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([files.read(number) for number in range(3)]), pictures)
    assert torch.equal(files.read_rows([1, 2, 4]), pictures[[1, 2, 4]])
    assert files.read(0).data_ptr() % 64 == 0


def test_other_pictures_come_back_in_eight_bits(tmp_path):
    files, pictures = filled(tmp_path, exact=False)
    stored = files.read_rows(range(5))
    assert stored.dtype == torch.uint8
    assert (stored / 255 - pictures).abs().max() <= 1 / 255
    assert sum(map(files.bytes_of, range(3))) == stored.numel()


def test_a_batch_is_whole_or_not_there(tmp_path, capsys):
    files, _ = filled(tmp_path)
    assert all(len(files.check(number)) == 64 for number in range(3))
    (files.folder / "00001.safetensors").unlink()
    assert files.check(1) == ""
    assert capsys.readouterr().out == ""  # nothing is wrong


@pytest.mark.parametrize("damage", ["bit", "half", "empty", "another cell's", "another batch's", "no label"])
def test_what_cannot_be_used_is_told_and_never_read(damage, tmp_path, capsys):
    files, _ = filled(tmp_path)
    other, _ = filled(tmp_path, transformer="b")
    file = files.folder / "00001.safetensors"
    content = file.read_bytes()
    if damage == "no label":
        save_file(load_file(file), file)
    else:
        file.write_bytes({
            "bit": content[:-1] + bytes([content[-1] ^ 1]), "half": content[: len(content) // 2], "empty": b"",
            "another cell's": (other.folder / file.name).read_bytes(), "another batch's": (files.folder / "00000.safetensors").read_bytes(),
        }[damage])  # fmt: skip
    assert files.check(1) == ""
    assert re.search(rf"{file} .*(damaged|cannot be read|belongs to something else).* Its pictures are sampled again\.", capsys.readouterr().out)
    with pytest.raises(DataError, match=str(file)):
        files.read(1)
    assert files.check(0)
    assert files.check(2)


def test_a_cell_is_named_after_what_its_pictures_depend_on(tmp_path):
    files = cell(tmp_path)
    assert cell(tmp_path, out="elsewhere").id == files.id
    ids = {files.id, cell(tmp_path, transformer="b").id, cell(tmp_path, resolution=8).id, cell(tmp_path, exact=False).id}
    assert len(ids) == 4
    assert json.loads((files.folder / "cell.json").read_text()) == {**WHAT, "pictures": "float32"}


def test_a_write_that_was_cut_off_leaves_the_old_file_and_is_overwritten(tmp_path, monkeypatch):
    files, pictures = filled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            files.write(0, torch.zeros(2, 3, 4, 4))
    assert torch.equal(files.read(0), pictures[:2])
    assert len(list(files.folder.glob("*.partial"))) == 1
    files.write(0, torch.zeros(2, 3, 4, 4))
    assert not files.read(0).any()
    assert not list(files.folder.glob("*.partial"))


def test_two_runs_in_one_folder_write_under_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: None)
    for out in ("one", "other"):
        cell(tmp_path, out=out).write(0, torch.zeros(2, 3, 4, 4))
    assert len(list(tmp_path.rglob("00000.safetensors.*.partial"))) == 2


def test_embeddings_are_those_of_one_judge_of_these_pictures(tmp_path):
    files, embeddings = cell(tmp_path), torch.rand(5, 8)
    assert files.read_embeddings("judge", "pictures") is None
    files.write_embeddings("judge", "pictures", embeddings)
    assert torch.equal(files.read_embeddings("judge", "pictures"), embeddings)
    assert files.read_embeddings("judge", "other pictures") is None
    assert files.read_embeddings("another", "pictures") is None


def test_a_disk_that_is_too_small_is_told_before_anything_is_sampled(tmp_path, disk):
    small = disk(1)
    cell_store.check_space(small, 900_000)
    with pytest.raises(SpaceError, match=rf"need 0\.00112 GB in {small}, and .* Make room, or choose another folder with cells="):
        cell_store.check_space(small, 1_100_000)


def test_thumbnails_are_of_the_first_prompt_of_each_meaning_and_of_the_first_two_seeds(tmp_path):
    """Every picture has its own number as its grey; three prompts, of which the first two mean the same, with three seeds."""
    files = cell(tmp_path, count=9)
    for number, rows in enumerate(files.batches):
        files.write(number, torch.stack([torch.full((3, 4, 4), row / 255) for row in rows]))
    shown = grids.thumbnails(files, torch.tensor([0, 0, 1]))
    assert [[image.getpixel((0, 0))[0] for image in images] for images in shown] == [[0, 6], [1, 7]]
