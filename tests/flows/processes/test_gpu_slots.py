"""GPUs, or cores, are one stage's at a time: across processes, beyond the death of who took them, and without overtaking."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from flows.processes import gpu_slots

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from flows import slots
slots.FOLDER = Path(sys.argv[1])
slots.names = lambda: ("gpu-0", "gpu-3")
with slots.held(int(sys.argv[2]), sys.argv[3], lambda: False, lambda text: print(text, flush=True)) as got:
    child = subprocess.Popen(["sleep", "60"], pass_fds=got.handles)
    print("got", got.environment["CUDA_VISIBLE_DEVICES"], child.pid, flush=True)
    sys.stdin.readline()
    child.kill()
    child.wait()
"""


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_slots, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_slots, "names", lambda: ("gpu-0", "gpu-3"))


@pytest.fixture
def holder(tmp_path):
    """Starts another process that takes some: (the process, what it got)."""
    made = []

    def start(count: int, what: str, wait: bool = True):
        words = [sys.executable, "-c", HOLDER, str(tmp_path), str(count), what]
        made.append(subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return made[-1], made[-1].stdout.readline().split() if wait else []

    yield start
    for one in made:
        one.kill()
        one.wait()


def free(count: int) -> bool:
    """Whether so many can be had at once."""
    with gpu_slots.acquire(count, "test", lambda: True, lambda _: None) as got:
        return got is not None


def test_each_is_taken_once(holder):
    first, (_, one, _) = holder(1, "first")
    assert free(1)
    assert not free(2)
    _, (_, other, _) = holder(1, "second")
    assert {one, other} == {"0", "3"}
    assert not free(1)
    first.communicate("done\n", timeout=20)
    assert free(1)


def test_they_stay_taken_as_long_as_the_stage_lives(holder):
    flow, (_, _, stage) = holder(2, "saving")
    flow.kill()
    flow.wait()
    assert not free(1)
    os.kill(int(stage), signal.SIGKILL)
    end = time.monotonic() + 10
    while not free(2):
        assert time.monotonic() < end


def test_who_waits_is_told_for_whom(holder):
    holder(2, "recover runs/a")
    said = []
    with gpu_slots.acquire(1, "lora runs/b", lambda: bool(said), said.append) as got:
        assert got is None
    assert said == ["lora runs/b waits for 1 free of gpu-0 (recover runs/a), gpu-3 (recover runs/a)"]


def test_who_wants_all_is_not_overtaken(holder):
    first, _ = holder(1, "first")
    many, _ = holder(2, "many", wait=False)
    assert many.stdout.readline().startswith("many waits for 2 free of")
    later, _ = holder(1, "later", wait=False)
    time.sleep(1.5)
    first.communicate("done\n", timeout=20)
    assert many.stdout.readline().split()[:2] == ["got", "0,3"]
    many.communicate("done\n", timeout=20)
    assert later.stdout.readline()


def test_more_than_there_are_is_a_mistake():
    with pytest.raises(ConfigError, match=r"recover wants 3 processes, and this machine has 2 \(gpu-0, gpu-3\)"):
        gpu_slots.acquire(3, "recover", lambda: False, print).__enter__()


@pytest.mark.parametrize(
    ("visible", "found"),
    [("0,1", ("gpu-0", "gpu-1")), ("GPU-8932f937, 3", ("gpu-GPU-8932f937", "gpu-3")), ("", None), ("-1", None)],
)
def test_what_cuda_may_see_is_what_there_is(visible, found):
    done = subprocess.run(
        [sys.executable, "-c", "from flows import slots; print(*slots.names())"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    cores = tuple(f"core-{number}" for number in range(len(os.sched_getaffinity(0))))
    assert tuple(done.stdout.split()) == (found or cores)
