"""A Prefect server that cannot be reached ends a flow's command in one paragraph, soon, with 75."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError, TryAgainError
from flows.processes import reach
from tests.flows.operator import free_port


class Answers(BaseHTTPRequestHandler):
    """Answers every request with the status in its path, and a page."""

    def _answer(self) -> None:
        status = int(self.path.split("/")[1])
        if status == 0:
            time.sleep(3)
        self.send_response(status or 200)
        self.end_headers()
        self.wfile.write(b"<html>It works!</html>")

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def site() -> Iterator[str]:
    """A web server that is no Prefect server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def refused(url: str) -> str:
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(TryAgainError) as error:
        reach.check()
    assert url in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [("200", "no Prefect server"), ("404", "whose address ends in /api (404)"), ("500", "it answers 500"), ("503", "it answers 503"),
     ("401", "PREFECT_API_AUTH_STRING"), ("403", "refuses the password (403)"), ("0", "no answer within 1 s")],
)  # fmt: skip
def test_what_answers_otherwise(status, words, site, monkeypatch):
    monkeypatch.setattr(reach, "SECONDS", 1.0)
    assert words in refused(f"{site}/{status}/api")


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://nowhere.invalid/api", "not known"), ("garbage", "protocol"), ("ftp://127.0.0.1/api", "protocol"), ("https://{site}/api", "SSL"),
     ("http://127.0.0.1:{port}/api", "refused")],
)  # fmt: skip
def test_what_cannot_be_asked(url, words, site):
    said = refused(url.format(site=site.removeprefix("http://"), port=free_port()))
    assert words in said or "Name or service" in said or "name resolution" in said


def test_a_proxy_is_named_but_never_stands_before_this_machine(site, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{free_port()}")
    assert "it answers 500" in refused(f"{site}/500/api")  # it was asked itself
    said = refused("http://prefect.example.invalid/api")
    assert "through the proxy http" in said
    assert "secret" not in said


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with temporary_settings({PREFECT_HOME: tmp_path / "file" / "home"}), pytest.raises(ConfigError, match=r"PREFECT_HOME=.* cannot be written"):
        reach.check()


@pytest.mark.parametrize(
    ("command", "url"),
    [(["flows.pipeline", "plan=smoke", "out=runs/test-dead"], None), (["flows.recurring"], None), (["flows.concepts"], None),
     (["flows.single", "lora"], None), (["flows.miniature", "out=runs/test-dead"], None), (["flows.pipeline"], "http://[::1")],
)  # fmt: skip
def test_every_command_ends_with_75(command, url, tmp_path):
    settings = {"PREFECT_API_URL": url or f"http://127.0.0.1:{free_port()}/api", "PREFECT_HOME": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | settings
    ended = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert (ended.returncode, "Traceback" in ended.stderr) == (75, False), ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (ROOT / "runs/test-dead").exists()
