"""Helpers for tests of `make serve`: a server with its own port and folders, and its API."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from dev2pro.artifacts.record import ROOT

OUT = "runs/test-serve"
PATIENCE = 240.0  # seconds, on a busy machine
RECOVER: dict[str, Any] = {
    "steps": 4000, "batch": 8, "data": {"name": "chalk"}, "checkpoint": {"every": 1000}, "probe": {"every": 1000, "samples": 4},
}  # fmt: skip


def until(true: Callable[[], Any], seconds: float = PATIENCE, what: str = "it") -> Any:
    """Polls until the result is true, and returns it."""
    end = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.2)
    return result


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Serve:
    """`make serve`."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.api = httpx.Client(base_url=f"{self.address}/api/", timeout=20)

    def start(self, **more: str) -> float:
        """Returns the seconds until it was ready."""
        began = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        environment |= {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": f"{self.address}/api", "PREFECT_RUNNER_POLL_FREQUENCY": "2", **more}
        command = [sys.executable, "-u", "-m", "flows.serve"]
        self.log_file = self.home / "said.log"
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log_file.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
        )
        before = self.log_file.read_text().count("ready after")
        until(lambda: self.log_file.read_text().count("ready after") > before or self.process.poll() is not None, what="make serve")
        assert self.process.poll() is None, self.log_file.read_text()
        self.log_in((self.home / "password").read_text().strip())
        until(lambda: len(self.deployments()) == 9, what="registering the deployments")
        return time.monotonic() - began

    def log_in(self, user: str) -> None:
        """As the UI does: USER:PASSWORD, and a token for what changes something."""
        self.user, self.api.auth = user, tuple(user.split(":", 1))
        client = str(uuid.uuid4())
        token = self.api.get("csrf-token", params={"client": client}).raise_for_status().json()["token"]
        self.api.headers.update({"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": token})

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def part(self, name: str) -> psutil.Process:
        """One of its processes: server, training or cheap."""
        command = ["flows.serve", name]
        family = psutil.Process(self.process.pid).children
        return until(
            lambda: next((process for process in family() if process.is_running() and process.cmdline()[-2:] == command), None),
            what=f"finding {name}",
        )

    # ---- its API ----

    def post(self, path: str, **body: Any) -> Any:
        answer = self.api.post(path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.text else None

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {deployment["name"]: deployment for deployment in self.post("deployments/filter")}

    def run(self, name: str, **parameters: Any) -> str:
        """Triggers a deployment: the id of the run."""
        deployment = self.deployments()[name]["id"]
        return self.post(f"deployments/{deployment}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})["id"]

    def recover(self, out: str, **more: Any) -> str:
        """Triggers a recovery that takes long, and waits until it trains."""
        run = self.run("recover", recover={**RECOVER, "out": f"{OUT}/{out}", **more})
        until(lambda: steps(out) > 3 or self.state(run)["type"] in ("FAILED", "CRASHED"), what="training")
        assert self.state(run)["type"] == "RUNNING", self.run_log(run)
        return run

    def again(self, run: str) -> str:
        """Triggers a recovery once more, with the same values: what Copy to new run does."""
        return self.run("recover", **self.api.get(f"flow_runs/{run}").json()["parameters"])

    def state(self, run: str) -> dict[str, Any]:
        return self.api.get(f"flow_runs/{run}").json()["state"]

    def set_state(self, run: str, kind: str, name: str) -> None:
        self.post(f"flow_runs/{run}/set_state", state={"type": kind, "name": name})

    def cancel(self, run: str) -> None:
        self.set_state(run, "CANCELLING", "Cancelling")

    def until_state(self, run: str, *names: str, seconds: float = PATIENCE) -> dict[str, Any]:
        try:
            return until(lambda: (state := self._state(run)) and state["name"] in names and state, seconds, f"{run} becoming {' or '.join(names)}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state(run)}\n{self.run_log(run)}") from error

    def _state(self, run: str) -> dict[str, Any] | None:
        try:
            return self.state(run)
        except httpx.HTTPError:  # the server is being started again
            return None

    def run_log(self, run: str) -> str:
        """The run's log, which on a busy machine is longer than one answer of the API."""
        chosen, lines = {"flow_run_id": {"any_": [run]}}, list[str]()
        while part := self.post("logs/filter", logs=chosen, sort="TIMESTAMP_ASC", limit=200, offset=len(lines)):
            lines += [line["message"] for line in part]
        return "\n".join(lines)

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        return self.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})


def steps(out: str) -> int:
    """Rows in a stage's metrics."""
    rows = ROOT / OUT / out / "metrics.jsonl"
    return rows.read_text().count('"lr"') if rows.exists() else 0


def stages(out: str = "") -> list[psutil.Process]:
    """Living processes of the stage that works in a folder, or of all of this test's."""
    processes = []
    for process in psutil.process_iter(["cmdline", "status"]):
        works_in = next((word for word in process.info["cmdline"] or [] if word.startswith(f"out={OUT}/")), None)
        if works_in and (not out or works_in == f"out={OUT}/{out}") and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append(process)
    return processes


def engine(out: str) -> psutil.Process:
    """The process of the flow that has started a stage."""
    return stages(out)[0].parent()


def checkpoints(out: str) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (ROOT / OUT / out).glob("checkpoint-*[0-9]"))


@contextmanager
def serving(home: Path) -> Iterator[Serve]:
    """`make serve`; kills its process and all descendants at the end."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    serve = Serve(home)
    serve.start()
    try:
        yield serve
    finally:
        family = (
            [psutil.Process(serve.process.pid), *psutil.Process(serve.process.pid).children(recursive=True)] if serve.process.poll() is None else []
        )
        serve.process.terminate()
        serve.process.wait(60)
        for process in family:
            if process.is_running():
                process.kill()
        shutil.rmtree(ROOT / OUT, ignore_errors=True)
