"""A page of another origin, in a real browser, tries all that browsers send without asking; the gate alone is between it and the API.

The server of these tests has neither password nor CSRF protection, so that nothing else can refuse. At 62143d3 every test here fails (runs begin,
websockets open, the UI is shown in a frame) but for the page of no origin, which Chromium itself keeps from loopback.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import sync_playwright

from tests.flows.clone import cloned
from tests.flows.serve.test_browser import CHROMIUM, QUIET

pytestmark = [pytest.mark.operator, pytest.mark.ci, pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="apt-get install chromium")]

ATTACK = """async ([api, deployment]) => {
  const run = JSON.stringify({parameters: {recover: {out: "runs/foreign", steps: 1}}}), said = {};
  const start = `${api}/deployments/${deployment}/create_flow_run`;
  const tried = async (name, attempt) => { said[name] = await attempt().catch(error => "refused") };
  const simple = (body, headers = {}) => fetch(start, {method: "POST", mode: "no-cors", body, headers}).then(answer => answer.type);
  await tried("blob", () => simple(new Blob([run])));
  await tried("text", () => simple(run));
  await tried("multipart", () => { const form = new FormData(); form.append("state", "{}"); return simple(form) });
  await tried("urlencoded", () => simple(new URLSearchParams({state: "{}"})));
  await tried("json", () => fetch(start, {method: "POST", body: run, headers: {"Content-Type": "application/json"}}).then(a => a.status));
  await tried("read", () => fetch(`${api}/deployments/${deployment}`).then(answer => answer.text()));
  await tried("token", () => fetch(`${api}/csrf-token?client=x`).then(answer => answer.text()));
  await tried("beacon", async () => navigator.sendBeacon(start, new Blob([run])));
  await tried("typed beacon", async () => navigator.sendBeacon(start, new Blob([run], {type: "text/plain"})));
  const loaded = (tag, more) => new Promise((resolve, reject) => {
    const one = Object.assign(document.createElement(tag), more);
    one.onload = () => resolve("loaded"); one.onerror = () => reject(); document.body.append(one); setTimeout(reject, 3000);
  });
  await tried("image", () => loaded("img", {src: `${api}/../v2/ico/favicon.ico`}));
  await tried("script", () => loaded("script", {src: `${api}/deployments/${deployment}`}));
  await tried("style", () => loaded("link", {rel: "stylesheet", href: `${api}/deployments/${deployment}`}));
  await tried("prefetch", () => loaded("link", {rel: "prefetch", href: `${api}/deployments/${deployment}`}));
  for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
    await tried("form " + enctype, async () => {
      const frame = Object.assign(document.createElement("iframe"), {name: enctype}); document.body.append(frame);
      const form = Object.assign(document.createElement("form"), {action: start, method: "POST", enctype, target: enctype});
      form.append(Object.assign(document.createElement("input"), {name: run.slice(0, -1) + ', "name": "', value: '"}'}));
      document.body.append(form); form.submit();
      return await new Promise(resolve => setTimeout(() => resolve("sent"), 500));
    });
  }
  for (const path of ["events/in", "events/out", "logs/out"]) {
    await tried("socket " + path, () => new Promise((resolve, reject) => {
      const socket = new WebSocket(`${api.replace("http", "ws")}/${path}`, "prefect");
      socket.onopen = () => resolve("open"); socket.onerror = reject;
    }));
  }
  return said;
}"""
FORMS = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
UNANSWERED = {"beacon": True, "typed beacon": True} | {f"form {kind}": "sent" for kind in FORMS}  # the browser sends them and tells the page nothing


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    settings = {"DEV2PRO_NO_PASSWORD": "true", "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false"}
    with cloned(tmp_path_factory.mktemp("open"), closed=False, **settings) as clone:
        yield clone


@pytest.fixture(scope="module")
def elsewhere():
    """The port of another web server on this machine."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>evil</title><body>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.mark.parametrize("where", ["another port", "another name and port", "the server itself under another name", "a page of no origin"])
