"""A restored run continues bit for bit; damaged checkpoints are reported and skipped, and a full disk loses none."""

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from dev2pro.errors import ConfigError, InterruptedRun, SpaceError
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import checkpoint, checkpoint_files, distributed
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

DATA = {"snapshot": "abc", "order_version": 2, "seed": 0, "batch": 2}
HARDWARE = HardwareConfig(device="cpu", threads=1)
STEPS = 10
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Run:
    """Steps on inputs that depend only on the number of the step."""

    def __init__(
        self, tiny: Path, out: Path, *, ema: float = 0.9, adapter: bool = False, every: int = 1, keep: int = 2, dtype=torch.float32, **optim
    ) -> None:
        self.dtype, model = dtype, flux1.load_transformer(str(tiny), dtype)
        if adapter:
            lora.inject(model, AdapterConfig(rank=4, alpha=4, targets="attention"), 0)
        config = OptimConfig(**{"lr": 1e-3, "schedule": "cosine", "warmup": 2, **optim})
        self.training = Training(distributed.accelerator(HARDWARE), model, config, HARDWARE, steps=STEPS, batch=2, ema=ema)
        self.checkpoints = Checkpoints(str(out), self.training, CheckpointConfig(every=every, keep=keep), STEPS, DATA)

    def step(self, step: int) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(step)
        x, prompt, pooled = (torch.randn(2, *shape, generator=draw).to(self.dtype) for shape in ((16, 16), (8, 64), (64,)))
        conditioning = flux1.build_conditioning(prompt, pooled, (4, 4))

        def compute_loss(_: range) -> torch.Tensor:
            return flux1.predict(self.training.model, x, torch.tensor([0.3, 0.7]), conditioning, 1.0).square().mean()

        return self.training.step(step, lambda slots: slots, compute_loss)

    def steps(
        self, first: int, last: int, held_out: dict[int, float] | None = None, before: Callable[[int], Any] = lambda step: None
    ) -> list[tuple[float, float]]:
        """Runs steps with a checkpoint after each that is due; `held_out` has the steps with a point on the curve."""
        numbers = self.numbers = list[tuple[float, float]]()
        with self.checkpoints:
            for step in range(first, last):
                before(step)
                numbers.append(self.step(step))
                self.checkpoints.on_step_end(step + 1, [{"step": done, "loss": loss} for done, loss in (held_out or {}).items() if done <= step + 1])
        return numbers

    def everything(self) -> dict[str, torch.Tensor]:
        with self.training.ema_weights() as model:
            ema = {f"averaged {name}": p.detach().clone() for name, p in model.named_parameters()}
        return {name: p.detach().clone() for name, p in self.training.model.named_parameters()} | ema


def names(out: Path) -> list[str]:
    return sorted(folder.name for folder in out.iterdir())


def same(one: Run, other: Run) -> bool:
    a, b = one.everything(), other.everything()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"ema": 0.0}, {"adapter": True}, {"schedule": "linear", "warmup": 0}], ids=str)
def test_a_restored_run_goes_on_bit_for_bit(tiny, tmp_path, options):
    whole = Run(tiny, tmp_path / "nowhere", every=99, **options)
    numbers = [whole.step(step) for step in range(7)]
    first = Run(tiny, tmp_path, every=4, **options)
    assert first.steps(0, 4, {0: 1.5}) == numbers[:4]
    second = Run(tiny, tmp_path, every=4, **options)
    assert second.checkpoints.restore() == (4, [{"step": 0, "loss": 1.5}])
    assert second.training.lr == first.training.lr
    assert second.training.guard.recent == first.training.guard.recent
    assert second.steps(4, 7) == numbers[4:]
    assert same(second, whole)


def test_moments_in_8_bits_and_their_rounding_go_on_bit_for_bit(tiny, tmp_path):
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):  # compiling it takes minutes
        whole = Run(tiny, tmp_path, every=3, name="adamw_8bit", dtype=torch.bfloat16)
        numbers = whole.steps(0, 5)
        again = Run(tiny, tmp_path, every=3, name="adamw_8bit", dtype=torch.bfloat16)
        assert again.checkpoints.restore()[0] == 3
        assert again.steps(3, 5) == numbers[3:]
    assert same(again, whole)


