"""One recovered model, many concepts: each is trained and judged, and one that fails does not stop the others. Real stages, a few steps."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dev2pro.artifacts import record
from dev2pro.artifacts.record import ROOT

pytestmark = [pytest.mark.operator, pytest.mark.ci]
OUT = "runs/test-concepts"
RUN = """
import json, sys
from prefect.client.orchestration import get_client
from flows.concepts import concepts
from flows.forms import Concepts
state = concepts(Concepts(**json.loads(sys.argv[1])), return_state=True)
with get_client(sync_client=True) as client:
    pages = [artifact.data for artifact in client.read_artifacts() if artifact.key and artifact.key.endswith("-concepts")]
print("@@" + json.dumps({"type": state.type.value, "message": state.message, "pages": pages}))
"""
FORM = {
    "out": OUT, "trained_on": f"{OUT}/somebody-s", "base": "data/miniature/pipeline", "at_once": 2, "steps": 2, "seeds": 1,
    "probe": {"samples": 4}, "concepts": [{"name": "chalk"}, {"name": "nowhere"}, {"name": "poster"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    args = ["out=" + f"{OUT}/recovered", "experiment=miniature", "steps=2", "probe.samples=4"]
    subprocess.run([sys.executable, "-m", "stages.recover", *args], cwd=ROOT, env=environment, check=True, capture_output=True)
    shutil.copytree(ROOT / OUT / "recovered" / "transformer", ROOT / OUT / "somebody-s" / "transformer")  # without a record, like a download
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(FORM)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    outcome = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
    assert outcome, done.stdout + done.stderr
    yield json.loads(outcome[-1])
    shutil.rmtree(ROOT / OUT, ignore_errors=True)


def test_one_that_fails_does_not_stop_the_others(ended):
    assert ended["type"] == "FAILED"
    assert ended["message"].startswith("1 of 3 concepts failed: nowhere.")
    for concept in ("chalk", "poster"):
        evaluation = record.read(str(ROOT / OUT / concept / "evaluate"))
        assert {gain["rival"] for gain in evaluation.metrics["gains"]} == {"base@1"}
    assert not (ROOT / OUT / "nowhere" / "evaluate").exists()


def test_one_page_tells_how_all_came_out(ended):
    assert len(ended["pages"]) == 1
    lines = ended["pages"][0].splitlines()
    assert len(lines) == 5
    assert "| chalk | done | " in lines[2]
    assert "| nowhere | **Failed** | " in lines[3]
    assert f"{OUT}/poster/evaluate/report.html" in lines[4]
