"""The bytes of a state are exact before there is one, and a run begins only where all that it keeps at one time fits."""

from pathlib import Path

import pytest
import torch

from dev2pro.errors import SpaceError
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import checkpoint, checkpoint_space, distributed
from dev2pro.training.checkpoint import CheckpointConfig
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training

MIB = 2**20
ADAPTER = AdapterConfig(rank=4, alpha=4, targets="attention")


@pytest.mark.parametrize(
    ("name", "dtype", "average", "adapter"),
    [
        ("adamw", torch.float32, 0.9, False),
        ("adamw", torch.float32, 0.0, False),
        ("auto", torch.bfloat16, 0.0, True),
        ("auto", torch.bfloat16, 0.9, False),
        ("adamw_8bit", torch.float32, 0.9, False),
    ],
)
def test_the_bytes_of_a_state_are_known_before_it_is_made(tiny, name, dtype, average, adapter):
    model, skeleton = flux1.load_transformer(str(tiny), dtype), flux1.skeleton(str(tiny), dtype)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    for one in (model, skeleton) if adapter else ():
        lora.inject(one, ADAPTER, 0)
    config, hardware = OptimConfig(lr=1e-3, name=name), HardwareConfig(device="cpu", threads=1)
    training = Training(distributed.accelerator(hardware), model, config, hardware, steps=2, batch=1, ema=average)
    for parameter in training.parameters:
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        training.optimizer.step()
    tensors = checkpoint._tensors(training)
    if (dtype == torch.bfloat16 and not adapter) or name == "adamw_8bit":
        assert any(".codes" in key for key in tensors), "some parameters are large enough for 8 bits"
        assert any(key.startswith("optimizer/exp_avg/") for key in tensors), "and some are not"
    wanted = sum(value.numel() * value.element_size() for value in tensors.values())
    assert checkpoint_space.state_bytes(checkpoint_space.trained(skeleton), config, bool(average)) == wanted


def start(out: Path, *, keep: int, steps: int, result: torch.dtype = torch.float32, values: int = MIB // 16, intermediate: int = 0) -> None:
    """A run whose checkpoints have 1 MiB each (4 bytes a value and two moments of 4, and 4 of the average), and a result of a quarter of it."""
    model = torch.nn.Linear(values - 1, 1, device="meta")
    checkpoint_space.check(str(out), model, OptimConfig(lr=1), CheckpointConfig(every=10, keep=keep), steps, 0.9, result, intermediate)


def test_all_that_is_kept_at_one_time_must_fit(disk):
    folder = disk(4.4)  # of what is counted five hundredths are the files' own
    start(folder, keep=2, steps=1000)
    with pytest.raises(SpaceError, match=r"up to 5 checkpoints of 0\.00105 GB \(the 3 newest, the best .*Set checkpoint\.keep=1 for 0\.0022 GB less"):
        start(folder, keep=3, steps=1000)
    start(folder, keep=3, steps=30)  # three in all


def test_the_result_comes_when_nothing_is_being_written_any_more(disk):
    folder = disk(1.2)
    start(folder, keep=1, steps=10, result=torch.bfloat16)
    with pytest.raises(SpaceError, match=r"in the end the result of 0\.000262 GB beside 1 of them\..*Make room, or choose another out="):
        start(folder, keep=1, steps=10)


def test_what_is_there_counts(disk):
    folder = disk(4.4)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "a").write_bytes(bytes(2 * MIB))
    start(folder, keep=2, steps=1000)
    (folder / "filler").write_bytes(bytes(MIB))
    with pytest.raises(SpaceError, match=r"Of that 0\.0021 GB are there, and 0\.00147 GB are free"):
        start(folder, keep=2, steps=1000)


def test_loras_of_steps_count_besides(disk):
    folder = disk(4.4)
    start(folder, keep=1, steps=1000, intermediate=3)
    with pytest.raises(SpaceError, match=r"beside 2 of them, besides 8 LoRAs of intermediate steps\. Of that"):
        start(folder, keep=1, steps=1000, intermediate=8)
    (folder / "steps/000010").mkdir(parents=True)
    (folder / "steps/000010/a").write_bytes(bytes(MIB // 4))
    with pytest.raises(SpaceError, match=r"Of that 0\.000262 GB are there"):
        start(folder, keep=1, steps=1000, intermediate=8)
