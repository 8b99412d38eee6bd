"""`make serve`: a Prefect server on this machine, and two runners for the deployments; supervises them until stopped."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlparse
from uuid import UUID

import httpx
import psutil
from dotenv import load_dotenv

from dev2pro import signals
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from dev2pro.escape import printable
from flows.serve import password

ORIGINS = "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"
LOGS = ROOT / "runs" / ".serve"
DEFAULTS = {  # used unless the environment or .env sets them
    "PREFECT_HOME": str(ROOT / ".prefect"),
    "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    "PREFECT_UI_API_URL": "/api",  # on the host that serves the UI
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",  # survives a restart of the server
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # so that a year of runs does not fill the disk
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(180 * 86400),  # seconds
    "PYTHONPATH": str(ROOT),  # flows are loaded from their files
    "PREFECT_CLIENT_MAX_RETRIES": "9",  # with doubling pauses: the server may be down for eight minutes
    "PREFECT_RUNNER_POLL_FREQUENCY": "5",  # seconds between polls for scheduled runs
}
START, POLL, MIN_UPTIME = (
    120.0,
    5.0,
    10.0,
)  # seconds: until the server must respond; between two checks; below which a child restarts with a longer pause
STOP_TIMEOUT = 40.0  # seconds for flows to end after SIGTERM: they wait 25 for their stages


class Child:
    """A process that is restarted when it dies. It has its own session, so that only this process gets Ctrl-C; its output goes to a file."""

    def __init__(self, name: str) -> None:
        self.name, self.log, self.environment = name, LOGS / f"{name}.log", dict(os.environ)
        self.process: subprocess.Popen | None = None
        self.began, self.pause, self.next = 0.0, 1.0, 0.0

    def ensure_running(self) -> None:
        """Starts the process if it is not running, with an exponential pause if it died soon after its start."""
        now = time.monotonic()
        if self.process and self.process.poll() is None:
            return
        if self.process:
            if not self.next:
                self.pause = min(60.0, 2 * self.pause) if now - self.began < MIN_UPTIME else 1.0
                self.next = now + self.pause
                log(f"{self.name} ended with {self.process.returncode} and is started again in {self.pause:.0f} s; see {self.log}")
            if now < self.next:
                return
        self.began, self.next = now, 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve", self.name], cwd=ROOT, env=self.environment, stdout=self._file(), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def end(self, number: signal.Signals, timeout: float = 20.0) -> None:
        """Sends the signal, and SIGKILL after the timeout."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _file(self) -> IO[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("ab")


def log(text: str) -> None:
    """Prints a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {printable(text)}", flush=True)


def main() -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code."""
    address = urlparse(os.environ["PREFECT_API_URL"])
    if not is_port_free(address.hostname or "", address.port or 80):
        print(f"serve: {address.netloc} is in use, perhaps by another `make serve`. Stop that, or set PREFECT_API_URL in .env.", file=sys.stderr)
        return 2
    try:
        password_note = password.configure()
        check_origins()
    except ConfigError as error:
        print(f"serve: {error}", file=sys.stderr)
        return error.exit_code
    began, stop_requested = time.monotonic(), [False]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_requested.__setitem__(0, True))
    server, runners = Child("server"), [Child("training"), Child("cheap")]
    os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "1"  # in this process only: it restarts the server and must not wait for it
    server.ensure_running()
    if not wait(server_responds, START, lambda: stop_requested[0] or server.process.poll() is not None):  # type: ignore[union-attr]
        server.end(signal.SIGINT)
        if not stop_requested[0]:
            print(f"serve: the server did not come up within {START:.0f} s; see {server.log}", file=sys.stderr)
        return 1
    from prefect.client.orchestration import get_client  # takes seconds, while the server starts

    from flows.serve import deployments, notify, reconcile

    with get_client(sync_client=True) as client:
        reconciler = reconcile.Reconciler(client)
        for sentence in deployments.restore_code_fields(client):
            log(sentence)
        if resumed := reconciler.resume(deployments.names()):
            log(f"going on with runs that were cut off: {', '.join(resumed)}")
        if notify.arrange(client):
            log(f"failures and regressions are told to the address in {notify.WEBHOOK}")
        for child in runners:
            child.ensure_running()
        log_errors(
            lambda: wait(
                lambda: {deployment.name for deployment in client.read_deployments()} >= set(deployments.names()), START, lambda: stop_requested[0]
            )
        )
        log(f"ready after {time.monotonic() - began:.0f} s: http://{address.netloc}/v2/deployments   (Ctrl-C stops; logs are in {LOGS})")
        print(password_note, flush=True)
        while not stop_requested[0]:
            for child in (server, *runners):
                child.ensure_running()
            log_errors(reconciler.reconcile)
            wait(lambda: stop_requested[0], POLL)
        log_errors(reconciler.reconcile)  # runs cancelled just now must not be resumed
        ended = stop_runners(runners)
        log_errors(lambda: reconciler.resume(deployments.names(), ended))
    server.end(signal.SIGINT)
    return 0


