"""Stop signals, in real processes: outside training they end it at once, in training after the step; a second one or a timeout at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import os, sys, time
from dev2pro import signals
signals.install_handlers()
try:
    print("preparing", flush=True)
    while sys.argv[1] == "prepare":
        time.sleep(0.01)
    with signals.grace_period(lambda: float(sys.argv[2])):
        print("training", flush=True)
        while not signals.stop_requested():
            time.sleep(0.01)
            if sys.argv[1] == "talk":
                signals.emit("still at it")
        if sys.argv[1] == "talk":
            open(sys.argv[3], "w").close()
            signals.emit("unheard")
            sys.exit(7)
        print("saving", flush=True)
        time.sleep(float(sys.argv[3]))
        print("saved", flush=True)
    time.sleep(float(sys.argv[4]) if len(sys.argv) > 4 else 0)
    sys.exit(7)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def started(*args: str, until: str, **more: str) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", WORK, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **more}
    )
    read_until(child, until)
    return child


def read_until(child: subprocess.Popen, word: str) -> None:
    assert child.stdout is not None
    while child.stdout.readline().strip() != word:
        assert child.poll() is None


def ended(child: subprocess.Popen) -> tuple[int, str, str]:
    output, stderr = child.communicate(timeout=300)
    return child.returncode, output, stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_training_it_stops_at_once(number):
    child = started("prepare", until="preparing")
    child.send_signal(number)
    assert ended(child)[:2] == (130, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_training_it_finishes_and_saves(number):
    child = started("train", "20", "0.1", until="training")
    child.send_signal(number)
    code, output, stderr = ended(child)
    assert (code, output) == (7, "saving\nsaved\n")  # the stage chooses the exit code
    assert f"asked to stop ({number.name}): finishing the step and saving, for up to 20 s" in stderr


def test_signals_that_come_together_are_one():
    child = started("train", "20", "0.5", until="training")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        child.send_signal(number)
        time.sleep(0.05)
    assert ended(child)[:2] == (7, "saving\nsaved\n")


def test_a_second_signal_stops_it_at_once():
    child = started("train", "20", "20", until="training")
    child.send_signal(signal.SIGTERM)
    read_until(child, "saving")
    time.sleep(2.1)
    before = time.monotonic()
    child.send_signal(signal.SIGINT)
    code, output, stderr = ended(child)
    assert (code, output) == (130, "")
    assert "stopped at once (asked twice). The same command goes on from the last checkpoint" in stderr
    assert time.monotonic() - before < 5


def test_the_grace_has_an_end():
    child = started("train", "1", "20", until="training")
    before = time.monotonic()
    child.send_signal(signal.SIGTERM)
    code, output, stderr = ended(child)
    assert (code, output) == (130, "saving\n")
    assert "stopped at once (1 s were not enough to save)" in stderr
    assert 1 <= time.monotonic() - before < 6


def test_what_comes_after_the_saving_has_all_the_time_it_wants():
    child = started("train", "1", "0", "2", until="training")
    child.send_signal(signal.SIGTERM)
    assert ended(child)[:2] == (7, "saving\nsaved\n")


@pytest.mark.parametrize("deaf", [["stdout"], ["stdout", "stderr"]])
def test_that_nobody_reads_is_being_asked_to_stop(deaf, tmp_path):
    child = started("talk", "20", str(tmp_path / "saved"), until="training")
    for name in deaf:
        getattr(child, name).close()
    assert child.wait(timeout=300) == 7
    assert (tmp_path / "saved").exists()


FLOW = """
import os, signal, subprocess, sys, time
args = [sys.executable, "-c", sys.argv[1], "train", "60", "3"]
child = subprocess.Popen(args, stdin=subprocess.PIPE, env={**os.environ, "DEV2PRO_EVENTS": "1"}, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_flow_that_dies_meanwhile_is_no_second_signal():
    flow = subprocess.Popen([sys.executable, "-c", FLOW, WORK], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert flow.stdout is not None
    pid = int(flow.stdout.readline())
    read_until(flow, "training")
    os.kill(pid, signal.SIGTERM)
    read_until(flow, "saving")
    time.sleep(2.1)  # from here on a signal would be a second one
    flow.kill()
    assert flow.stdout.read() == "saved\n"
    flow.wait()


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "train", "20", "0"], stdout=sys.stdout)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("launched_by", ["TORCHELASTIC_RUN_ID", "DEV2PRO_EVENTS", ""])
def test_a_launched_process_is_asked_to_stop_when_its_launcher_dies(launched_by):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORK],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ} | ({launched_by: "1"} if launched_by else {}),
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    read_until(launcher, "training")
    launcher.kill()
    if launched_by:
        assert launcher.stdout.read() == "saving\nsaved\n"  # to the end of the file: nobody has it open any more
    else:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)  # it is still alive, as one that a shell started
        assert launcher.stdout.read() == ""
    launcher.wait()


PARENT = """
import multiprocessing, os, sys, threading, time
from dev2pro import signals
def work():
    signals.ignore_signals_in_child()
    threading.Thread(target=time.sleep, args=[30], daemon=True).start()
    print(os.getpid(), flush=True)
    time.sleep(30)
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
sys.stdin.readline()
print("alive" if child.is_alive() else "dead", flush=True)
child.terminate()
child.join(10)
print("alive" if child.is_alive() else "dead", flush=True)
"""


def test_a_child_that_reads_is_ended_by_its_parent_alone():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):  # as systemd, scancel and terminals do to all that belongs to a job
        os.kill(pid, number)
    time.sleep(0.3)
    assert parent.communicate("go on\n", timeout=300)[0] == "alive\ndead\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_ends_changes_nothing_but_the_time(number):
    """As torchrun sends to ranks whose neighbour ended a moment earlier."""
    ending = "import atexit, sys, time; from dev2pro import signals; signals.install_handlers(); signals.nothing_left_to_stop(3)"
    slowly = "atexit.register(lambda: (print('ending', flush=True), time.sleep(60))); sys.exit(3)"
    child = subprocess.Popen([sys.executable, "-c", f"{ending}; {slowly}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    read_until(child, "ending")
    child.send_signal(number)
    assert ended(child) == (3, "", "")
