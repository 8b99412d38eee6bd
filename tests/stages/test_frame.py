import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dev2pro.artifacts import run_folder
from dev2pro.artifacts.record import ROOT, Artifact
from dev2pro.errors import DataError, DivergedError, TryAgainError
from stages import frame, recover


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    stderr: str

    @property
    def paragraph(self) -> str:
        """stderr, which must be one paragraph without a traceback."""
        assert "Traceback" not in self.stderr
        assert "\n\n" not in self.stderr.strip()
        return self.stderr.strip()


@pytest.fixture
def overrides(tiny, tiny_data, tmp_path) -> dict[str, str]:
    """A recovery of two steps."""
    return {
        "out": f"{tmp_path}/out", "model.path": str(tiny), "model.max_sequence_length": "8", "hardware": "cpu", "data.train": f"[{tiny_data}/folder]",
        "data.heldout": f"[{tiny_data}/heldout.tar]", "data.resolution": "32", "data.bucket_step": "8", "data.read.cache": f"{tmp_path}/cache",
        "data.read.workers": "0", "steps": "2", "batch": "4", "optim.warmup": "0", "probe.bins": "2", "save_dtype": "float32",
    }  # fmt: skip


def command(overrides: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


@pytest.fixture
def run(monkeypatch, capfd) -> Iterator[Callable[..., End]]:
    """Runs the recover stage's command in this process, as far as its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def started(overrides: dict[str, str], work: Callable[[recover.RecoverConfig], Artifact] = recover.run) -> End:
        monkeypatch.setattr(sys, "argv", ["recover.py", *command(overrides)])
        capfd.readouterr()  # output of the fixtures
        with pytest.raises(SystemExit) as end:
            frame.main("recover", recover.RecoverConfig, work)
        return End(end.value.code, capfd.readouterr().err)

    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_done_then_skipped_then_refused_to_another_configuration(run, overrides, tmp_path, capfd):
    def work(config: recover.RecoverConfig) -> Artifact:
        artifacts.append(recover.run(config))
        return artifacts[-1]

    artifacts: list[Artifact] = []
    assert run(overrides, work).code == 0
    weights = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["step"] for row in artifacts[0].metrics["curve"]] == [0, 2]
    assert artifacts[0].command == command(overrides)  # so that a flow can tell that it stands
    assert run_folder.up_to_date(artifacts[0].uri, command(overrides)) == artifacts[0]

    assert run(overrides, work).code == 0
    assert artifacts[1] == artifacts[0]
    assert weights.stat().st_mtime_ns == written

    end = run(overrides | {"steps": "1"}, work)
    assert end.code == 2
    assert "steps is 2 there and 1 here" in end.paragraph

    again = overrides | {"out": f"{tmp_path}/again"}
    assert run(again, work).code == 0
    assert artifacts[2].id == artifacts[0].id  # the same weights, bit for bit


def test_more_steps_go_on_from_a_finished_run(run, overrides, tmp_path):
    longer = overrides | {"steps": "5", "optim.schedule": "constant"}
    assert run(longer | {"steps": "2"}).code == 0
    assert run(longer).code == 0
    assert run(longer | {"out": f"{tmp_path}/whole"}).code == 0
    one, other = ((tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == other
    rows = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5]
    assert [file.name for file in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-5"]

    for folder in (tmp_path / "out").glob("checkpoint*"):
        shutil.rmtree(folder)
    end = run(longer | {"steps": "6"})
    assert end.code == 2
    assert "has finished 5 steps, and the checkpoint it would go on from was removed" in end.paragraph


HOLDER = """
import sys
from pathlib import Path
from dev2pro.artifacts import run_folder
run_folder._wait_for_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_work_in_one_folder(run, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.0)
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, overrides["out"]], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    end = run(overrides)
    assert end.code == 75
    assert f"Another process works in out={overrides['out']}" in end.paragraph
    holder.kill()
    holder.wait()
    assert run(overrides).code == 0


def test_a_process_says_done_and_where(overrides):
    done = start(overrides | {"steps": "1"})
    assert done.returncode == 0, done.stderr
    assert f"recover: done, {overrides['out']}/artifact.json (transformer " in done.stdout


def start(overrides: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "stages.recover", *command(overrides)], cwd=ROOT, capture_output=True, text=True, timeout=120)


# ---- bad configuration: 2 ------------------------------------------------------------------------------------------------------------


