"""recover on one, two and four processes sees the same samples and noise at every step, and ends within rounding; whole and sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file

from dev2pro.training import plateau

ROOT = Path(__file__).resolve().parents[2]
ARGS = ["experiment=miniature", "steps=3", "batch=8", "probe.samples=8", "hardware.micro_batch=2", "data.flip=true", "data.crop=random"]
WITNESS = """
import hashlib, json, os, sys
sys.path.insert(0, os.getcwd())
from dev2pro.models import encodings
from dev2pro.training import feed
from stages import recover
draw, encode, batches, build = encodings.noise_batch, feed.encode, [], recover.Training
def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
def record_encode(batch, *rest):
    batches.append(batch)
    return encode(batch, *rest)
def record_noise(batch, empty, scheduler, dropout, seed, step, slots, **more):
    if step == int(os.environ["STOP_AT"]):
        os._exit(9)
    noised, source = draw(batch, empty, scheduler, dropout, seed, step, slots, **more), batches[-1]
    with open(os.environ["WITNESS"] + os.environ.get("RANK", "0"), "a") as file:
        for i, slot in enumerate(slots):
            tensors = source.pixels[i], noised.noise[i], noised.t[i], noised.conditioning.prompt[i]
            file.write(json.dumps([step, slot, source.rows[i], source.captions[i], *map(sha256, tensors)]) + "\\n")
    return noised
def record_types(*args, **named):
    training = build(*args, **named)
    with open(os.environ["WITNESS"].replace("seen-", "types-") + os.environ.get("RANK", "0"), "a") as file:
        file.write(" ".join(sorted({type(p.data).__name__ for p in training.parameters})) + "\\n")
    return training
encodings.noise_batch, feed.encode, recover.Training = record_noise, record_encode, record_types
recover.frame.main("recover", recover.RecoverConfig, recover.run)
"""


def start(folder: Path, ranks: int, *args: str, stop_at: int = 99) -> int:
    """Runs recover with a script that records batches and may end the process before a step; the exit code."""
    (folder / "witness.py").write_text(WITNESS)
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *starter, str(folder / "witness.py"), *ARGS, *args, f"out={folder}/out"]
    env = {**os.environ, "WITNESS": f"{folder}/seen-", "STOP_AT": str(stop_at)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, env=env).returncode


def read_run(folder: Path) -> tuple[list[float], dict, list]:
    """(losses, weights, what every slot of every step was given)."""
    losses = [json.loads(line)["loss"] for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    lines = {line for file in folder.glob("seen-*") for line in file.read_text().splitlines()}  # a step that is done again sees the same again
    seen = sorted(json.loads(line) for line in lines)
    return losses, load_file(folder / "out/transformer/diffusion_pytorch_model.safetensors"), seen


def same(one: tuple[list[float], dict, list], other: tuple[list[float], dict, list]) -> None:
    assert [(step, slot) for step, slot, *_ in one[2]] == [(step, slot) for step in range(3) for slot in range(8)]
    assert one[2] == other[2]
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    furthest = max((one[1][k] - other[1][k]).abs().max().item() for k in one[1])
    assert furthest < 1e-4


def types(folder: Path) -> list[str]:
    """What each training's weights were, rank by rank: Tensor, or DTensor where they are sharded."""
    return [line for file in sorted(folder.glob("types-*")) for line in file.read_text().splitlines()]


def same_previews(one: Path, other: Path) -> None:
    for name in ("000000.jpg", "000003.jpg"):
        pictures = [Image.open(folder / "out/previews" / name) for folder in (one, other)]
        assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 0.1  # of 255


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert start(folder, 1) == 0
    return folder


@pytest.fixture(scope="module")
def alone(undisturbed):
    return read_run(undisturbed)


@pytest.mark.parametrize(
    ("ranks", "shard"),
    [pytest.param(2, "false", marks=[pytest.mark.slow, pytest.mark.ci]), pytest.param(4, "false", marks=pytest.mark.slow), (2, "true")],
)
def test_ranks_see_the_same_and_end_within_rounding(alone, undisturbed, ranks, shard, tmp_path):
    assert start(tmp_path, ranks, f"hardware.shard={shard}") == 0
    assert types(tmp_path) == ["DTensor" if shard == "true" else "Tensor"] * ranks
    same(read_run(tmp_path), alone)
    same_previews(tmp_path, undisturbed)


def test_ranks_end_together_at_the_plateau(tmp_path):
    """What is measured is shared before it is judged: a rank that ended alone would leave the other waiting until the time limit."""
    args = ["steps=120", "probe.every=4", "probe.bins=2", "preview.pictures=0", "optim.schedule=constant", "ema=0.9", "stop=0.5"]
    assert start(tmp_path, 2, *args) == 0
    written = json.loads((tmp_path / "out/artifact.json").read_text())
    done, curve = written["step"], written["metrics"]["curve"]
    assert done < written["metrics"]["stopped"]["of_steps"] == 120
    ends = [point["step"] for end, point in enumerate(curve, 1) if plateau.reached(curve[:end], 120, 0.5)]
    assert ends == [done], "at the first measurement that says so"
    for rank in range(2):
        steps = {json.loads(line)[0] for line in (tmp_path / f"seen-{rank}").read_text().splitlines()}
        assert steps == set(range(done))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "shard"), [(2, 1, "false"), (2, 1, "true"), (2, 4, "true"), (1, 2, "true")])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(alone, before, after, shard, tmp_path):
    args = ["checkpoint.every=1", "probe.every=1"]  # every checkpoint comes after a measurement
    assert start(tmp_path, before, *args, f"hardware.shard={shard if before > 1 else 'false'}", stop_at=2) != 0
    assert {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-1"}  # the one of step 2 may be half written
    assert start(tmp_path, after, *args, f"hardware.shard={shard if after > 1 else 'false'}") == 0
    same(read_run(tmp_path), alone)
