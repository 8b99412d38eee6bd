"""What waits how long before it kills, as read from the environment and from Slurm's own command."""

from pathlib import Path

import pytest

from dev2pro import schedulers

CONFIG = """Configuration data as of 2026-11-29T10:00:00
KeepAliveTime           = SYSTEM_DEFAULT
KillOnBadExit           = 0
KillWait                = 45 sec
LaunchParameters        = (null)
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path) -> None:
    for name in (schedulers.TOLD, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "TORCHELASTIC_RUN_ID", "DEV2PRO_PARENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def scontrol(folder: Path, body: str) -> None:
    """A command with the answer of the real one, which needs a cluster."""
    (folder / "config").write_text(CONFIG)
    (folder / "scontrol").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "scontrol").chmod(0o755)


def known(grace: float | None = None) -> list[tuple[str, float]]:
    return [(limit.who, limit.seconds) for limit in schedulers.limits(grace)]


def test_nothing_is_known_of_a_shell():
    assert known() == []


def test_a_number_of_one_s_own_is_a_limit_and_the_launcher_follows_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert known(12.5) == [("checkpoint.grace=12.5", 12.5)]


def test_slurm_is_asked(monkeypatch, tmp_path):
    scontrol(tmp_path, f'[ "$*" = "show config" ] && while read -r line; do echo "$line"; done < {tmp_path}/config')
    assert known() == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert known() == [("Slurm's KillWait", 45)]
    assert "--signal=TERM@SECONDS" in schedulers.limits(None)[0].cure


@pytest.mark.parametrize("body", ["exit 1", "echo KillWait = soon", "echo", None])
def test_slurm_that_does_not_answer_is_no_limit(monkeypatch, tmp_path, body):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if body:
        scontrol(tmp_path, body)
    assert known() == []


def test_a_pod_has_half_a_minute_unless_it_says_more(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert known() == [("Kubernetes by default", 30)]
    monkeypatch.setenv(schedulers.TOLD, "900")
    assert known() == [(schedulers.TOLD, 900)]
    monkeypatch.setenv(schedulers.TOLD, "a while")
    assert known() == [("Kubernetes by default", 30)]


def test_launchers(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert known() == [("torchrun", 30)]
    monkeypatch.setenv("DEV2PRO_PARENT", "1")
    assert known() == [("dev2pro.ranks", 600)]
