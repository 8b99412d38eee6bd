"""docs/nginx.conf before a closed server: TLS, the password, websockets, the UI; and nothing that would let somebody run code."""

import json
import shutil
import ssl
import subprocess
import sys
import uuid
from urllib.parse import urlparse

import httpx
import pytest
from playwright.sync_api import sync_playwright

from dev2pro.artifacts.record import ROOT
from tests.flows.clone import PASSWORD, RECOVER, cloned
from tests.flows.operator import free_port, until
from tests.flows.serve.test_browser import CHROMIUM, QUIET, log_in

pytestmark = [pytest.mark.operator, pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="apt-get install nginx-light")]
LISTENING = "listen 443 ssl http2;"
REFUSING = "if ($dev2pro_refused) { return 403; }"

ATTEMPTS = """PATCH /api/deployments/ID
POST /api/deployments/
DELETE /api/deployments/ID
POST /api/work_pools/
PATCH /api/work_pools/mine
POST /api/flow_runs/
POST /api/flows/
POST /api/automations/
POST /api/block_documents/filter
POST /api/variables/filter
PUT /api/admin/storage
GET /api/block_documents/ID
GET /api/block_types/slug/webhook/block_documents
GET /api/events/in
GET /api/openapi.json
GET /api
GET /api/%62lock_documents/ID
GET /api/flows/%2e%2e/block_documents/ID
GET /api/flows/..%2fblock_documents/ID
POST /api/flows/../variables/filter
POST //api/variables/filter
GET //api/block_documents/ID
GET /x/../api/block_documents/ID
GET /ui/../api/block_documents/ID?api/""".splitlines()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with cloned(tmp_path_factory.mktemp("proxied")) as clone:
        yield clone