def check_origins() -> None:
    """Raises ConfigError unless every allowed CORS origin is an explicit one."""
    for origin in os.environ[ORIGINS].split(","):
        if "*" in origin:
            raise ConfigError(f"{ORIGINS} allows every page there is. Name the addresses that the UI is opened at, with commas between them.")
        if not re.fullmatch(r"https?://[^/?#@\s]+", origin):
            raise ConfigError(f"{ORIGINS}: {origin!r} is no address of a page. Write it as the browser has it, such as https://dev2pro.example.com.")


def stop_runners(runners: list[Child]) -> list[UUID]:
    """Kills the runners, so that no run starts, then terminates the flows, whose stages save. Returns the runs that were running."""
    from flows.processes import liveness

    pids = {engine.pid for child in runners if child.process for engine in psutil.Process(child.process.pid).children() if is_run(engine)}
    for child in runners:
        child.end(signal.SIGKILL)  # on SIGTERM it would cancel its runs, which must resume later
    processes = [process for process in liveness.started_runs() if process.pid]
    pids |= {process.pid for process in processes}
    log(f"stopping; runs that save and go on at the next start: {len(pids)}")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    wait(lambda: not any(psutil.pid_exists(pid) for pid in pids), STOP_TIMEOUT)
    return [process.run_id for process in processes]


def is_run(process: psutil.Process) -> bool:
    """Whether a runner's child is a flow run, and not multiprocessing's resource tracker."""
    with suppress(psutil.Error):
        return not any("resource_tracker" in arg for arg in process.cmdline())
    return False


def log_errors(work: Callable[[], object]) -> None:
    """Runs `work` and logs its error: the server may be down for a moment."""
    try:
        work()
    except Exception as error:
        log(f"cannot look after the runs at the moment ({type(error).__name__}: {error})")


def wait(done: Callable[[], bool], seconds: float, give_up: Callable[[], bool] = lambda: False) -> bool:
    """Polls until `done` is true, for at most so many seconds; whether it became true. `give_up` ends the wait early."""
    end = time.monotonic() + seconds
    while not done():
        if give_up() or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def server_responds() -> bool:
    """Whether the server's health endpoint responds."""
    try:
        return httpx.get(f"{os.environ['PREFECT_API_URL']}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def is_port_free(host: str, port: int) -> bool:
    """Whether the port can be bound."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
        return True


def child(name: str) -> None:
    """Runs the server, or a runner, in this process."""
    address = urlparse(os.environ["PREFECT_API_URL"])
    if name == "server":
        signals.signal_at_parent_death(signal.SIGTERM)
        from flows.serve import server

        server.run(address.hostname or "127.0.0.1", address.port or 4200)
        return
    signals.signal_at_parent_death(signal.SIGKILL)  # its runs go on without it; on SIGTERM it would cancel them
    from flows.serve import deployments

    deployments.run(name)


if __name__ == "__main__":
    load_dotenv(Path(ROOT, ".env"))
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(ORIGINS, os.environ["PREFECT_API_URL"].removesuffix("/api"))
    if sys.argv[1:]:
        child(sys.argv[1])
    else:
        sys.exit(main())
