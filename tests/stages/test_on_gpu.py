"""A stage on GPUs: killed and started again, and sharded over as many as there are; `make gpu PIECE=tests`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
ARGS = [
    "experiment=miniature", "steps=12", "batch=16", "probe.every=4", "probe.samples=8", "checkpoint.every=4", "preview.pictures=0",
    "hardware.device=auto", "hardware.mixed_precision=bf16",
]  # fmt: skip
WITNESS = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from dev2pro.training import sharding
from stages import recover
shard = sharding.shard
def noted(model, mesh, compute):
    shard(model, mesh, compute)
    Path(os.environ["WITNESS"] + os.environ["RANK"]).write_text(f"{type(model).__name__} {mesh.device_type} {mesh.size()} {compute}")
sharding.shard = noted
recover.frame.main("recover", recover.RecoverConfig, recover.run)
"""


def losses(out: Path) -> dict[int, float]:
    """step -> loss, of complete lines."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if "gradient_norm" in row}


def finished(command: list[str], **environment: str) -> str:
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_a_killed_run_goes_on_within_rounding(tmp_path):
    command = [sys.executable, "-m", "stages.recover", *ARGS]
    finished([*command, f"out={tmp_path}/whole"])
    assert torch.cuda.is_available()
    killed = subprocess.Popen([*command, f"out={tmp_path}/killed"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (tmp_path / "killed/checkpoint-4").is_dir():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/artifact.json").exists()
    finished([*command, f"out={tmp_path}/killed"])
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert list(again) == list(whole) == list(range(1, 13))
    assert list(again.values()) == pytest.approx(list(whole.values()), rel=0.02)  # flash attention's gradients differ in their last bits


def test_sharded_over_all_gpus_it_trains_as_one(tmp_path):
    cards = torch.cuda.device_count()
    if cards < 2:
        pytest.skip("needs two GPUs")
    args = [*ARGS, f"batch={4 * cards}", "hardware.micro_batch=2"]
    finished([sys.executable, "-m", "stages.recover", *args, f"out={tmp_path}/one"])
    (tmp_path / "witness.py").write_text(WITNESS)
    ranks = [sys.executable, "-m", "dev2pro.ranks", f"--nproc-per-node={cards}", str(tmp_path / "witness.py")]
    finished([*ranks, *args, "hardware.shard=true", f"out={tmp_path}/many"], WITNESS=f"{tmp_path}/rank-")
    seen = [(tmp_path / f"rank-{rank}").read_text() for rank in range(cards)]
    assert seen == [f"FSDPFluxTransformer2DModel cuda {cards} torch.bfloat16"] * cards
    assert list(losses(tmp_path / "many").values()) == pytest.approx(list(losses(tmp_path / "one").values()), rel=0.02)