def test_a_process_ends_with_the_exit_code_of_a_bad_configuration(overrides, tmp_path):
    done = start(overrides | {"model.path": f"{tmp_path}/nothing"})
    assert done.returncode == 2
    assert f"The model folder {tmp_path}/nothing does not exist" in End(2, done.stderr).paragraph
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"stpes": "3"}, "stpes"), ({"optim.rate": "1"}, "rate"), ({"hardware": "gpu9000"}, "gpu9000"), ({"experiment": "nothing"}, "nothing")],
)
def test_a_misspelt_key_or_choice(run, overrides, wrong, named):
    end = run(overrides | wrong)
    assert end.code == 2
    assert named in end.paragraph


@pytest.mark.parametrize("wrong", ["steps=many", "optim.lr=fast", "model.path={a:b}", "data.train={a:b}", "hardware.shard=7.5"])
def test_a_value_of_the_wrong_type(run, overrides, wrong):
    key, value = wrong.split("=")
    end = run(overrides | {key: value})
    assert end.code == 2
    assert key in end.paragraph


@pytest.mark.parametrize("missing", ["out", "data.train"])
def test_a_missing_value(run, overrides, missing):
    del overrides[missing]
    end = run(overrides)
    assert end.code == 2
    assert f"were not given: {missing}. Add for example {missing}=" in end.paragraph


def test_a_model_without_a_guidance_input(run, overrides, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = model / "transformer/config.json"
    config.write_text(config.read_text().replace('"guidance_embeds": true', '"guidance_embeds": false'))
    end = run(overrides | {"model.path": str(model)})
    assert end.code == 2
    assert "no guidance input" in end.paragraph


@pytest.mark.parametrize(
    "wrong",
    [
        *("optim.name=sgd", "optim.schedule=wavy", "save_dtype=int4", "hardware.dtype=int4", "hardware.mixed_precision=bf61"),
        *("data.resolution=30", "data.resolution=0", "steps=0", "batch=0", "hardware.micro_batch=0"),
        *("probe.every=0", "probe.bins=0", "probe.samples=0", "caption_dropout=1.5", "ema=1.5"),
    ],
)
def test_a_value_that_cannot_work(run, overrides, wrong):
    key, value = wrong.split("=")
    end = run(overrides | {key: value})
    assert end.code == 2
    assert key.rpartition(".")[2] in end.paragraph
    assert value in end.paragraph
    assert not list((Path(overrides["out"])).glob("transformer"))


# ---- bad data: 3 -----------------------------------------------------------------------------------------------------------------------


def test_no_pictures(run, overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    end = run(overrides | {"data.train": f"[{tmp_path}/empty]"})
    assert end.code == 3
    assert "data.train" in end.paragraph
    assert f"{tmp_path}/empty holds no pictures" in end.paragraph


def test_a_picture_without_a_caption(run, overrides, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_data / "folder", tmp_path / "folder")
    (folder / "0003.txt").unlink()
    end = run(overrides | {"data.train": f"[{folder}]"})
    assert end.code == 3
    assert f"{folder}/0003.png: it has no caption; write what it shows into 0003.txt" in end.stderr


def test_a_picture_that_cannot_be_read(run, overrides, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_data / "folder", tmp_path / "folder")
    (folder / "0003.png").write_bytes((folder / "0003.png").read_bytes()[:500])
    end = run(overrides | {"data.train": f"[{folder}]"})
    assert end.code == 3
    assert f"{folder}/0003.png: its pixels cannot be decoded" in end.stderr


# ---- the other ends --------------------------------------------------------------------------------------------------------------------


def fail(error: Exception) -> Callable[[object], Artifact]:
    def work(_: object) -> Artifact:
        raise error

    return work


@pytest.mark.parametrize(("error", "code"), [(DataError("x"), 3), (DivergedError("x"), 5), (TryAgainError("x"), 75)])
def test_every_error_has_its_exit_code(run, overrides, error, code):
    end = run(overrides, fail(error))
    assert (end.code, end.paragraph) == (code, "recover: x")


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_full_disk(run, overrides, error):
    end = run(overrides, fail(error))
    assert end.code == 4
    assert "no space is left" in end.paragraph


@pytest.mark.parametrize("error", [ValueError("a bug"), PermissionError(13, "not yours")])
def test_a_bug_shows_where_it_is_and_is_no_success(run, overrides, error):
    end = run(overrides, fail(error))
    assert end.code == 1
    assert "Traceback" in end.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_stage_says_so(run, overrides, number):
    def work(_: object) -> Artifact:
        os.kill(os.getpid(), number)
        raise AssertionError("unreachable")

    end = run(overrides, work)
    assert end.code == 130
    assert "The same command goes on from the last checkpoint" in end.paragraph


def test_hydra_writes_nothing(run, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(overrides, fail(DataError("x")))
    assert list(tmp_path.iterdir()) == []
