"""recover on two machines of two ranks each, which here are two `dev2pro.ranks` over loopback: one is lost, hangs or is asked to stop."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.servers import Fault, Server
from tests.stages import kin

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
ARGS = [
    "experiment=miniature", f"steps={STEPS}", "batch=8", "probe.every=8", "probe.samples=4", "preview.pictures=0", "checkpoint.every=2",
    "hardware.micro_batch=2", "data.read.workers=0",
]  # fmt: skip
PATIENCE = 120.0  # seconds, on a busy machine, for what takes ten
NOTICED = 60.0  # seconds within which the others end when a machine is lost; PyTorch's own limit with gloo would be half an hour
IMPATIENT = """
import datetime, os, sys
sys.path.insert(0, os.getcwd())
from torch.distributed import distributed_c10d
from dev2pro.training import time_limits
distributed_c10d.default_pg_timeout = time_limits.TRAINING = datetime.timedelta(seconds=6)
from stages import recover
recover.frame.main("recover", recover.RecoverConfig, recover.run)
"""  # what is ten minutes on GPUs is six seconds here
LAUNCHER = """
import os, sys
sys.path.insert(0, os.getcwd())
from dev2pro import ranks
ranks.LINGER = 5.0
sys.exit(ranks.main(sys.argv[1:]))
"""  # and five and a half minutes are five seconds


class Machine:
    """One `dev2pro.ranks` with its ranks; what they print goes into `log`."""

    def __init__(self, log: Path, *args: str, launcher: tuple[str, ...] = ("-m", "dev2pro.ranks")) -> None:
        self.log = log
        with log.open("a") as output:
            command = [sys.executable, *launcher, *args]
            self.agent = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        """To all of it at one time."""
        kin.send([self.agent.pid, *(one.pid for one in kin.family(self.agent.pid))], number)

    def ends(self, within: float = PATIENCE) -> int:
        return self.agent.wait(within)

    def said(self) -> str:
        return self.log.read_text()


@contextmanager
def machines(folder: Path, *args: str, command: tuple[str, ...] = ("-m", "stages.recover"), **launcher: Any) -> Iterator[list[Machine]]:
    """Two of them, the first of which holds the rendezvous."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint=127.0.0.1:{port}"]
    both = []
    try:
        for number in range(2):
            host = f"--rdzv-conf=is_host={int(not number)},read_timeout=10"
            both.append(Machine(folder / f"machine-{number}.log", *meet, host, *command, *ARGS, *args, f"out={folder}/out", **launcher))
        yield both
    finally:
        for machine in both:
            machine.send(signal.SIGKILL)
            machine.ends()


def wait_for_checkpoint(folder: Path, step: int, *running: Machine) -> None:
    """Until a run has written its checkpoint of a step."""

    def over() -> bool:
        return any(machine.agent.poll() is not None for machine in running)

    kin.until(lambda: (folder / f"out/checkpoint-{step}").exists() or over(), PATIENCE)
    assert not over(), [machine.said()[-3000:] for machine in running]
    assert (folder / f"out/checkpoint-{step}").exists()


def finish(folder: Path, *args: str) -> list[str]:
    """Starts both machines again, and compares nothing; what each said."""
    for log in folder.glob("machine-*.log"):
        log.unlink()
    with machines(folder, *args) as both:
        codes = [machine.ends() for machine in both]
        assert codes == [0, 0], [machine.said()[-3000:] for machine in both]
        return [machine.said() for machine in both]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "out/metrics.jsonl").read_text().splitlines())}


