"""The launcher exits with the code of the rank that caused the failure, and an interruption of one rank stops the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev2pro import ranks
from dev2pro.errors import LOST

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import os, sys, time
if os.environ["RANK"] == sys.argv[1]:
    sys.exit(int(sys.argv[2]))
open(sys.argv[3] + os.environ["RANK"], "w").close()
time.sleep(60)
"""


def start(tmp_path: Path, *args: str) -> subprocess.Popen:
    (tmp_path / "work.py").write_text(WORK)
    command = [sys.executable, "-m", "dev2pro.ranks", "--standalone", "--nproc-per-node=2", f"{tmp_path}/work.py", *args, f"{tmp_path}/started-"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_s_own_code_comes_out(tmp_path):
    child = start(tmp_path, "1", "3")
    _, error = child.communicate(timeout=300)
    assert child.returncode == 3
    assert "Traceback" not in error


def test_an_interruption_is_one(tmp_path):
    child = start(tmp_path, "none", "0")
    while len(list(tmp_path.glob("started-*"))) < 2:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=300)
    assert child.returncode == 130


@pytest.mark.parametrize(
    ("args", "seconds"),
    [
        ([], 615),
        (["checkpoint.grace=30"], 45),
        (["checkpoint.grace=5", "checkpoint.grace=7.5"], 22.5),
        (["checkpoint.grace=5", "checkpoint.grace=null"], 615),
    ],
)
def test_ranks_have_their_grace_before_they_are_killed(args, seconds):
    assert ranks.grace_seconds(["-m", "stages.recover", *args]) == seconds


@pytest.mark.parametrize(
    ("exit_codes", "code"),
    [
        ([1, 3], 3),
        ([75, 1], 75),
        ([130, 4], 4),
        ([130, 130], 130),
        ([1, 130], 130),
        ([1, 1], 1),
        ([-9, 1], 137),
        ([1, -9], 137),
        ([130, -9], 137),
        ([-9, 5], 5),
        ([1, -15], 1),
        ([LOST, LOST], LOST),
        ([LOST, 1], 1),
        ([LOST, 3], 3),
        ([LOST, -9], 137),
        ([LOST, 130], 130),
    ],
)
def test_the_rank_that_caused_the_failure_gives_the_exit_code(exit_codes, code):
    assert ranks._exit_code([(one, 7) for one in exit_codes]) == code


@pytest.mark.parametrize(
    ("failures", "code"),
    [([(LOST, 7), (130, 9)], LOST), ([(LOST, 7), (-9, 60)], LOST), ([(1, 7), (130, 9)], 1), ([(130, 7), (-9, 60)], 130), ([(LOST, 7), (3, 9)], 3)],
)
def test_what_torchrun_stopped_later_is_no_cause(failures, code):
    assert ranks._exit_code(failures) == code


def test_words_that_torchrun_does_not_know():
    done = subprocess.run(
        [sys.executable, "-m", "dev2pro.ranks", "--nproc"], cwd=ROOT, capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
