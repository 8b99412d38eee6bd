"""GPU slots belong to one stage at a time: across processes, beyond the death of the flow, and in order of arrival."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from flows.processes import gpu_slots

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from flows.processes import gpu_slots
gpu_slots.FOLDER = Path(sys.argv[1])
gpu_slots.names = lambda: ("gpu-0", "gpu-3")
with gpu_slots.acquire(int(sys.argv[2]), sys.argv[3], lambda: False, lambda text: print(text, flush=True)) as slots:
    child = subprocess.Popen(["sleep", "60"], pass_fds=slots.handles)
    print("got", slots.environment["CUDA_VISIBLE_DEVICES"], child.pid, flush=True)
    sys.stdin.readline()
    child.kill()
    child.wait()
"""


@pytest.fixture(autouse=True)
def _test_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_slots, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_slots, "names", lambda: ("gpu-0", "gpu-3"))


@pytest.fixture
def holder(tmp_path):
    """Starts another process that takes some: (the process, what it printed)."""
    processes = []

    def start(count: int, what: str, wait: bool = True):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), str(count), what]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1], processes[-1].stdout.readline().split() if wait else []

    yield start
    for process in processes:
        process.kill()
        process.wait()


def free(count: int) -> bool:
    """Whether so many slots can be locked at once."""
    with gpu_slots.acquire(count, "test", lambda: True, lambda _: None) as slots:
        return slots is not None


def test_each_is_taken_once(holder):
    first, (_, slot, _) = holder(1, "first")
    assert free(1)
    assert not free(2)
    _, (_, other, _) = holder(1, "second")
    assert {slot, other} == {"0", "3"}
    assert not free(1)
    first.communicate("done\n", timeout=300)
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
    messages = []
    with gpu_slots.acquire(1, "lora runs/b", lambda: bool(messages), messages.append) as slots:
        assert slots is None
    assert messages == ["lora runs/b waits for 1 free of gpu-0 (recover runs/a), gpu-3 (recover runs/a)"]


def test_who_wants_all_is_not_overtaken(holder):
    first, _ = holder(1, "first")
    many, _ = holder(2, "many", wait=False)
    assert many.stdout.readline().startswith("many waits for 2 free of")
    later, _ = holder(1, "later", wait=False)
    time.sleep(1.5)
    first.communicate("done\n", timeout=300)
    assert many.stdout.readline().split()[:2] == ["got", "0,3"]
    many.communicate("done\n", timeout=300)
    assert later.stdout.readline()


def test_threads_take_their_turns_in_the_order_they_came(monkeypatch):
    monkeypatch.setattr(gpu_slots, "POLL_SECONDS", 0.001)
    order: list[int] = []

    def work(number: int) -> None:
        with gpu_slots.acquire(2, f"stage {number}", lambda: False, lambda _: None):
            order.append(number)

    with gpu_slots.acquire(2, "first", lambda: False, lambda _: None):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            while len(gpu_slots._waiting) < waiting:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_more_than_there_are_is_a_mistake():
    with pytest.raises(ConfigError, match=r"recover wants 3 processes, and this machine has 2 \(gpu-0, gpu-3\)"):
        gpu_slots.acquire(3, "recover", lambda: False, print).__enter__()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0,1", ("gpu-0", "gpu-1")), ("GPU-8932f937, 3", ("gpu-GPU-8932f937", "gpu-3")), ("", None), ("-1", None)],
)
def test_what_cuda_may_see_is_what_there_is(visible, expected):
    done = subprocess.run(
        [sys.executable, "-c", "from flows.processes import gpu_slots; print(*gpu_slots.names())"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    cores = tuple(f"core-{number}" for number in range(len(os.sched_getaffinity(0))))
    assert tuple(done.stdout.split()) == (expected or cores)
