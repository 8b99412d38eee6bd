"""Hostile captions, names and output of a stage in a real browser: the report and the UI show them as text; nothing runs, loads or is drawn."""

import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from dev2pro.artifacts.record import ROOT
from dev2pro.judging import report
from tests.dev2pro.judging.test_report import PROMPTS, fake_grids, fake_metrics
from tests.flows.operator import until
from tests.flows.serve.test_browser import browser, log_in, serve, shot  # noqa: F401 (fixtures)

pytestmark = pytest.mark.operator
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "![](http://tracker.example/x.png)",
    "[click](javascript:window.pwned=1)",
    "\x1b]0;owned\x07\x1b[2J\u202eevil",
    '" onmouseover="window.pwned = 1',
]
FLOW = """
import json, pathlib, sys
from types import SimpleNamespace
from PIL import Image
from prefect import flow
from prefect.artifacts import ProgressArtifact, TableArtifact
from prefect.logging import get_run_logger
from flows.generations import history
from flows.processes import launch
from flows.processes.gpu_slots import Slots
from flows.ui import progress, verdict
HOSTILE = eval(sys.argv[1])
text, folder = " ".join(HOSTILE), pathlib.Path(sys.argv[2])
(folder / "sheets").mkdir()
Image.new("RGB", (8, 8)).save(folder / "sheets" / "0.png")
strange = folder / HOSTILE[1]
(strange / "checkpoint-000002").mkdir(parents=True)
(strange / "checkpoint-000002" / "checkpoint.json").write_text(json.dumps({"held_out": 0.5}))
(strange / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\\n")
gain = {"metric": "prompt_fidelity", "style": text, "arm": text, "rival": text, "mean": 0.1, "low": 0.0, "high": 0.2}

@flow(name="hostile")
def hostile():
    verdict.show(SimpleNamespace(metrics={"verdict": text, "gains": [gain]}, uri=str(folder)))
    history.show("hostile", [{"shard": text, "reason": one} for one in HOSTILE])
    reporter = progress.ProgressReporter("lora " + HOSTILE[1], strange, get_run_logger().info)
    reporter.on_event({"stage": text, "step": 1, "of": 2, "text": text})
    reporter.end()
    code = f"for one in {HOSTILE!r}: print(one)\\nraise SystemExit(3)"
    launch._run_process("stage", ["-c", code], Slots((), {}), None, get_run_logger().info)

hostile()
"""


@pytest.fixture
def page(browser):  # noqa: F811
    """A page that records dialogs, console errors and requested hosts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.dialogs, page.hosts, page.errors = [], set(), []
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()


def nothing_came_of_it(page) -> None:
    assert page.evaluate("window.pwned") is None
    assert not page.dialogs
    assert not page.evaluate(
        "[...document.querySelectorAll('a')].filter(one => !/^(https?|mailto|file):/.test(one.href)).length"
    )  # bare ones wait for a click
    assert not page.evaluate("document.querySelectorAll('[onmouseover], [onerror], [onload], base, object, embed').length")
    assert not page.evaluate("[...document.querySelectorAll('img')].map(one => one.src).filter(src => !src.startsWith('data:'))")
    assert not page.evaluate(r"/[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]/.test(document.body.innerText)")
    assert "owned" not in page.title()


def test_the_report(page, tmp_path):
    metrics = fake_metrics(["chalk", HOSTILE[0]])
    metrics["settings"]["prompts"] = [*PROMPTS[:4], *HOSTILE]
    metrics["verdict"] = " ".join(HOSTILE)
    grids = [report.Grid(style, 0, [*PROMPTS[:4], *HOSTILE], fake_grids(["chalk"])[0].rows) for style in ("chalk", HOSTILE[0])]
    report.write(tmp_path / "report.html", metrics, grids)
    page.goto(f"file://{tmp_path}/report.html")
    assert page.get_by_text(HOSTILE[1]).count()
    assert page.title() == f"dev2pro evaluation: chalk, {HOSTILE[0]}"
    assert not page.locator("script").count()
    page.mouse.move(600, 400)
    shot(page, "hostile-report")
    nothing_came_of_it(page)
    assert page.errors == []
    assert page.hosts <= {"", None}


@pytest.mark.ci
def test_the_ui(page, serve, tmp_path):  # noqa: F811
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "home")}
    environment |= {"PREFECT_API_URL": f"{serve.address}/api", "PREFECT_API_AUTH_STRING": serve.user}
    command = [sys.executable, "-c", FLOW, repr(HOSTILE), tmp_path]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=240, capture_output=True).returncode == 1
    run = serve.post("flow_runs/filter", flows={"name": {"any_": ["hostile"]}})[0]["id"]
    until(lambda: len(serve.run_log(run).splitlines()) >= len(HOSTILE), what="the log")
    assert serve.run_log(run).replace("\n", "").isprintable()
    log_in(page, serve.user, serve.address)
    ids = [artifact["id"] for artifact in serve.artifacts(run) if artifact["description"]]
    for number, path in enumerate([f"runs/flow-run/{run}", *(f"artifacts/artifact/{artifact}" for artifact in ids), "artifacts", "runs"]):
        page.goto(f"{serve.address}/v2/{path}")
        page.get_by_text(re.compile("Progress|onerror|hostile")).first.wait_for(timeout=60_000)
        shot(page, f"hostile-{number}")
        nothing_came_of_it(page)
    assert len(ids) == 5
    assert page.hosts - {"sr-client-cfg.amplitude.com"} == {"127.0.0.1"}
    assert not [line for line in page.errors if "violates" in line and "amplitude" not in line]
