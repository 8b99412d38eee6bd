"""FSDP2 on gloo ranks: what is sharded, in which precision ranks compute and exchange, and that it trains as one rank does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.errors import ConfigError
from dev2pro.models import flux1
from dev2pro.training import wrapping
from dev2pro.training.distributed import HardwareConfig
from tests import launch
from tests.dev2pro.training import ranks as worker

PLAIN = {"device": "cpu", "threads": 1, "micro_batch": 2, "gradient_checkpointing": True}
SHARDED = {**PLAIN, "shard": True}
MIXED = {**SHARDED, "mixed_precision": "bf16"}


def train(model: Path, out: Path, ranks: int, hardware: dict[str, Any], steps: int = worker.STEPS) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(what each rank saw, the averaged weights it saved)."""
    out.mkdir(exist_ok=True)
    words = [worker.__file__, str(model), str(out), json.dumps(hardware), str(steps)]
    launch.on_ranks(words, ranks) if ranks > 1 else launch.forks(words, [{}])
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)], weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "averages.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One rank, float32, and one rank that computes in bfloat16 over float32 weights."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(tiny, folder / name, 1, {**PLAIN, "mixed_precision": name}) for name in ("no", "bf16")}


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, *train(tiny, out, 2, SHARDED)


@pytest.fixture(scope="module")
def four(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("four"), 4, {**MIXED, "replicas": 2})


def test_weights_gradients_moments_and_average_are_sharded(two):
    for seen in two[1]:
        assert seen["sharded"]
        assert seen["types"] == seen["moments"] == ["DTensor"]
        assert seen["average"] == ["DTensor torch.float32"]
        assert seen["share"] == pytest.approx(1 / 2, abs=0.02)
        assert seen["checkpointing"]


def test_nothing_whole_is_held_between_micro_batches_or_after_a_measurement(two, four):
    assert all(seen["leftovers"] == [] for seen in (*two[1], *four[0]))


def test_two_sharded_ranks_train_as_one(two, alone):
    (one,), whole = alone["no"]
    for seen in two[1]:
        assert seen["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert seen["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert seen["measured"] == pytest.approx(one["measured"], rel=1e-4)
    assert furthest(two[2], whole) < 1e-4
    assert two[1][0]["in_block"] == {"weight": "torch.float32", "whole": True, "input": "torch.float32", "rope": "torch.float32"}


def test_bfloat16_over_float32_weights_on_two_machines_of_two(tiny, four, alone):
    (one,), whole = alone["bf16"]
    for seen in four[0]:
        assert seen["in_block"] == {"weight": "torch.bfloat16", "whole": True, "input": "torch.bfloat16", "rope": "torch.float32"}
        assert seen["dtypes"] == ["torch.float32"]
        assert seen["share"] == pytest.approx(1 / 2, abs=0.02)  # each machine has the whole model
        assert seen["losses"] == pytest.approx(one["losses"], rel=0.01)
    start = dict(flux1.load_transformer(str(tiny)).named_parameters())
    sharded_way, way, exact = (
        torch.cat([(run[name] - start[name]).detach().flatten() for name in start]) for run in (four[1], whole, alone["no"][1])
    )
    assert torch.cosine_similarity(sharded_way, way, dim=0) > 0.999  # bfloat16 itself turns it by more:
    assert torch.cosine_similarity(exact, way, dim=0) < 0.998


def test_gradients_are_reduced_in_float32_and_weights_gathered_in_bfloat16(four, two):
    assert four[0][0]["collectives"] == {
        "_allgather_base_": ["torch.bfloat16"], "_reduce_scatter_base_": ["torch.float32"], "allreduce_": ["torch.float32"],
    }  # fmt: skip
    assert two[1][0]["collectives"]["_reduce_scatter_base_"] == ["torch.float32"]


@pytest.mark.parametrize(("ranks", "hardware"), [(1, PLAIN), (4, SHARDED)], ids=["one rank", "four sharded ranks"])
def test_a_checkpoint_at_a_measured_step_goes_on_with_other_ranks(tiny, two, ranks, hardware, tmp_path):
    for checkpoint in two[0].glob("checkpoint-*"):
        if checkpoint.name <= "checkpoint-2":
            shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    seen, after = train(tiny, tmp_path, ranks, hardware)
    assert [one["start"] for one in seen] == [2] * ranks
    assert seen[0]["losses"] == pytest.approx(two[1][0]["losses"][2:], rel=1e-4)
    assert furthest(after, two[2]) < 1e-4


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("hardware", "shown"),
    [
        ({"int8_base": True, "dtype": "bfloat16"}, {"types": ["Int8Tensor", "Tensor"], "trained": ["Tensor"], "optimizer": "AdamW"}),
        ({"dtype": "bfloat16"}, {"types": ["Tensor"], "optimizer": "AdamW8bit", "dtypes": ["torch.bfloat16"]}),
        ({"float8": True}, {"types": ["Tensor"], "optimizer": "AdamW", "linear": ["Float8Linear", "Linear"]}),
    ],
    ids=["int8 base", "8-bit moments", "float8"],
)
def test_two_replicated_ranks_train_as_one(tiny, hardware, shown, tmp_path):
    start = dict(flux1.load_transformer(str(tiny)).named_parameters())
    (one,), whole = train(tiny, tmp_path / "one", 1, {**PLAIN, **hardware})
    both, averages = train(tiny, tmp_path / "two", 2, {**PLAIN, **hardware})
    for seen in both:
        assert shown.items() <= seen.items()
        assert seen["wrapper"] == "DistributedDataParallel"
        assert not seen["sharded"]
        assert seen["losses"] == pytest.approx(one["losses"], rel=0.02)
    before = {name: start.get(name, torch.zeros(())).detach() for name in whole}
    ways = [torch.cat([(run[name] - before[name]).flatten() for name in whole]) for run in (averages, whole)]
    assert torch.cosine_similarity(*ways, dim=0) > 0.9


def test_weights_are_read_from_several_files_with_a_variant(tiny, tmp_path):
    whole = flux1.load_transformer(str(tiny))
    shutil.copytree(tiny, tmp_path / "model")
    folder = tmp_path / "model/transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="200KB", variant="fp32")
    files = flux1.weight_files(str(tmp_path / "model"), "fp32")
    assert files.keys() == dict(whole.named_parameters()).keys()
    assert len(set(files.values())) > 2


def test_weights_that_lack_a_parameter_are_refused(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    rest = load_file(file)
    del rest["proj_out.bias"]
    save_file(rest, file)
    with pytest.raises(ConfigError, match=r"weights lack proj_out\.bias"):
        wrapping.load_transformer(str(tmp_path / "model"), HardwareConfig(shard=True), None)  # before anything is placed
