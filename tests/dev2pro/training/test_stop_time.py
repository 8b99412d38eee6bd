"""The time a stop is given follows the size of the state and then what was measured; what is too short is told before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from dev2pro.schedulers import Limit
from dev2pro.training import stop_time
from dev2pro.training.stop_time import StopTime
from tests.dev2pro.training.test_checkpoint_writer import STATE

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(stop_time.time, "monotonic", lambda: now[0])
    return now


def test_from_the_size_at_first_then_as_measured(clock):
    stop = StopTime(50_000_000_000, None)
    assert (stop.checkpoint, stop.needed) == (100, 100)
    assert stop.describe() == "a checkpoint is 50 GB, takes about 100 s; a stop needs about 100 s and the step under way"
    clock[0] += 8
    stop.end_step()
    assert (stop.step, stop.needed, stop.grace()) == (8, 116, 4 * 116)
    stop.begin_checkpoint()
    clock[0] += 40
    assert stop.grace() == 4 * (116 + 150), "which waits for the one that is being written"
    stop.end_checkpoint()
    assert (stop.checkpoint, stop.needed, stop.grace()) == (40, 68, 68)
    stop.resume()
    clock[0] += 8
    stop.end_step()
    stop.begin_checkpoint()
    assert stop.grace() == 68 + 60


def test_the_longest_step_since_the_checkpoint_before_the_last_counts(clock):
    stop = StopTime(0, None)
    clock[0] += 500  # the pictures are encoded
    stop.resume()
    for seconds in (90, 3, 20):  # the first one compiles, the last one measures
        clock[0] += seconds
        stop.end_step()
    assert stop.step == 90
    stop.begin_checkpoint()
    clock[0] += 7
    stop.resume()
    for seconds in (3, 20):
        clock[0] += seconds
        stop.end_step()
    assert stop.step == 90
    stop.begin_checkpoint()
    assert stop.step == 20


def test_a_small_state_has_half_a_minute_and_a_number_is_that_number(clock):
    assert StopTime(1000, None).grace() == 30
    assert StopTime(10**12, 7.5).grace() == 7.5


def test_what_is_too_short_is_told_with_its_cure():
    stop, limit = StopTime(95_000_000_000, None), Limit("Slurm's KillWait", 30, "Submit with more")
    assert stop.warning(limit) == (
        "A stop needs about 190 s (the step under way and a checkpoint of 95 GB), and Slurm's KillWait gives 30 s: a run that is stopped would lose "
        "the steps since its last checkpoint. Submit with more."
    )
    assert not stop.warning(Limit("a patient one", 190, ""))


THROTTLED = """
import signal, threading
from dev2pro import signals
from dev2pro.training import stop_time
stop_time.SHORTEST = 0.0  # else it would hide what is derived
write, lock, rate = os.write, threading.Lock(), float(sys.argv[3])
def slow(handle, chunk):
    with lock:
        time.sleep(len(chunk) / rate)
    return write(handle, chunk)
os.write = slow
signals.install_handlers()
run, size = training(int(sys.argv[4]))
grace = None if sys.argv[2] == "null" else float(sys.argv[2])
checkpoints = checkpoint.Checkpoints(sys.argv[1], run, checkpoint.CheckpointConfig(every=2, keep=1, grace=grace), 100, {})
with checkpoints:
    for step in range(1, 100):
        if step == 5:  # while the one of step 4 is being written
            os.kill(os.getpid(), signal.SIGTERM)
            asked = time.monotonic()
            print("given", checkpoints.stop.grace(), flush=True)
        run.stopping = run.stop_requested()
        try:
            checkpoints.on_step_end(step, [])
        except Exception as error:
            print(type(error).__name__, error, "took", time.monotonic() - asked, flush=True)
            break
        if step == 2:
            checkpoints.wait()
"""


def throttled(out: Path, grace: str, megabytes: float, layers: int) -> tuple[int, str, str, list[str]]:
    """Exit code, stdout, stderr and checkpoints of a run that is asked to stop, on a disk of so many MB/s.

    The disk is slowed down where Python hands bytes to it, in os.write: the kernel's own ways (blkio, dm-delay) need root and do not hold back
    buffered writes.
    """
    command = [sys.executable, "-c", STATE + THROTTLED, str(out), grace, str(1e6 * megabytes), str(layers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    return done.returncode, done.stdout, done.stderr, sorted(folder.name for folder in out.glob("checkpoint-*") if folder.suffix != ".partial")


@pytest.mark.parametrize("layers", [1, pytest.param(4, marks=pytest.mark.slow)])  # 0.3 GB and 1.1 GB
def test_on_a_slow_disk_the_derived_grace_holds(tmp_path, layers):
    code, output, stderr, checkpoints = throttled(tmp_path, "null", 100 * layers, layers)
    assert code == 0, stderr
    assert checkpoints == ["checkpoint-5"]
    given, took = (float(line.split()[-1]) for line in output.splitlines() if line.startswith(("given", "InterruptedRun")))
    assert took > 2 * 2.5, "the disk was slow, and two checkpoints were written"
    assert took <= given
    assert "A stop needs" not in output


def test_on_a_slow_disk_a_grace_that_is_too_short_is_warned_about_before_it_is_needed(tmp_path):
    code, output, stderr, checkpoints = throttled(tmp_path, "1.5", 100, 1)
    assert (code, checkpoints) == (130, ["checkpoint-2"])
    said = output.splitlines()
    assert "takes about 1 s; a stop needs about 1 s and the step under way" in "".join(said)
    warned = next(at for at, line in enumerate(said) if "and checkpoint.grace=1.5 gives 2 s" in line)
    assert warned < next(at for at, line in enumerate(said) if line.startswith("given"))
    assert "Set checkpoint.grace=null, which follows what is measured." in said[warned]
    assert output.count("A stop needs") == 1, "once"
    assert "stopped at once (2 s were not enough to save)" in stderr