def test_a_checkpoint_of_torch_s_own_writer_is_read_as_before(tiny, tmp_path, monkeypatch):
    """Which wrote them up to commit 1096444: one file a rank, hashed when it was whole."""

    def save(tensors: dict[str, Any], folder: Path, group: Any) -> dict[str, list[Any]]:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is only one process
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
        return {file.name: checkpoint_files.read_and_hash(file) for file in folder.iterdir()}

    monkeypatch.setattr(checkpoint, "_save", save)
    old = Run(tiny, tmp_path, every=3)
    numbers = old.steps(0, 5)
    new = Run(tiny, tmp_path, every=99)
    assert new.checkpoints.restore()[0] == 3
    assert new.steps(3, 5) == numbers[3:]
    assert same(new, old)


def test_saving_changes_nothing(tiny, tmp_path):
    one, other = Run(tiny, tmp_path / "nowhere", every=99), Run(tiny, tmp_path)
    assert one.steps(0, 5) == other.steps(0, 5)
    assert same(one, other)


def test_nothing_to_restore(tiny, tmp_path):
    run = Run(tiny, tmp_path)
    before = run.everything()
    assert run.checkpoints.restore() == (0, [])
    (tmp_path / "checkpoint-3.partial").mkdir()  # killed while writing
    assert run.checkpoints.restore() == (0, [])
    assert all(torch.equal(value, before[name]) for name, value in run.everything().items())
    assert not names(tmp_path)


def test_the_newest_and_the_best_are_kept(tiny, tmp_path):
    Run(tiny, tmp_path).steps(0, 6, {1: 0.9, 2: 0.5, 4: 0.7})
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert names(tmp_path / "checkpoint-6") == [checkpoint_files.NUMBERS, SHARD]  # and no pickle
    Run(tiny, tmp_path, keep=1).steps(6, 7)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-7"]


def test_the_last_step_is_kept_whenever_it_comes(tiny, tmp_path):
    Run(tiny, tmp_path, every=4, keep=1).steps(0, STEPS)
    assert names(tmp_path) == [f"checkpoint-{STEPS}"]


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "missing": Path.unlink,
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": flipped,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n{}"),
}


