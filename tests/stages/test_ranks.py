"""recover on one, two and four processes sees the same samples and noise at every step, and ends within rounding; whole and sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["experiment=miniature", "steps=3", "batch=8", "probe.samples=8", "hardware.micro_batch=2", "data.flip=true", "data.crop=random"]
WITNESS = """
import hashlib, json, os, sys
sys.path.insert(0, os.getcwd())
from dev2pro import encodings, feed
from stages import recover
drawn, encode, batches = encodings.noised, feed.encode, []
def seen(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
def watched_encode(batch, *rest):
    batches.append(batch)
    return encode(batch, *rest)
def watched(batch, empty, scheduler, dropout, seed, step, slots):
    if step == int(os.environ["STOP_AT"]):
        os._exit(9)
    made, source = drawn(batch, empty, scheduler, dropout, seed, step, slots), batches[-1]
    with open(os.environ["WITNESS"] + os.environ.get("RANK", "0"), "a") as file:
        for i, slot in enumerate(slots):
            said = [step, slot, source.rows[i], source.captions[i], *map(seen, (source.pixels[i], made.noise[i], made.t[i], made.said.prompt[i]))]
            file.write(json.dumps(said) + "\\n")
    return made
encodings.noised, feed.encode = watched, watched_encode
recover.stage.main("recover", recover.RecoverConfig, recover.run)
"""


def start(place: Path, ranks: int, *words: str, stop_at: int = 99) -> int:
    """Runs recover with a witness that looks on and changes nothing, but for ending the process before a step; the exit code."""
    (place / "witness.py").write_text(WITNESS)
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *starter, str(place / "witness.py"), *WORDS, *words, f"out={place}/out"]
    env = {**os.environ, "WITNESS": f"{place}/seen-", "STOP_AT": str(stop_at)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, env=env).returncode


def found(place: Path) -> tuple[list[float], dict, list]:
    """(losses, weights, what every slot of every step was given)."""
    losses = [json.loads(line)["loss"] for line in (place / "out/metrics.jsonl").read_text().splitlines()]
    lines = {line for file in place.glob("seen-*") for line in file.read_text().splitlines()}  # a step that is done again sees the same again
    seen = sorted(json.loads(line) for line in lines)
    return losses, load_file(place / "out/transformer/diffusion_pytorch_model.safetensors"), seen


def same(one: tuple[list[float], dict, list], other: tuple[list[float], dict, list]) -> None:
    assert [(step, slot) for step, slot, *_ in one[2]] == [(step, slot) for step in range(3) for slot in range(8)]
    assert one[2] == other[2]
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    furthest = max((one[1][k] - other[1][k]).abs().max().item() for k in one[1])
    assert furthest < 1e-4


def same_previews(one: Path, other: Path) -> None:
    for name in ("000000.jpg", "000003.jpg"):
        pictures = [Image.open(place / "out/previews" / name) for place in (one, other)]
        assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 0.1  # of 255


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("alone")
    assert start(place, 1) == 0
    return place


@pytest.fixture(scope="module")
def alone(undisturbed):
    return found(undisturbed)


@pytest.mark.parametrize(("ranks", "shard"), [(2, "false"), (4, "false"), (2, "true")])
def test_ranks_see_the_same_and_end_within_rounding(alone, undisturbed, ranks, shard, tmp_path):
    assert start(tmp_path, ranks, f"hardware.shard={shard}") == 0
    same(found(tmp_path), alone)
    same_previews(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "shard"), [(2, 1, "false"), (2, 1, "true"), (2, 4, "true"), (1, 2, "true")])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(alone, before, after, shard, tmp_path):
    words = ["checkpoint.every=1"]
    assert start(tmp_path, before, *words, f"hardware.shard={shard if before > 1 else 'false'}", stop_at=2) != 0
    assert {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-1"}  # the one of step 2 may be half written
    assert start(tmp_path, after, *words, f"hardware.shard={shard if after > 1 else 'false'}") == 0
    same(found(tmp_path), alone)
