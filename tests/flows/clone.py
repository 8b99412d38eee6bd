"""Helpers for tests of an operator's settings: a copy of the project with its own `.env`, and `make serve` there."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from dotenv import dotenv_values

from dev2pro.artifacts.record import ROOT
from tests.flows.operator import PATIENCE, Serve, free_port, until

PASSWORD = "s3cret $horse #battery"  # what a person may choose
RECOVER: dict[str, Any] = {"steps": 3, "batch": 4, "data": {"name": "chalk"}, "probe": {"every": 3, "samples": 2}}


class Clone(Serve):
    """`make serve` in a copy of the project, configured by `.env` alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "dev2pro", folder / "home"
        for name in ("conf", "data", "dev2pro", "flows", "stages"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in (".env.example", "prefect.yaml", "pyproject.toml"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, self.folder)
        self.home.mkdir()
        self.log_file = folder / "said.log"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.api = httpx.Client(base_url=f"{self.address}/api/", timeout=30)

    def settings(self, closed: bool = True, **more: str) -> None:
        """Writes `.env`: the example with another port and a real password, or only what is necessary."""
        text = (ROOT / ".env.example").read_text() if closed else ""
        text = text.replace("choose-a-password", PASSWORD).replace("http://127.0.0.1:4200", self.address)
        for name, value in {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": f"{self.address}/api",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            **more,
        }.items():
            text, count = re.subn(rf"^#?{name}=.*", lambda _, line=f"{name}='{value}'": line, text, flags=re.MULTILINE)
            text += "" if count else f"\n{name}='{value}'\n"
        (self.folder / ".env").write_text(text)

    def environment(self) -> dict[str, str]:
        """The environment without settings of Prefect and dev2pro."""
        return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DEV2PRO_", "PYTHONPATH"))}

    def start(self, **more: str) -> float:
        """Returns the seconds until it was ready."""
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "flows.serve"], cwd=self.folder, env=self.environment() | more, stdout=self.log_file.open("ab"),
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        before = self.log_file.read_text().count("ready after")
        until(lambda: self.log_file.read_text().count("ready after") > before or self.process.poll() is not None, what="make serve")
        assert self.process.poll() is None, self.log_file.read_text()
        settings = dotenv_values(self.folder / ".env")
        if not settings.get("DEV2PRO_NO_PASSWORD"):
            self.log_in(settings.get("PREFECT_SERVER_API_AUTH_STRING") or (self.home / "password").read_text().strip())
        until(lambda: len(self.deployments()) >= 5, what="registering the deployments")
        return time.monotonic() - began

    def recovered(self, out: str, **more: Any) -> str:
        """Runs a recovery of three steps to its end: the id of the run."""
        run = self.run("recover", recover={**RECOVER, "out": f"runs/{out}", **more})
        self.until_state(run, "Completed", "Failed", "Crashed", seconds=2 * PATIENCE)
        assert self.state(run)["name"] == "Completed", self.run_log(run)
        return run

    def family(self) -> list[psutil.Process]:
        """Its process and all descendants."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


@contextmanager
def cloned(folder: Path, closed: bool = True, **settings: str) -> Iterator[Clone]:
    """A started clone; kills its process and all descendants at the end."""
    clone = Clone(folder)
    clone.settings(closed, **settings)
    try:
        clone.start()
        yield clone
    finally:
        if clone.process.poll() is None:
            family = clone.family()
            clone.process.terminate()
            clone.process.wait(PATIENCE)
            for process in family:
                if process.is_running():
                    process.kill()