@pytest.mark.parametrize("name", [checkpoint_files.NUMBERS, SHARD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tiny, tmp_path, name, damage, capfd):
    whole = Run(tiny, tmp_path)
    whole.steps(0, 3)
    DAMAGES[damage](tmp_path / "checkpoint-3" / name)
    run = Run(tiny, tmp_path)
    assert run.checkpoints.restore()[0] == 2
    assert f"{tmp_path}/checkpoint-3 is damaged" in capfd.readouterr().out
    run.steps(2, 3)
    assert same(run, whole)
    assert run.checkpoints.restore()[0] == 3  # the damaged one was written anew


def test_where_all_are_damaged_nothing_begins_anew_in_silence(tiny, tmp_path):
    run = Run(tiny, tmp_path)
    run.steps(0, 2)
    for folder in tmp_path.iterdir():
        flipped(folder / SHARD)
    with pytest.raises(ConfigError, match=r"Every checkpoint in .* is damaged.*remove them"):
        run.checkpoints.restore()


def test_names_in_a_forged_one_lead_nowhere(tiny, tmp_path):
    run = Run(tiny, tmp_path)
    run.steps(0, 2)
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "checkpoint-2" / checkpoint_files.NUMBERS
    numbers = json.loads(file.read_text())
    numbers.pop("digest")
    numbers["files"] = {"../secret": numbers["files"].popitem()[1]}
    file.write_text(json.dumps({**numbers, "digest": checkpoint_files.digest(numbers)}))
    assert run.checkpoints.restore()[0] == 1


@pytest.mark.parametrize(("key", "other"), [("data", {**DATA, "order_version": 3}), ("draws", 0), ("version", 0)])
def test_other_data_and_other_laws_are_refused(tiny, tmp_path, key, other):
    run = Run(tiny, tmp_path)
    run.steps(0, 1)
    file = tmp_path / "checkpoint-1" / checkpoint_files.NUMBERS
    numbers = json.loads(file.read_text()) | {key: other}
    numbers.pop("digest")
    file.write_text(json.dumps({**numbers, "digest": checkpoint_files.digest(numbers)}))
    with pytest.raises(ConfigError, match=r"checkpoint-1 is on other data, or of another version.*Choose another out="):
        run.checkpoints.restore()


def test_the_state_is_a_few_numbers_of_json(tiny, tmp_path):
    run = Run(tiny, tmp_path)
    ((loss, _),) = run.steps(0, 1, {1: 0.5})
    numbers = json.loads((tmp_path / "checkpoint-1" / checkpoint_files.NUMBERS).read_text())
    digest, files = numbers.pop("digest"), numbers.pop("files")
    assert len(digest) == 64
    assert list(files) == [SHARD]
    assert numbers == {
        "version": 1, "draws": 1, "step": 1, "data": DATA, "curve": [{"step": 1, "loss": 0.5}], "held_out": 0.5, "recent": [loss], "ema_steps": 1,
    }  # fmt: skip


def test_training_goes_on_while_one_is_written(tiny, tmp_path, monkeypatch):
    written, go_on = checkpoint._save, threading.Event()

    def slow(*what):
        assert go_on.wait(60)
        return written(*what)

    monkeypatch.setattr(checkpoint, "_save", slow)
    run = Run(tiny, tmp_path, every=2)
    with run.checkpoints:
        for step in range(3):
            run.step(step)
            run.checkpoints.on_step_end(step + 1, [])  # the one after step 2 is still being written after step 3
        before = run.everything()
        assert not checkpoint_files.list_checkpoints(tmp_path)
        go_on.set()
    assert list(checkpoint_files.list_checkpoints(tmp_path)) == [2]
    other = Run(tiny, tmp_path)
    assert other.checkpoints.restore()[0] == 2
    other.step(2)
    assert all(torch.equal(value, before[name]) for name, value in other.everything().items())  # it holds step 2, whatever came after


def test_a_run_that_is_asked_to_stop_ends_after_its_step_with_a_checkpoint(tiny, tmp_path):
    run = Run(tiny, tmp_path, every=99)

    def ask(step: int) -> None:
        if step == 2:
            run.training.stop_requested = lambda: True

    with pytest.raises(InterruptedRun, match=r"interrupted after step 3 of 10\. The same command goes on from there"):
        run.steps(0, 5, before=ask)
    assert names(tmp_path) == ["checkpoint-3"]


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_without_room_the_older_ones_go_first_and_then_the_run_stops_with_the_last_one_whole(tiny, disk, tmp_path):
    Run(tiny, tmp_path).steps(0, 1)
    one = bytes_of(tmp_path / "checkpoint-1") / 2**20
    folder = disk(3.5 * one)
    Run(tiny, folder, keep=3).steps(0, 4, {1: 0.1})
    assert names(folder) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    run = Run(tiny, folder, keep=1)
    run.steps(4, 5)
    assert names(folder) == ["checkpoint-1", "checkpoint-5"]
    (folder / "filler").write_bytes(bytes(int(1.2 * one * 2**20)))
    with pytest.raises(
        SpaceError, match=rf"could not be written into {folder}; the one before it is whole\. A checkpoint needs .* GB are free\. Make room"
    ):
        run.steps(5, 7)
    assert names(folder) == ["checkpoint-1", "checkpoint-5", "filler"]
    (folder / "filler").unlink()
    assert Run(tiny, folder).checkpoints.restore()[0] == 5


def test_a_disk_that_fills_up_in_the_middle_of_writing(tiny, disk, tmp_path, monkeypatch):
    Run(tiny, tmp_path).steps(0, 1)
    one = bytes_of(tmp_path / "checkpoint-1") / 2**20
    folder = disk(1.5 * one)
    monkeypatch.setattr(checkpoint_files, "has_space", lambda out, need: True)  # it was there a moment ago
    run = Run(tiny, folder)
    with pytest.raises(SpaceError, match="could not be written"):
        run.steps(0, 3)
    assert names(folder) == ["checkpoint-1"]
    assert Run(tiny, folder).checkpoints.restore()[0] == 1


def test_a_failed_write_stops_the_training_at_its_next_step_and_not_at_the_next_checkpoint(tiny, disk, tmp_path):
    folder = disk(0.1)
    run = Run(tiny, folder, every=3)
    with pytest.raises(SpaceError):
        run.steps(0, STEPS, before=lambda step: run.checkpoints._writing and run.checkpoints._writing.exception())  # which waits for the thread
    assert len(run.numbers) == 4
