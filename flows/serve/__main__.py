"""`make serve`: a Prefect server on this machine, two runners for the deployments, and an eye on both, until it is stopped."""

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
DEFAULTS = {  # where neither the environment nor .env says otherwise
    "PREFECT_HOME": str(ROOT / ".prefect"),
    "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    "PREFECT_UI_API_URL": "/api",  # where the UI itself comes from
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",  # outlives the server
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # so that a year of runs does not fill the disk
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(180 * 86400),  # seconds
    "PYTHONPATH": str(ROOT),  # flows are loaded from their files
    "PREFECT_CLIENT_MAX_RETRIES": "9",  # with doubling pauses: the server may be gone for eight minutes
    "PREFECT_RUNNER_POLL_FREQUENCY": "5",  # seconds from a click to its start
}
START, LOOK, QUICKLY = 120.0, 5.0, 10.0  # seconds: for the server to answer; between two looks; a child that lived no longer than this is not well
ENGINES = 40.0  # seconds for flows to end once they are asked: they wait 25 for their stages


class Child:
    """A process that is started again when it dies. In a session of its own, so that Ctrl-C comes to this process alone; its words go to a file."""

    def __init__(self, name: str) -> None:
        self.name, self.log, self.environment = name, LOGS / f"{name}.log", dict(os.environ)
        self.process: subprocess.Popen | None = None
        self.began, self.pause, self.next = 0.0, 1.0, 0.0

    def ensure_running(self) -> None:
        """Starts it if it does not run, after a pause that grows while it dies at once."""
        now = time.monotonic()
        if self.process and self.process.poll() is None:
            return
        if self.process:
            if not self.next:
                self.pause = min(60.0, 2 * self.pause) if now - self.began < QUICKLY else 1.0
                self.next = now + self.pause
                say(f"{self.name} ended with {self.process.returncode} and is started again in {self.pause:.0f} s; see {self.log}")
            if now < self.next:
                return
        self.began, self.next = now, 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve", self.name], cwd=ROOT, env=self.environment, stdout=self._file(), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def end(self, number: signal.Signals, patience: float = 20.0) -> None:
        """Ends it, at last with -9."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _file(self) -> IO[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("ab")


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {printable(text)}", flush=True)


def main() -> int:
    """Until SIGTERM or SIGINT. Returns the exit code."""
    address = urlparse(os.environ["PREFECT_API_URL"])
    if not free(address.hostname or "", address.port or 80):
        print(f"serve: {address.netloc} is in use, perhaps by another `make serve`. Stop that, or set PREFECT_API_URL in .env.", file=sys.stderr)
        return 2
    try:
        who_may = password.configure()
        check_origins()
    except ConfigError as error:
        print(f"serve: {error}", file=sys.stderr)
        return error.exit_code
    began, asked = time.monotonic(), [False]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.__setitem__(0, True))
    server, runners = Child("server"), [Child("training"), Child("cheap")]
    os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "1"  # here alone: whoever waits for the server cannot start it again
    server.ensure_running()
    if not wait(answers, START, lambda: asked[0] or server.process.poll() is not None):  # type: ignore[union-attr]
        server.end(signal.SIGINT)
        if not asked[0]:
            print(f"serve: the server did not come up within {START:.0f} s; see {server.log}", file=sys.stderr)
        return 1
    from prefect.client.orchestration import get_client  # takes seconds, in which the server comes up

    from flows.serve import deployments, notify, reconcile

    with get_client(sync_client=True) as client:
        eye = reconcile.Reconciler(client)
        for sentence in deployments.restore_code_fields(client):
            say(sentence)
        if resumed := eye.resume(deployments.names()):
            say(f"going on with runs that were cut off: {', '.join(resumed)}")
        if notify.arrange(client):
            say(f"failures and regressions are told to the address in {notify.WEBHOOK}")
        for child in runners:
            child.ensure_running()
        log_errors(lambda: wait(lambda: {one.name for one in client.read_deployments()} >= set(deployments.names()), START, lambda: asked[0]))
        say(f"ready after {time.monotonic() - began:.0f} s: http://{address.netloc}/v2/deployments   (Ctrl-C stops; logs are in {LOGS})")
        print(who_may, flush=True)
        while not asked[0]:
            for child in (server, *runners):
                child.ensure_running()
            log_errors(eye.reconcile)
            wait(lambda: asked[0], LOOK)
        log_errors(eye.reconcile)  # who was cancelled a moment ago is not to go on
        ended = stopped(runners)
        log_errors(lambda: eye.resume(deployments.names(), ended))
    server.end(signal.SIGINT)
    return 0


def check_origins() -> None:
    """Raises ConfigError where the pages that may use the API are not named."""
    for origin in os.environ[ORIGINS].split(","):
        if "*" in origin:
            raise ConfigError(f"{ORIGINS} allows every page there is. Name the addresses that the UI is opened at, with commas between them.")
        if not re.fullmatch(r"https?://[^/?#@\s]+", origin):
            raise ConfigError(f"{ORIGINS}: {origin!r} is no address of a page. Write it as the browser has it, such as https://dev2pro.example.com.")


def stopped(runners: list[Child]) -> list[UUID]:
    """Ends the runners first, so that nothing new begins, then the flows, which have their stages save. Returns the runs that had begun."""
    from flows.processes import liveness

    engines = {engine.pid for child in runners if child.process for engine in psutil.Process(child.process.pid).children() if is_run(engine)}
    for child in runners:
        child.end(signal.SIGKILL)  # asked nicely it would cancel its runs; they are to go on
    living = [life for life in liveness.started_runs() if life.pid]
    engines |= {life.pid for life in living}
    say(f"stopping; runs that save and go on at the next start: {len(engines)}")
    for pid in engines:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    wait(lambda: not any(psutil.pid_exists(pid) for pid in engines), ENGINES)
    return [life.run for life in living]


def is_run(process: psutil.Process) -> bool:
    """Whether a runner's child is a flow run; multiprocessing has a helper of its own beside them."""
    with suppress(psutil.Error):
        return not any("resource_tracker" in word for word in process.cmdline())
    return False


def log_errors(work: Callable[[], object]) -> None:
    """The server may be gone for a moment."""
    try:
        work()
    except Exception as error:
        say(f"cannot look after the runs at the moment ({type(error).__name__}: {error})")


def wait(done: Callable[[], bool], seconds: float, hopeless: Callable[[], bool] = lambda: False) -> bool:
    """Whether it was done within so many seconds."""
    end = time.monotonic() + seconds
    while not done():
        if hopeless() or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def answers() -> bool:
    """Whether the server is there."""
    try:
        return httpx.get(f"{os.environ['PREFECT_API_URL']}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
        return True


def child(name: str) -> None:
    """The work of one of the processes."""
    address = urlparse(os.environ["PREFECT_API_URL"])
    if name == "server":
        signals.signal_at_parent_death(signal.SIGTERM)
        from flows.serve import server

        server.run(address.hostname or "127.0.0.1", address.port or 4200)
        return
    signals.signal_at_parent_death(signal.SIGKILL)  # its runs go on without it; asked nicely it would cancel them
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
