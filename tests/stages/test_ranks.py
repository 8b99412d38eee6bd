"""recover on two processes, whole and sharded, sees the same samples and noise as on one, and ends at the same loss and weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["-m", "stages.recover", "experiment=miniature", "steps=3", "batch=8", "probe.samples=8", "hardware.micro_batch=2"]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def recovered(out: Path, *words: str) -> tuple[list[float], dict]:
    subprocess.run([sys.executable, *words, f"out={out}"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    rows = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(out / "transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return recovered(tmp_path_factory.mktemp("alone") / "out", *WORDS)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_ranks_do_what_one_does(alone, shard, tmp_path):
    losses, weights = recovered(tmp_path / "out", *RANKS, *WORDS, f"hardware.shard={shard}")
    assert losses == pytest.approx(alone[0], rel=1e-4)
    assert weights.keys() == alone[1].keys()
    furthest = max((weights[k] - alone[1][k]).abs().max().item() for k in weights)
    assert furthest < 1e-4