@pytest.fixture(scope="module")
def proxy(serve, tmp_path_factory):
    """nginx twice: as the file says, and without the line that refuses. Addresses of both, and the certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    args = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]
    subprocess.run(["openssl", *args, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True)
    text = (ROOT / "docs/nginx.conf").read_text()
    assert LISTENING in text
    assert REFUSING in text
    for old, new in (
        ("/etc/ssl/certs/dev2pro.pem", f"{folder}/cert.pem"), ("/etc/ssl/private/dev2pro.key", f"{folder}/key.pem"),
        ("127.0.0.1:4200", f"127.0.0.1:{serve.port}"), ("dev2pro.example.com", "localhost"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    strict, whole = free_port(), free_port()
    site = text[text.index("\nserver {") :]
    text = text.replace(LISTENING, f"listen 127.0.0.1:{strict} ssl http2;") + site.replace(LISTENING, f"listen 127.0.0.1:{whole} ssl http2;").replace(
        REFUSING, ""
    )
    (folder / "site.conf").write_text(text)
    temp_paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    inside = f"access_log {folder}/access.log; {temp_paths} include /etc/nginx/mime.types; include {folder}/site.conf;"
    (folder / "nginx.conf").write_text(f"pid {folder}/pid; error_log {folder}/error.log; daemon off; user root; events {{}} http {{ {inside} }}")
    child = subprocess.Popen([shutil.which("nginx", path="/usr/sbin:/usr/bin"), "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    until(lambda: answers(f"https://localhost:{strict}/api/health", folder), what="nginx")
    yield {
        "strict": f"https://localhost:{strict}",
        "whole": f"https://localhost:{whole}",
        "trusted": ssl.create_default_context(cafile=folder / "cert.pem"),
        "certificate": str(folder / "cert.pem"),
    }
    child.terminate()
    child.wait(20)


def answers(address: str, folder) -> bool:
    try:
        return httpx.get(address, verify=ssl.create_default_context(cafile=folder / "cert.pem")).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def operator(serve, proxy):
    """Somebody who has the password, on another machine."""
    with httpx.Client(base_url=f"{proxy['strict']}/api/", auth=("admin", PASSWORD), verify=proxy["trusted"], timeout=60) as client:
        name = str(uuid.uuid4())
        token = client.get("csrf-token", params={"client": name}).raise_for_status().json()["token"]
        client.headers.update({"Prefect-Csrf-Client": name, "Prefect-Csrf-Token": token})
        yield client


@pytest.mark.ci
def test_the_password_is_asked_for(proxy):
    for path in ("flow_runs/filter", "deployments/filter"):
        answer = httpx.post(f"{proxy['strict']}/api/{path}", json={}, verify=proxy["trusted"])
        assert answer.status_code in (401, 403)
        assert "www-authenticate" not in answer.headers  # browsers would remember it, and send it for other pages
    assert httpx.get(f"{proxy['strict']}/api/csrf-token?client=x", verify=proxy["trusted"]).status_code == 401


def test_an_operator_starts_watches_cancels_and_switches(serve, operator):
    deployment = serve.deployments()["recover"]
    body = {"parameters": {"recover": {**RECOVER, "out": "runs/proxied"}}, "state": {"type": "SCHEDULED"}}
    run = operator.post(f"deployments/{deployment['id']}/create_flow_run", json=body).raise_for_status().json()["id"]
    operator.post(f"flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING", "name": "Cancelling"}}).raise_for_status()
    serve.until_state(run, "Cancelled")
    for path in ("flow_runs/filter", "flow_runs/paginate", "artifacts/filter", "logs/filter", "ui/flow_runs/count-task-runs"):
        operator.post(path, json={"flow_run_ids": [run]} if "ui/" in path else {}).raise_for_status()
    assert operator.get(f"flow_runs/{run}").json()["id"] == run
    yearly = [{"schedule": {"cron": "0 0 1 1 *"}, "active": True}]
    schedule = serve.api.post(f"deployments/{deployment['id']}/schedules", json=yearly).raise_for_status().json()[0]["id"]
    operator.patch(f"deployments/{deployment['id']}/schedules/{schedule}", json={"active": False}).raise_for_status()
    assert [one["active"] for one in serve.deployments()["recover"]["schedules"]] == [False]


@pytest.mark.ci
def test_what_would_run_code_is_refused(serve, operator):
    deployment = serve.deployments()["recover"]["id"]
    body = {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "touch pwned"}}], "include_secrets": True}
    for attempt in ATTEMPTS:
        method, path = attempt.replace("ID", deployment).split()
        answer = operator.request(method, "", json=None if method == "GET" else body, extensions={"target": path.encode()})
        refused, page = answer.status_code in (400, 403, 404), "<!doctype html>" in answer.text.lower()  # the UI has a page for every path
        assert refused or page, (attempt, answer.status_code, answer.text)
    assert serve.api.get(f"deployments/{deployment}").json()["pull_steps"] in (None, [])


def test_websockets_work_through_it(proxy):
    from websockets.sync.client import connect

    for site, paths in (("strict", ["events/out", "logs/out"]), ("whole", ["events/in", "events/out", "logs/out"])):
        for path in paths:
            with connect(f"{proxy[site].replace('https', 'wss')}/api/{path}", subprotocols=["prefect"], ssl=proxy["trusted"]) as socket:
                socket.send(json.dumps({"type": "auth", "token": f"admin:{PASSWORD}"}))
                assert json.loads(socket.recv(timeout=20))["type"] == "auth_success"


def test_prefect_s_own_commands_come_through_where_nothing_is_refused(serve, proxy, tmp_path):
    environment = serve.environment() | {
        "PREFECT_API_URL": f"{proxy['whole']}/api", "PREFECT_API_AUTH_STRING": f"admin:{PASSWORD}", "PREFECT_API_SSL_CERT_FILE": proxy["certificate"],
        "PREFECT_HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "prefect", "deployment", "ls"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "recover" in result.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="apt-get install chromium")
@pytest.mark.ci
def test_the_ui_works_through_it(serve, proxy):
    from playwright.sync_api import sync_playwright

    deployment = serve.deployments()["recover"]["id"]
    run = serve.run("recover", recover={**RECOVER, "out": "runs/proxied"})
    refused = set()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(ignore_https_errors=True, base_url=proxy["strict"])
        page.set_default_timeout(60_000)
        page.on("response", lambda answer: refused.add((answer.request.method, answer.url.split("/api/")[-1])) if answer.status == 403 else None)
        log_in(page, f"admin:{PASSWORD}")
        for path, text in (
            ("deployments", "distill"), (f"deployments/deployment/{deployment}", "Runs"), (f"deployments/deployment/{deployment}/run", "Submit"),
            (f"runs/flow-run/{run}", "Task Runs"), ("runs", "Flow Runs"), ("artifacts", "All Types"),
        ):  # fmt: skip
            page.goto(f"{proxy['strict']}/v2/{path}")
            page.get_by_text(text).first.wait_for()
            page.wait_for_timeout(3000)
            assert "Something went wrong" not in page.inner_text("body")
        browser.close()
    assert not refused


def test_the_ui_asks_nobody_else(proxy, serve):
    requested, blocked = set(), set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(ignore_https_errors=True)
        page.on("request", lambda request: requested.add(urlparse(request.url).hostname))
        page.on("requestfailed", lambda request: blocked.add(urlparse(request.url).hostname) if "csp" in (request.failure or "").lower() else None)
        page.goto(f"{proxy['strict']}/v2/login")
        page.get_by_role("textbox").first.fill(f"admin:{PASSWORD}")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Deployments").click()
        page.get_by_role("link", name="recover", exact=True).first.wait_for()
        browser.close()
    assert requested - blocked == {"localhost"}
