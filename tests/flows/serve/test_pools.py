"""prefect.yaml and the templates of its work pools: they deploy, a worker runs them, and a user who starts a run cannot influence its process."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest
import yaml

from dev2pro.artifacts.record import ROOT
from tests.flows.clone import RECOVER, cloned
from tests.flows.operator import until

POOLS = {"dev2pro": "process", "dev2pro-docker": "docker", "dev2pro-kubernetes": "kubernetes"}
HOSTILE = {
    "command": "touch pwned", "env": {"PYTHONPATH": "pwned"}, "env.LD_PRELOAD": "pwned", "working_dir": "/pwned", "image": "pwned",
    "privileged": True, "volumes": ["/:/pwned"], "container_create_kwargs": {"entrypoint": "pwned"}, "job_manifest": {"pwned": 1},
    "namespace": "pwned", "name": "pwned", "labels": {"pwned": "yes"}, "cluster_config": {"config": {"pwned": 1}, "context_name": "pwned"},
    "network_mode": "pwned", "networks": ["pwned"],
}  # fmt: skip


@pytest.mark.parametrize("kind", POOLS.values())
def test_a_template_leaves_nothing_to_whoever_starts_a_run(kind):
    from prefect.workers.base import BaseJobConfiguration

    class Everything(BaseJobConfiguration, extra="allow"):
        """Any worker's."""

    template = json.loads((ROOT / f"flows/serve/pools/{kind}.json").read_text())
    assert template["variables"] == {"type": "object", "properties": {}, "additionalProperties": False}  # the server refuses all others
    configuration = asyncio.run(
        Everything.from_template_and_values(template, HOSTILE, client=object())
    )  # what a worker makes of those it is given all the same
    assert "pwned" not in configuration.model_dump_json()
    assert (configuration.command, configuration.env) == (None, {})


def test_every_flow_has_a_deployment_in_every_pool():
    from flows.processes import trust
    from flows.serve import deployments

    flows = {
        trust.expected_fields(one.flow)["entrypoint"]
        for runner in (deployments.TRAINING, deployments.CHEAP)
        for one in deployments.for_runner(runner)
    }
    wanted = {(kind, pool, flow) for pool, kind in POOLS.items() for flow in flows}
    listed = {
        (one["name"], one["work_pool"]["name"], one["entrypoint"]) for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert listed == wanted


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with cloned(tmp_path_factory.mktemp("pools")) as clone:
        for pool, kind in POOLS.items():
            prefect(clone, "work-pool", "create", pool, "--type", kind, "--base-job-template", f"flows/serve/pools/{kind}.json")
        yield clone


def prefect(clone, *args: str) -> None:
    """One of its commands, given in the project's folder."""
    result = subprocess.run(command(*args), cwd=clone.folder, env=shell(clone), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *args]


def shell(clone) -> dict[str, str]:
    return clone.environment() | {"PWD": str(clone.folder)}  # as a shell has it


@pytest.fixture(scope="module")
def deployed(serve):
    prefect(serve, "--no-prompt", "deploy", "--all")
    return {(one["name"], one["entrypoint"].split(":")[1]): one["id"] for one in serve.post("deployments/filter")}


@pytest.fixture(scope="module")
def worker(serve, deployed):
    with (serve.folder / "worker.log").open("wb") as log:
        child = subprocess.Popen(
            command("worker", "start", "--pool", "dev2pro"), cwd=serve.folder, env=shell(serve), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    yield child
    child.send_signal(signal.SIGINT)
    child.wait(60)


def ends(serve, run: str) -> str:
    serve.until_state(run, "Completed", "Failed", "Crashed", seconds=500)
    assert serve.state(run)["name"] == "Completed", serve.run_log(run)
    return serve.run_log(run)


@pytest.mark.operator
def test_all_are_deployed(serve, deployed):
    from flows.serve import deployments

    assert {(kind, name) for kind in POOLS.values() for name in deployments.names()} <= set(deployed)
    before = {one["name"] for one in serve.post("deployments/filter")}
    assert {"pipeline", "recover", "process", "docker", "kubernetes"} <= before  # and make serve's own are still there


@pytest.mark.operator
@pytest.mark.parametrize("variables", [{name: value} for name, value in HOSTILE.items()], ids=list(HOSTILE))
def test_job_variables_are_refused(serve, deployed, variables):
    for kind in POOLS.values():
        body = {"parameters": {"recover": {}}, "state": {"type": "SCHEDULED"}, "job_variables": variables}
        answer = serve.api.post(f"deployments/{deployed[kind, 'recover']}/create_flow_run", json=body)
        assert answer.status_code == 422, answer.text


@pytest.mark.operator
@pytest.mark.ci
def test_a_worker_runs_it_and_smuggled_job_variables_do_nothing(serve, deployed, worker):
    recover = serve.api.get(f"deployments/{deployed['process', 'recover']}").json()
    hostile = {
        "command": f"touch {serve.folder}/pwned",
        "env": {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONPATH": "/pwned"},
        "working_dir": "/pwned",
    }
    form = {"recover": {**RECOVER, "out": "runs/pool"}}
    deployment = {"flow_id": recover["flow_id"], "deployment_id": recover["id"], "work_pool_name": "dev2pro"}
    response = serve.api.post("flow_runs/", json={**deployment, "parameters": form, "job_variables": hostile, "state": {"type": "SCHEDULED"}})
    assert response.status_code == 201
    assert response.json()["job_variables"] == hostile
    run = response.json()["id"]
    ends(serve, run)
    until(lambda: "recover: done" in serve.run_log(run), what="the log")
    assert not list(serve.folder.rglob("pwned"))


@pytest.mark.operator
def test_a_worker_s_run_that_is_cancelled_has_saved(serve, deployed, worker):
    form = {**RECOVER, "steps": 100_000, "checkpoint": {"every": 100_000}, "probe": {"every": 100_000, "samples": 2}, "out": "runs/cancelled"}
    body = {"parameters": {"recover": form}, "state": {"type": "SCHEDULED"}}
    run = serve.post(f"deployments/{deployed['process', 'recover']}/create_flow_run", **body)["id"]
    rows = serve.folder / "runs/cancelled/metrics.jsonl"
    until(lambda: rows.exists() and rows.read_text().count("lr") > 3, what="training")
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    until(lambda: list(rows.parent.glob("checkpoint-*[0-9]")), what="a checkpoint")


@pytest.mark.operator
def test_make_serve_s_own_runs_refuse_job_variables(serve):
    run = serve.run("recover", recover={**RECOVER, "out": "runs/serve"})
    serve.api.patch(f"flow_runs/{run}", json={"job_variables": {"command": f"touch {serve.folder}/pwned"}})
    assert "Nothing was done: this run was given job variables (command)" in serve.until_state(run, "Failed")["message"]
    assert not list(serve.folder.rglob("pwned"))
