"""`.env.example` configures a closed server that `make serve`, its runners and the UI work with."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from dotenv import dotenv_values

from dev2pro.artifacts.record import ROOT
from tests.flows.clone import PASSWORD, RECOVER, cloned
from tests.flows.operator import until


@pytest.fixture(scope="module")
def webhook():
    """The growing list of messages to a webhook, and its secret address."""
    messages = list[dict]()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield messages, f"http://127.0.0.1:{server.server_port}/s3cret/hook"
        server.shutdown()


@pytest.fixture(scope="module")
def serve(tmp_path_factory, webhook):
    settings = {"DEV2PRO_WEBHOOK": webhook[1], "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "15"}
    with cloned(tmp_path_factory.mktemp("closed"), **settings) as clone:
        yield clone


def test_every_setting_of_the_example_exists():
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings

    fields = _get_settings_fields(Settings)
    names = re.findall(r"^#?([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    assert {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "DEV2PRO_ROOTS"} <= set(names)
    code = "".join(file.read_text() for file in (ROOT / "flows").rglob("*.py"))
    unknown = [name for name in names if name not in fields and f'"{name}"' not in code]
    assert not unknown, f"neither prefect nor flows/ reads {unknown}"


def test_the_example_s_password_is_refused(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {k: v for k, v in dotenv_values(ROOT / ".env.example").items() if v} | {"PREFECT_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "flows.serve"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert "which everybody knows. Choose another" in result.stderr


@pytest.mark.operator
@pytest.mark.ci
def test_nobody_comes_in_without_the_password(serve):
    assert httpx.get(f"{serve.address}/api/health").status_code == 200
    for method, path in (("GET", "csrf-token?client=x"), ("GET", "admin/settings"), ("POST", "flow_runs/filter"), ("POST", "deployments/filter")):
        for auth in (None, ("admin", "wrong"), ("admin", "")):
            answer = httpx.request(method, f"{serve.address}/api/{path}", json={} if method == "POST" else None, auth=auth)
            assert answer.status_code in (401, 403), (path, auth, answer.text)
    assert httpx.post(f"{serve.address}/api/flow_runs/filter", json={}, headers=dict(serve.api.headers)).status_code == 401


@pytest.mark.operator
@pytest.mark.ci
def test_it_listens_on_loopback_only(serve):
    listening = {one.laddr.ip for process in serve.family() for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


@pytest.mark.operator
def test_failures_are_told(serve, webhook):
    run = serve.run("recover", recover={**RECOVER, "data": {"train": ["no/such/folder"]}, "out": "runs/failed"})
    serve.until_state(run, "Failed")
    until(lambda: webhook[0], what="the webhook")
    assert "prefect.flow-run.Failed" in webhook[0][0]["text"]


@pytest.mark.operator
def test_runs_complete_and_no_secret_is_seen(serve):
    seen, environment = set(), {}
    run = serve.run("recover", recover={**RECOVER, "out": "runs/closed"})

    def ended() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            seen.update(process.info["cmdline"] or [])
            if "out=runs/closed" in (process.info["cmdline"] or []):
                with suppress(psutil.Error):
                    environment.update(process.environ())
        return serve.state(run)["type"] in ("COMPLETED", "FAILED", "CRASHED")

    until(ended, 500, "the run's end")
    assert serve.state(run)["type"] == "COMPLETED", serve.run_log(run)
    assert any("stages.recover" in word for word in seen)
    texts = [serve.run_log(run), serve.log_file.read_text(), *(file.read_text() for file in (serve.folder / "runs/.serve").glob("*.log")), *seen]
    assert len(texts) > 4
    assert "DEV2PRO_EVENTS" in environment
    assert PASSWORD not in str(environment)  # of a stage
    for secret in (PASSWORD, "s3cret"):
        assert not [text for text in texts if secret in text]


@pytest.mark.operator
def test_runs_of_half_a_year_ago_are_removed(serve):
    old, young = serve.recovered("old"), serve.recovered("old")
    assert serve.artifacts(old)
    with closing(sqlite3.connect(serve.home / "prefect.db", timeout=60)) as database, database:
        for run, days in ((old, 181), (young, 179)):
            database.execute("UPDATE flow_run SET end_time = datetime('now', ?) WHERE id = ?", (f"-{days} days", run))
    until(lambda: serve.api.get(f"flow_runs/{old}").status_code == 404, what="removing the old run")
    until(lambda: not serve.run_log(old) and not serve.artifacts(old), what="removing its logs and artifacts")
    assert serve.state(young)["name"] == "Completed"
    assert serve.run_log(young)
    assert (serve.folder / "runs/old/artifact.json").exists()


@pytest.mark.operator
@pytest.mark.ci
def test_websockets_ask_for_the_password(serve):
    from websockets.sync.client import connect

    for path in ("events/in", "events/out", "logs/out"):
        address = f"ws://127.0.0.1:{serve.port}/api/{path}"
        assert _greeted(connect, address, f"admin:{PASSWORD}") == "auth_success"
        assert _greeted(connect, address, "admin:wrong") is None


def _greeted(connect, address: str, token: str) -> str | None:
    with connect(address, subprotocols=["prefect"]) as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        try:
            return json.loads(socket.recv(timeout=20))["type"]
        except Exception:
            return None


@pytest.mark.operator
def test_prefect_s_own_commands_read_the_same_settings(serve):
    command = [str(Path(sys.executable).with_name("prefect")), "deployment", "ls"]
    result = subprocess.run(command, cwd=serve.folder, env=serve.environment(), capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "recover" in result.stdout


def test_prefect_is_not_imported_before_the_settings_are_read():
    code = "import sys, flows.serve.__main__; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
