"""encode: on one rank and on two, killed and gone on, to a folder and to s3; and training on what it stored."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from data import index
from data.shards import snapshot
from data.storage.transport import ReadConfig, Transport
from tests.servers import moto
from tests.shards import jpeg, tar

ROOT = Path(__file__).resolve().parents[2]
FORM = ["resolution=32", "bucket_step=8", "aspect=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A snapshot of four shards of pictures in three forms, and of a first one whose pictures are all too small for it."""
    folder, transport = tmp_path_factory.mktemp("shards"), Transport(ReadConfig())
    for number in range(5):
        members = []
        for row in range(8):
            width, height = [(40, 40), (64, 40), (40, 64)][row % 3] if number else (20, 20)
            members += [(f"{row}.jpg", jpeg(8 * number + row, width, height)), (f"{row}.txt", b"a handwritten %d" % row)]
        (folder / f"{number}.tar").write_bytes(tar(members))
        assert not index.index(f"{folder}/{number}.tar", transport).error
    built = snapshot.build([f"{folder}/{number}.tar" for number in range(5)], transport, filters=snapshot.Filters(min_side=40))
    built.write(f"{folder}/all.snapshot")
    return folder / "all.snapshot"


def words_for(shards: Path, out: Path, to: str, *args: str) -> list[str]:
    given = ["model=miniature", "hardware=cpu", "parts=[latents,text]", "read.workers=0", *FORM, *args]
    return [f"shards=['{shards}']", f"out={out}", f"to={to}", *given]


def command(shards: Path, out: Path, to: str, ranks: int) -> list[str]:
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *starter, "-m", "stages.encode", *words_for(shards, out, to)]


def run(args: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def encoded(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    done = run(command(shards, folder / "out", f"{folder}/to", 1))
    assert done.returncode == 0, done.stderr
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("to/*.tar"))}


@pytest.mark.slow
@pytest.mark.ci
def test_two_ranks_killed_and_gone_on_write_the_same_shards(shards, encoded, tmp_path):
    args = command(shards, tmp_path / "out", f"{tmp_path}/to", 2)
    child = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not tars(tmp_path):
        time.sleep(0.005)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done_before = {name: (tmp_path / "to" / name).stat().st_mtime_ns for name in tars(tmp_path) if (tmp_path / f"to/{name}.index").exists()}
    done = run(args)
    assert done.returncode == 0, done.stderr
    assert tars(tmp_path) == tars(encoded)
    assert len(tars(tmp_path)) == 5
    assert all((tmp_path / "to" / name).stat().st_mtime_ns == when for name, when in done_before.items())
    assert not list(tmp_path.rglob("*.partial"))
    records = [json.loads((folder / "out/artifact.json").read_text()) for folder in (tmp_path, encoded)]
    assert records[0]["parents"] == records[1]["parents"]


def lora_on(snapshot_path: Path, out: Path, *args: str) -> list[str]:
    return [
        "experiment=miniature", "trained_on=data/miniature/pipeline", "arm=x", "steps=3", "probe.samples=4", "data.aspect=2", "batch=4",
        f"data.train=['{snapshot_path}']", f"out={out}", *args,
    ]  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_on_what_was_stored_is_training_on_the_pictures(encoded, tmp_path, run_stage):
    losses_by_stored = []
    for number, stored in enumerate(("", "latents", "latents,text")):
        code, stderr = run_stage("lora", *lora_on(encoded / "out/encoded.snapshot", tmp_path / str(number), f"data.stored=[{stored}]"))
        assert code == 0, stderr
        losses_by_stored.append(losses(tmp_path / str(number)))
    assert losses_by_stored[1] == pytest.approx(losses_by_stored[0], rel=1e-4)  # another batch in the VAE
    assert losses_by_stored[2] == losses_by_stored[1]


def recover_on(snapshot_path: Path, out: Path, *args: str) -> list[str]:
    return [
        "experiment=miniature", "steps=2", "probe.samples=4", "preview.pictures=0", "data.aspect=2", "batch=4", f"data.train=['{snapshot_path}']",
        "data.stored=[latents,text]", f"out={out}", *args,
    ]  # fmt: skip


@pytest.fixture
def _any_precision() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_any_precision")
def test_what_was_stored_under_one_hardware_file_is_read_under_another(shards, tmp_path, run_stage):
    """gpu80 has bfloat16 weights, gpu8 float32 ones that it computes with in bfloat16; both encode in bfloat16. Here they run on the CPU."""
    code, stderr = run_stage("encode", *words_for(shards, tmp_path / "out", f"{tmp_path}/to", "hardware=gpu80", "hardware.device=cpu"))
    assert code == 0, stderr
    AcceleratorState._reset_state()
    gpu8 = ["hardware=gpu8", "hardware.device=cpu", "hardware.shard=false"]
    code, stderr = run_stage("recover", *recover_on(tmp_path / "out/encoded.snapshot", tmp_path / "read", *gpu8))
    assert code == 0, stderr
    assert len(losses(tmp_path / "read")) == 2
    config = json.loads((tmp_path / "read/artifact.json").read_text())["config"]["hardware"]
    assert (config["dtype"], config["mixed_precision"], config["encoder_dtype"]) == ("float32", "bf16", "bfloat16")
    for word, message in (
        ("encoder_dtype=float32", "dtype is bfloat16 there and float32 here"),
        ("int8_encoders=true", "int8 is None there and True"),
    ):
        code, stderr = run_stage("recover", *recover_on(tmp_path / "out/encoded.snapshot", tmp_path / word[:4], *gpu8, f"hardware.{word}"))
        assert code == 3
        assert message in stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data.stored=[latents]", "data.aspect=1"], "The stored latents were made in another way (sizes is"),
        (
            ["data.stored=[text]", "model.max_sequence_length=9"],
            "The stored text were made in another way (max_sequence_length is 8 there and 9 here)",
        ),
    ],
)
def test_what_was_made_in_another_way_is_refused(encoded, tmp_path, args, message, run_stage):
    code, stderr = run_stage("lora", *lora_on(encoded / "out/encoded.snapshot", tmp_path / "out", *args))
    assert code == 3
    assert message in stderr
    assert "Traceback" not in stderr


def test_another_way_into_the_same_place_is_refused(shards, encoded, tmp_path, run_stage):
    code, stderr = run_stage("encode", *words_for(shards, tmp_path / "out", f"{encoded}/to", "parts=[latents]"))
    assert code == 2
    assert "000001.tar was encoded in another way" in stderr
    code, stderr = run_stage("encode", *words_for(shards, tmp_path / "out", f"{encoded}/to", "parts=[thoughts]"))
    assert code == 2
    assert "parts=['thoughts'] cannot be encoded. Choose among latents, text" in stderr


def test_to_s3_and_back(shards, tmp_path, run_stage):
    with moto() as store:
        code, stderr = run_stage("encode", *words_for(shards, tmp_path / "out", f"s3://{store.name}/encoded"))
        assert code == 0, stderr
        code, stderr = run_stage("lora", *lora_on(tmp_path / "out/encoded.snapshot", tmp_path / "lora", "data.stored=[latents]"))
        assert code == 0, stderr
    record = json.loads((tmp_path / "out/artifact.json").read_text())
    assert record["kind"] == "encodings"
