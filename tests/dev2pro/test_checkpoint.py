"""A run that is written down and read back goes on bit for bit; what is damaged or of other data is refused."""

import json
from pathlib import Path

import pytest
import torch

from dev2pro import checkpoint, distributed, flux, lora
from dev2pro.distributed import HardwareConfig
from dev2pro.errors import ConfigError
from dev2pro.lora import AdapterConfig
from dev2pro.optim import OptimConfig
from dev2pro.training import Training

DATA = {"snapshot": "abc", "order_version": 2, "seed": 0, "batch": 2}
HARDWARE = HardwareConfig(device="cpu", threads=1)


class Run:
    """Steps on inputs that depend on nothing but the number of the step."""

    def __init__(self, tiny: Path, *, ema: float = 0.9, adapter: bool = False, **optim) -> None:
        model = flux.load_transformer(str(tiny))
        if adapter:
            lora.inject(model, AdapterConfig(rank=4, alpha=4, targets="attention"), 0)
        config = OptimConfig(**{"lr": 1e-3, "schedule": "cosine", "warmup": 2, **optim})
        self.training = Training(distributed.accelerator(HARDWARE), model, config, HARDWARE, steps=10, batch=2, ema=ema)

    def step(self, step: int) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(step)
        x, prompt, pooled = (torch.randn(2, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
        said = flux.condition(prompt, pooled, (4, 4))

        def loss_of(_: range) -> torch.Tensor:
            return flux.predict(self.training.model, x, torch.tensor([0.3, 0.7]), said, 1.0).square().mean()

        return self.training.step(step, lambda slots: slots, loss_of)

    def everything(self) -> dict[str, torch.Tensor]:
        with self.training.averaged() as model:
            averaged = {f"averaged {name}": p.detach().clone() for name, p in model.named_parameters()}
        return {name: p.detach().clone() for name, p in self.training.model.named_parameters()} | averaged


@pytest.mark.parametrize("options", [{}, {"ema": 0.0}, {"adapter": True}, {"schedule": "linear", "warmup": 0}], ids=str)
def test_a_restored_run_goes_on_bit_for_bit(tiny, tmp_path, options):
    whole = Run(tiny, **options)
    numbers = [whole.step(step) for step in range(7)]
    first = Run(tiny, **options)
    assert [first.step(step) for step in range(4)] == numbers[:4]
    checkpoint.save(str(tmp_path), first.training, 4, DATA, [{"step": 0, "loss": 1.5}])
    second = Run(tiny, **options)
    assert checkpoint.restore(str(tmp_path), second.training, DATA) == (4, [{"step": 0, "loss": 1.5}])
    assert second.training.lr == first.training.lr
    assert [second.step(step) for step in range(4, 7)] == numbers[4:]
    there, here = whole.everything(), second.everything()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_saving_changes_nothing(tiny, tmp_path):
    one, other = Run(tiny), Run(tiny)
    for step in range(5):
        assert one.step(step) == other.step(step)
        checkpoint.save(str(tmp_path), other.training, step + 1, DATA, [])
    assert all(torch.equal(a, b) for a, b in zip(one.everything().values(), other.everything().values(), strict=True))


def test_nothing_to_restore(tiny, tmp_path):
    run = Run(tiny)
    before = run.everything()
    assert checkpoint.restore(str(tmp_path), run.training, DATA) == (0, [])
    (tmp_path / "checkpoint-3.partial").mkdir()  # killed while writing
    assert checkpoint.restore(str(tmp_path), run.training, DATA) == (0, [])
    assert all(torch.equal(value, before[name]) for name, value in run.everything().items())


def test_the_last_one_stays_and_a_half_written_one_is_no_trouble(tiny, tmp_path):
    run = Run(tiny)
    run.step(0)
    checkpoint.save(str(tmp_path), run.training, 1, DATA, [])
    (tmp_path / "checkpoint-2.partial").mkdir()
    (tmp_path / "checkpoint-2.partial" / "tensors.safetensors").write_bytes(b"half")
    run.step(1)
    checkpoint.save(str(tmp_path), run.training, 2, DATA, [])
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]
    assert sorted(file.name for file in (tmp_path / "checkpoint-2").iterdir()) == ["state.json", "tensors.safetensors"]  # and no pickle


def test_other_data_is_refused(tiny, tmp_path):
    run = Run(tiny)
    run.step(0)
    checkpoint.save(str(tmp_path), run.training, 1, DATA, [])
    with pytest.raises(ConfigError, match=r"checkpoint-1 is on other data.*Choose another out="):
        checkpoint.restore(str(tmp_path), run.training, {**DATA, "order_version": 3})


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9])], ids=["missing", "cut"])
def test_a_damaged_one_is_named(tiny, tmp_path, name, damage):
    run = Run(tiny)
    run.step(0)
    checkpoint.save(str(tmp_path), run.training, 1, DATA, [])
    damage(tmp_path / "checkpoint-1" / name)
    with pytest.raises(ConfigError, match=r"checkpoint-1 is damaged.*Remove it"):
        checkpoint.restore(str(tmp_path), run.training, DATA)


def test_the_state_is_a_few_numbers_of_json(tiny, tmp_path):
    run = Run(tiny)
    run.step(0)
    checkpoint.save(str(tmp_path), run.training, 1, DATA, [])
    state = json.loads((tmp_path / "checkpoint-1/state.json").read_text())
    assert state == {"step": 1, "ema_steps": 1, "data": DATA, "curve": []}