def assert_same(folder: Path, undisturbed: Path) -> None:
    """Within rounding: after a resume DDP sorts four ranks' gradients into other buckets for a step, and adds them in another order."""
    one, other = (load_file(each / "out/transformer/diffusion_pytorch_model.safetensors") for each in (folder, undisturbed))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Four ranks of one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    machine = Machine(folder / "log", "--standalone", "--nproc-per-node=4", "-m", "stages.recover", *ARGS, f"out={folder}/out")
    assert machine.ends() == 0, machine.said()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "args"),
    [pytest.param(0, (), marks=pytest.mark.ci), (1, ()), (1, ("hardware.shard=true",))],
    ids=["with the rendezvous", "the other", "sharded"],
)
def test_a_lost_machine_ends_the_others_and_both_go_on(lost, args, undisturbed, tmp_path):
    with machines(tmp_path, *args) as both:
        wait_for_checkpoint(tmp_path, 4, *both)
        both[lost].send(signal.SIGKILL)
        left = both[1 - lost]
        assert left.ends(NOTICED) == 75, left.said()[-3000:]
        assert not kin.family(left.agent.pid)
        assert "ranks: another machine is gone or hangs" in left.said()
        assert "Traceback" not in left.said()
    assert not (tmp_path / "out/artifact.json").exists()
    told = "".join(finish(tmp_path, *args))
    assert int(re.search(rf"going on after step (\d+) of {STEPS}", told)[1]) >= 4
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [0, 1], ids=["with the rendezvous", "the other"])
def test_a_machine_that_hangs_is_noticed_within_the_limit_of_training(hanging, tmp_path):
    stage, launcher = tmp_path / "impatient.py", tmp_path / "launcher.py"
    stage.write_text(IMPATIENT)
    launcher.write_text(LAUNCHER)
    with machines(tmp_path, "checkpoint.grace=1", command=(str(stage),), launcher=(str(launcher),)) as both:
        wait_for_checkpoint(tmp_path, 2, *both)
        both[hanging].send(signal.SIGSTOP)
        left = both[1 - hanging]
        assert left.ends(NOTICED) == 75, left.said()[-3000:]
        assert "another rank ended or hangs" in left.said()
        assert "Traceback" not in left.said()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the first", "the second", "the first's launcher, killed"])
def test_a_machine_that_is_asked_to_stop_stops_both_after_the_same_step(whom, tmp_path):
    with machines(tmp_path) as both:
        wait_for_checkpoint(tmp_path, 2, *both)
        if "killed" in whom:
            both[0].agent.kill()
        else:
            both["the second" in whom].agent.terminate()
        codes = [machine.ends(NOTICED) for machine in both]
        ended = kin.until(lambda: sum(machine.said().count("interrupted after step") for machine in both) == 4, PATIENCE)
        told = [machine.said() for machine in both]
    assert ended, [words[-3000:] for words in told]
    asked = "the second" in whom
    assert codes[asked] == (-signal.SIGKILL if "killed" in whom else 130)
    assert codes[not asked] in (75, 130)  # 75 where the rendezvous is gone before its ranks are
    steps = re.findall(rf"recover: interrupted after step (\d+) of {STEPS}", "".join(told))
    assert len(steps) == 4
    assert len(set(steps)) == 1
    assert (tmp_path / f"out/checkpoint-{steps[0]}/checkpoint.json").exists()


@pytest.mark.slow
def test_machines_that_never_meet_are_told(tmp_path):
    args = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-conf=is_host=0,read_timeout=2", "-m", "stages.recover"]
    machine = Machine(tmp_path / "log", *args)
    assert machine.ends() == 75, machine.said()
    assert "ranks: another machine is gone or hangs" in machine.said()
    assert "Traceback" not in machine.said()


@pytest.mark.slow
@pytest.mark.ci
def test_packing_may_take_longer_than_the_limit_of_training(tiny, tiny_data, tmp_path):
    """The first rank reads an index that takes ten seconds to come, while the other waits; the limits are six."""
    script, delays = tmp_path / "impatient.py", []

    def slow(path: str, number: int, _range: str) -> Fault | None:
        if path.endswith(".index") and number == 0:
            delays.append(path)
            return Fault(delay=10.0)
        return None

    script.write_text(IMPATIENT)
    with Server(tiny_data, faults=slow) as server:
        args = [
            f"out={tmp_path}/out", f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=['{server.url}/shard.tar']",
            f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.hedge=60", "data.read.workers=0",
            "steps=2", "batch=4", "optim.warmup=0", "probe.bins=2", "probe.every=2", "preview.pictures=0", "save_dtype=float32",
        ]  # fmt: skip
        machine = Machine(tmp_path / "log", "--standalone", "--nproc-per-node=2", str(script), *args)
        code = machine.ends()
    assert code == 0, machine.said()[-3000:]
    assert delays == ["/shard.tar.index"]
