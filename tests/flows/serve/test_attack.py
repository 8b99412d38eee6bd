"""A user of the whole API, with the password, cannot run code: runs of changed deployments refuse, and nothing of the change is run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.clone import cloned
from tests.flows.operator import until

pytestmark = pytest.mark.operator
FORM = {"out": "runs/refused"}
LONG = {"steps": 4000, "batch": 8, "data": {"name": "chalk"}, "probe": {"every": 1000, "samples": 4}}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """With its own password, made at its first start."""
    with cloned(tmp_path_factory.mktemp("attacked"), closed=False) as clone:
        yield clone


@pytest.fixture
def pwned(tmp_path) -> Path:
    return tmp_path / "pwned"


def shell(pwned: Path) -> list[dict]:
    return [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {pwned}"}}]


def refused(serve, run: str, field: str) -> None:
    assert field in serve.until_state(run, "Failed")["message"]
    until(lambda: "Nothing was done" in serve.run_log(run), what="the log")


@pytest.mark.ci
def test_nobody_comes_in_without_the_password_that_was_made(serve):
    import httpx

    assert httpx.post(f"{serve.address}/api/deployments/filter", json={}).status_code == 403  # CSRF
    assert httpx.post(f"{serve.address}/api/deployments/filter", json={}, headers=dict(serve.api.headers)).status_code == 401
    assert httpx.get(f"{serve.address}/api/admin/settings").status_code == 401
    assert serve.user.split(":")[1] not in serve.log_file.read_text() + "".join(f.read_text() for f in (serve.folder / "runs/.serve").glob("*.log"))


@pytest.mark.ci
def test_the_attack_of_62143d3_step_by_step(serve, pwned):
    """Replacing the deployment `evaluate` by one with a shell script among its pull steps, and starting it."""
    registered = serve.deployments()["evaluate"]
    theirs = {"name": "evaluate", "flow_id": registered["flow_id"], "entrypoint": registered["entrypoint"], "path": ".", "pull_steps": shell(pwned)}
    assert serve.api.post("deployments/", json=theirs).raise_for_status().json()["id"] == registered["id"]
    refused(serve, serve.run("evaluate", evaluate=FORM), "pull_steps")
    assert not pwned.exists()


def test_changes_of_a_deployment_are_refused(serve, pwned, tmp_path):
    deployment_id = serve.deployments()["distill"]["id"]
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(pwned)!r}, 'w')\nfrom prefect import flow\n@flow\ndef distill(distill=None): pass\n")
    for change in (
        {"pull_steps": shell(pwned)},
        {"entrypoint": f"{evil}:distill"},
        {"path": str(tmp_path)},
        {"job_variables": {"env": {"PYTHONSTARTUP": str(evil)}}},
    ):
        serve.api.patch(
            f"deployments/{deployment_id}",
            json={"pull_steps": [], "entrypoint": "flows/single.py:distill", "path": ".", "job_variables": {}, **change},
        ).raise_for_status()
        refused(serve, serve.run("distill", distill=FORM), next(iter(change)))
    assert not pwned.exists()


def test_job_variables_of_a_run_are_refused(serve, pwned):
    deployment = serve.deployments()["lora"]["id"]
    more = {"job_variables": {"command": f"touch {pwned}", "env": {"PATH": "/tmp"}}, "parameters": {"lora": FORM}, "state": {"type": "SCHEDULED"}}
    refused(serve, serve.post(f"deployments/{deployment}/create_flow_run", **more)["id"], "command")
    assert not pwned.exists()


def test_a_change_while_it_runs_is_not_run_when_it_is_cancelled(serve, pwned):
    """The runner looks for hooks of a cancelled flow: at 62143d3 it loaded them from the server, pull steps and all, in its own process."""
    out = serve.folder / "runs/attacked/metrics.jsonl"
    run = serve.run("recover", recover={**LONG, "out": "runs/attacked"})
    until(lambda: out.exists() and out.read_text().count('"lr"') > 3, what="training")
    serve.api.patch(f"deployments/{serve.deployments()['recover']['id']}", json={"pull_steps": shell(pwned)}).raise_for_status()
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    assert not pwned.exists()


@pytest.mark.ci
def test_the_next_start_puts_it_right_and_says_so(serve, pwned):
    changed = ("evaluate", "distill", "recover")
    for name in changed:
        serve.api.patch(f"deployments/{serve.deployments()[name]['id']}", json={"pull_steps": shell(pwned)}).raise_for_status()
    assert serve.stop() == 0
    serve.start()
    log = serve.log_file.read_text()
    for name in changed:
        assert f"of the deployment {name} through the API; it is put right" in log
    until(lambda: all(not serve.deployments()[name]["pull_steps"] for name in changed), what="putting it right")
    run = serve.run("recover", recover={"steps": 3, "batch": 4, "data": {"name": "chalk"}, "probe": {"every": 3, "samples": 2}, "out": "runs/right"})
    serve.until_state(run, "Completed", "Failed", seconds=400)
    assert serve.state(run)["name"] == "Completed", serve.run_log(run)
    assert not pwned.exists()


def test_prefect_on_the_command_line_with_the_password_that_was_made(serve):
    given = {"PREFECT_API_URL": f"{serve.address}/api", "PREFECT_API_AUTH_STRING": serve.user, "PREFECT_HOME": str(serve.home)}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "deployment",
        "run",
        "recover (dev2pro)/recover",
        "--param",
        'recover={"out": "runs/right", "steps": 0}',
    ]
    result = subprocess.run(command, cwd=serve.home, env=serve.environment() | given, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 1
    assert "less than the minimum" in result.stdout + result.stderr  # it came in: the form refuses