def test_a_foreign_page_changes_and_reads_nothing(serve, browser, elsewhere, where):
    deployment = serve.deployments()["recover"]["id"]
    counts = {path: serve.post(f"{path}/count") for path in ("flow_runs", "deployments", "flows", "variables", "automations")}
    page, answers = browser.new_page(), list[tuple[int, str, str]]()
    page.on("response", lambda answer: answers.append((answer.status, answer.request.method, answer.url)))
    if where == "a page of no origin":
        page.goto("data:text/html,<body>")
        port = 0
    else:
        name, port = {
            "another port": ("127.0.0.1", elsewhere),
            "another name and port": ("localhost", elsewhere),
            "the server itself under another name": ("localhost", serve.port),
        }[where]
        page.goto(f"http://{name}:{port}/api/health" if port == serve.port else f"http://{name}:{port}/")
    outcomes = page.evaluate(ATTACK, [f"{serve.address}/api", deployment])
    page.wait_for_timeout(500)
    page.close()
    assert outcomes == {name: UNANSWERED.get(name, "refused") for name in outcomes}
    assert len(outcomes) == 19
    responses = [answer for answer in answers if urlsplit(answer[2]).netloc == urlsplit(serve.address).netloc]
    assert {status for status, *_ in responses} == ({403} if "another" in where and port == elsewhere else set())  # else none is even sent
    assert {path: serve.post(f"{path}/count") for path in counts} == counts


def test_a_foreign_page_cannot_show_the_ui_inside_itself_but_may_link_to_it(serve, browser, elsewhere):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{elsewhere}/")
    page.evaluate("address => document.body.append(Object.assign(document.createElement('iframe'), {src: address}))", f"{serve.address}/v2/")
    page.wait_for_timeout(3000)
    frame = page.frames[1]
    assert "Dashboard" not in frame.content()
    page.evaluate(
        "address => document.body.append(Object.assign(document.createElement('a'), {href: address, innerText: 'go'}))",
        f"{serve.address}/v2/deployments",
    )
    page.get_by_text("go").click()
    page.get_by_role("link", name="evaluate", exact=True).first.wait_for(timeout=60_000)
    page.close()


def test_raw_requests_with_a_foreign_name_or_origin_are_refused(serve):
    deployment = serve.deployments()["recover"]["id"]
    before, body = serve.post("flow_runs/count"), json.dumps({"parameters": {"recover": {"out": "runs/raw", "steps": 1}}})
    start, kind = f"{serve.address}/api/deployments/{deployment}/create_flow_run", {"Content-Type": "application/json"}
    for headers, status in (
        ({"Host": f"evil.example:{serve.port}"}, 400), ({"Host": f"evil.example:{serve.port}", "Origin": f"http://evil.example:{serve.port}"}, 400),
        ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ):  # fmt: skip
        assert httpx.post(start, content=body, headers=kind | headers).status_code == status, headers
        assert httpx.get(f"{serve.address}/api/deployments/{deployment}", headers=headers).status_code == status, headers
        assert "Invalid host" in (text := httpx.get(f"{serve.address}/v2/", headers=headers).text) or "another origin" in text
    for other in ({}, {"Content-Type": "text/plain"}):
        assert httpx.post(start, content=body, headers=other).status_code == 415
    assert serve.post("flow_runs/count") == before
    assert httpx.post(start, content=body, headers=kind).status_code == 201  # so it is refused for no other reason


def test_sockets_with_a_foreign_name_or_origin_are_refused(serve):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    address = f"ws://127.0.0.1:{serve.port}/api/events/out"
    with connect(address, subprotocols=["prefect"], origin=serve.address):
        pass
    for origin in ("https://evil.example", f"http://localhost:{serve.port}", "null"):
        with pytest.raises(InvalidStatus, match="403"):
            connect(address, subprotocols=["prefect"], origin=origin)
    with pytest.raises(InvalidStatus, match="400"):
        connect(address.replace("127.0.0.1", "evil.example"), sock=_connected(serve.port), subprotocols=["prefect"])


def _connected(port: int):
    import socket

    return socket.create_connection(("127.0.0.1", port))
