"""recover over HTTP from a server that goes wrong, killed at random moments, ends with the weights of an undisturbed run from the disk."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dev2pro.errors import TryAgainError
from tests.servers import Fault, Server

ROOT = Path(__file__).resolve().parents[2]
INK = ROOT / "data/miniature/shards/ink"
FAULTS = [503, 429, Fault(status=500, headers={"Retry-After": "0"}), "reset", "reset middle", "short", "corrupt", "stall middle"]
WORDS = [
    "experiment=miniature",
    "batch=8",
    "hardware.micro_batch=4",
    "probe.every=30",
    "probe.samples=8",
    "checkpoint.every=7",
    "data.flip=true",
    "data.crop=random",
    "data.read.workers=2",
    "data.read.idle_timeout=1",
    "data.read.hedge=0.5",
    "data.read.retries=9",
]  # fmt: skip  (mirroring is drawn, so nothing can be encoded ahead and every step reads)


def words_for(out: Path, source: str, steps: int = 24) -> list[str]:
    return [
        *WORDS,
        f"steps={steps}",
        f"data.train=['{source}/train-{{000000,000001}}.tar']",
        f"data.heldout=['{source}/heldout-000000.tar']",
        f"out={out}",
    ]


def command(out: Path, source: str, steps: int = 24) -> list[str]:
    return [sys.executable, "-m", "stages.recover", *words_for(out, source, steps)]


def weights(out: Path) -> bytes:
    return (out / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(out: Path) -> list[int]:
    """The steps of whole checkpoints."""
    names = [folder.name.removeprefix("checkpoint-") for folder in out.glob("checkpoint-*")]
    return [int(name) for name in names if name.isdigit()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], Path]:
    """The folder of a run of so many steps from the disk."""

    @functools.cache
    def run(steps: int) -> Path:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        subprocess.run(command(out, str(INK), steps), cwd=ROOT, check=True, capture_output=True, timeout=300)
        return out

    return run


class Weather:
    """Faults for one request in six, of every transient kind in turn; retries meet them as well."""

    def __init__(self) -> None:
        self.dice, self.met = random.Random(0), list[object]()

    def __call__(self, path: str, number: int, ranges: str) -> Fault | str | int | None:
        if not path.endswith(".tar") or self.dice.random() > 1 / 6:
            return None
        self.met.append(FAULTS[len(self.met) % len(FAULTS)])
        return self.met[-1]


@pytest.mark.parametrize(("kills", "steps"), [(2, 24), pytest.param(5, 45, marks=pytest.mark.slow)])
def test_kills_and_a_failing_server_change_nothing(kills, steps, undisturbed, tmp_path):
    folder, weather, dice = shutil.copytree(INK, tmp_path / "served"), Weather(), random.Random(1)
    out, killed, ends = tmp_path / "out", [], []
    with Server(folder, faults=weather) as server:
        while ends.count(TryAgainError.exit_code) == len(ends) < 4:  # a picture may be damaged twice: then it is tried again, as it asks for
            args = command(out, server.url, steps)
            child = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
            if len(killed) < kills:
                goal = dice.randint(len(killed) * 5 + 2, len(killed) * 5 + 6)
                while child.poll() is None and (steps_done(out) < goal or (len(killed) == kills - 1 and not saved(out))):
                    time.sleep(0.02)
                time.sleep(dice.uniform(0, 0.1))
                if child.poll() is None:  # it has not ended by itself, of a picture that was damaged twice
                    killed.append(steps_done(out))
                    os.killpg(child.pid, signal.SIGKILL)
                    child.communicate()
                    continue
            output, _ = child.communicate(timeout=300)
            ends.append(child.returncode)
    assert ends[-1] == 0, output.decode()
    assert sorted(set(killed)) == killed  # every kill came later than the one before: the run went on
    assert killed[-1] < steps
    assert b"going on after step" in output
    assert len({str(fault) for fault in weather.met}) == len(FAULTS)
    assert weights(out) == weights(undisturbed(steps))
    losses = [[json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (out, undisturbed(steps))]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps
    assert [folder.name for folder in out.glob("checkpoint-*")] == [f"checkpoint-{steps}"]  # from which more steps could go on


def test_a_server_that_stays_away_ends_the_run_with_try_again_and_the_checkpoint_intact(undisturbed, tmp_path, run_stage):
    folder, out, steps = shutil.copytree(INK, tmp_path / "served"), tmp_path / "out", 24
    args = ["data.read.retries=1", "data.read.workers=1"]
    with Server(folder) as server:
        server.faults = lambda path, number, ranges: 503 if steps_done(out) >= 10 and path.endswith(".tar") else None
        code, stderr = run_stage("recover", *words_for(out, server.url), *args)
        assert code == 75, stderr
        assert "train-00000" in stderr
        assert "could not be read in 2 tries" in stderr
        assert "Traceback" not in stderr
        assert 7 <= max(saved(out)) <= steps_done(out) < steps
        server.faults = None
        code, stderr = run_stage("recover", *words_for(out, server.url), *args)
        assert code == 0, stderr
    assert weights(out) == weights(undisturbed(steps))


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (lambda folder: (folder / "train-000001.tar.index").unlink(), ["is not indexed", "python -m data.index"]),
        (
            lambda folder: (folder / "train-000001.tar").write_bytes((folder / "train-000001.tar").read_bytes()[:-512]),
            ["changed since it was indexed"],
        ),
        (lambda folder: (folder / "train-000001.tar").unlink(), ["Correct the"]),
    ],
    ids=["unindexed", "changed", "missing"],
)
@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_that_cannot_be_trusted_is_refused_before_the_model_is_loaded(tmp_path, spoil, messages, remote, run_stage):
    folder = shutil.copytree(INK, tmp_path / "served")
    spoil(folder)
    with Server(folder) as server:
        code, stderr = run_stage("recover", *words_for(tmp_path / "out", server.url if remote else str(folder)))
    assert code == 3
    assert "train-000001.tar" in stderr
    assert all(message in stderr for message in messages)
    assert "Traceback" not in stderr
    assert not (tmp_path / "out/config.json").exists()  # it comes before the model
