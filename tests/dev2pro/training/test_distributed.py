"""What hardware can be, and how ranks share a batch."""

from itertools import pairwise

import pytest

from dev2pro.errors import ConfigError
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig


class Rank:
    """The attributes of an Accelerator that rank_slots uses."""

    def __init__(self, process_index: int, num_processes: int) -> None:
        self.process_index, self.num_processes = process_index, num_processes


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_slot_once_and_in_order(ranks, micro_batch):
    parts = [part for rank in range(ranks) for part in distributed.rank_slots(12, HardwareConfig(micro_batch=micro_batch), Rank(rank, ranks))]
    assert [slot for part in parts for slot in part] == list(range(12))
    assert max(map(len, parts)) == min(micro_batch, 12 // ranks)
    assert all(a.stop == b.start for a, b in pairwise(parts))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float8"}, r"hardware\.dtype=float8 is unknown. Choose one of float32, bfloat16"),
        ({"device": "cuda:1"}, r"hardware\.device=cuda:1 is unknown.*CUDA_VISIBLE_DEVICES"),
        ({"device": "cpu", "shard": True}, r"hardware\.shard=true needs several processes.*torchrun"),
    ],
)
def test_hardware_that_this_machine_has_not(values, message):
    with pytest.raises(ConfigError, match=message):
        distributed.accelerator(HardwareConfig(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shard": True, "dtype": "bfloat16"}, r"hardware\.shard=true keeps float32 weights"),
        ({"shard": True, "ema_offload": True}, r"hardware\.ema_offload=true is for one GPU"),
        ({"shard": True, "replicas": 3}, r"hardware\.replicas=3 cannot divide 4 processes"),
        ({"shard": True, "replicas": 4}, r"hardware\.replicas=4 cannot divide 4 processes into rows of several"),
        ({"replicas": 2}, r"hardware\.replicas=2 counts copies of a sharded model"),
    ],
)
def test_shardings_that_cannot_be(values, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=message):
        distributed.accelerator(HardwareConfig(device="cpu", **values))


@pytest.mark.parametrize(("batch", "ranks"), [(4, 2), (5, 1)])
def test_a_step_inside_the_backward_pass_needs_one_micro_batch_on_one_rank(batch, ranks):
    with pytest.raises(ConfigError, match=rf"batch={batch} needs {ranks} processes.*Set batch=4, or hardware\.step_in_backward=false"):
        distributed.rank_slots(batch, HardwareConfig(micro_batch=4, step_in_backward=True), Rank(0, ranks))


def test_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"batch=7 cannot be shared by 2 processes\. Choose a multiple of 2"):
        distributed.rank_slots(7, HardwareConfig(micro_batch=4), Rank(0, 2))
