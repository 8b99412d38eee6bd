"""A rank that lost another one ends at once, whatever its own threads still wait for: others wait for its end."""

import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from dev2pro.artifacts.record import ROOT
from tests.dev2pro.training.test_checkpoint import Run

LINGERING = """
import sys, os, threading
sys.path.insert(0, os.getcwd())
from concurrent.futures import ThreadPoolExecutor
from stages import frame, recover

def run(config):
    ThreadPoolExecutor(1).submit(threading.Event().wait)  # as a writer that waits for a rank which is gone
    raise RuntimeError("Read error [127.0.0.1]:3: Connection closed by peer")

frame.main("recover", recover.RecoverConfig, run)
"""


def test_it_ends_though_a_thread_of_it_waits_for_ever(tmp_path):
    (tmp_path / "lingering.py").write_text(LINGERING)
    words = ["experiment=miniature", f"out={tmp_path}/out"]
    command = [sys.executable, tmp_path / "lingering.py", *words]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "RANK": "1"}, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 76
    assert "rank 1: another rank ended or hangs" in ended.stderr


def fail(run: Run, writing: Future, message: str) -> None:
    """An error while a checkpoint is written."""
    with run.checkpoints:
        run.checkpoints._writing = writing
        raise RuntimeError(message)


def test_it_waits_for_no_writer_of_checkpoints(tiny, tmp_path, monkeypatch):
    """A rank's writer waited for that of another rank, which had given up while its training waited for this rank to end."""
    monkeypatch.setenv("RANK", "1")
    run, writing = Run(tiny, tmp_path), Future()
    with pytest.raises(RuntimeError, match="closed by peer"):
        fail(run, writing, "Read error [127.0.0.1]:3: Connection closed by peer")
    threading.Timer(0.2, writing.set_result, [None]).start()
    with pytest.raises(RuntimeError, match="of its own"):
        fail(run, writing, "an error of its own")
    assert writing.done()
