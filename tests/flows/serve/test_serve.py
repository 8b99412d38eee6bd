"""`make serve`, with real processes that are cancelled and killed: training is saved or resumed, and the states in the UI are right."""

import shutil
import socket
import time

import psutil
import pytest

from dev2pro.artifacts import record
from dev2pro.artifacts.record import ROOT
from flows.generations import aliases
from flows.serve.__main__ import is_run
from tests.flows.operator import OUT, checkpoints, engine, serving, stages, steps, until

pytestmark = pytest.mark.operator
LINE = "test-serve"


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("prefect")) as serve:
        yield serve


def goes_on(serve, run: str, out: str) -> None:
    """The run trains on from where it was saved."""
    saved = checkpoints(out)[-1]
    until(lambda: steps(out) > saved + 3, what="going on")
    until(lambda: f"going on after step {saved}" in serve.run_log(run), what="the log")
    serve.cancel(run)
    serve.until_state(run, "Cancelled")


@pytest.mark.ci
def test_a_cancelled_run_has_saved_and_running_it_again_goes_on(serve):
    run = serve.recover("cancelled")
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    assert not stages("cancelled")
    assert checkpoints("cancelled")
    assert "asked to stop (SIGTERM)" in serve.run_log(run)
    again = serve.again(run)
    goes_on(serve, again, "cancelled")


def test_every_process_of_a_cancelled_run_ends_and_it_goes_on(serve):
    run = serve.recover("ranks", processes=2)
    assert len(stages("ranks")) >= 3  # torchrun and its ranks
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    until(lambda: not stages("ranks"), what="the end of the ranks")
    assert checkpoints("ranks")
    again = serve.again(run)
    goes_on(serve, again, "ranks")


def test_a_save_that_outlasts_prefect_s_patience_is_left_in_peace(serve):
    run = serve.recover("slow")
    stage = stages("slow")[0]
    flow = engine("slow")
    stage.suspend()  # a disk that takes its time
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    until(lambda: not flow.is_running(), what="the end of the flow's process")
    second = serve.again(run)
    until(lambda: "Another process works in" in serve.run_log(second), what="keeping the second one out")
    assert not checkpoints("slow")
    stage.resume()
    until(lambda: not stage.is_running() or stage.status() == "zombie", what="the end of the stage")
    assert checkpoints("slow")
    goes_on(serve, second, "slow")


@pytest.mark.ci
def test_a_killed_flow_has_crashed_and_its_stage_has_saved(serve):
    run = serve.recover("crashed")
    engine("crashed").kill()
    state = serve.until_state(run, "Crashed")
    assert state["message"]
    until(lambda: not stages("crashed"), what="the end of the stage")
    assert checkpoints("crashed")
    serve.set_state(run, "SCHEDULED", "AwaitingRetry")  # what the button Retry does
    goes_on(serve, run, "crashed")


@pytest.mark.ci
def test_a_killed_runner_is_started_again_and_the_state_is_true(serve):
    run = serve.recover("runner")
    serve.part("training").kill()
    until(lambda: "training ended with -9 and is started again" in serve.log_file.read_text(), what="noticing")
    until(lambda: serve.state(run)["name"] == "Crashed" or steps("runner") > 1000, what="an end, or going on")
    if serve.state(run)["name"] != "Crashed":  # it goes on without its runner, and can be cancelled all the same
        serve.cancel(run)
        serve.until_state(run, "Cancelled")
    until(lambda: not stages("runner"), what="the end of the stage")
    assert checkpoints("runner")
    again = serve.again(run)
    goes_on(serve, again, "runner")


def test_a_server_that_is_gone_for_a_moment_is_not_missed(serve):
    run = serve.recover("moment", steps=steps("moment") + 600)
    serve.part("server").kill()
    before = steps("moment")
    until(lambda: serve._state(run) is not None, what="the server's return")
    until(lambda: steps("moment") > before + 20, what="training on")
    assert serve.until_state(run, "Completed")
    assert any("step 600 of 600" in (one["description"] or "") for one in serve.artifacts(run))


@pytest.mark.ci
def test_stopping_it_saves_and_starting_it_goes_on(serve):
    run = serve.recover("stopped")
    waiting = serve.run("recover", recover={"out": f"{OUT}/stopped", "steps": 1})
    assert serve.stop() == 0
    until(lambda: not stages("stopped"), what="the end of the stage")
    assert checkpoints("stopped")
    assert "runs that save and go on at the next start: 1" in serve.log_file.read_text()
    serve.start()
    serve.cancel(waiting)
    goes_on(serve, run, "stopped")


def test_a_run_that_is_being_cancelled_when_it_stops_is_cancelled(serve):
    run = serve.recover("both")
    stage = stages("both")[0]
    stage.suspend()
    serve.cancel(run)
    time.sleep(1)
    assert serve.stop() == 0
    stage.resume()
    until(lambda: not stages("both"), what="the end of the stage")
    serve.start()
    assert serve.state(run)["name"] == "Cancelled"
    assert checkpoints("both")


@pytest.mark.ci
def test_what_an_operator_has_changed_stays(serve):
    deployment, nightly = serve.deployments()["recurring"], serve.deployments()["recurring"]["schedules"][0]
    assert not nightly["active"]  # until somebody switches it on
    mine = {"recurring": {"line": "mine", "least": 7}}
    serve.api.patch(f"deployments/{deployment['id']}", json={"parameters": mine}).raise_for_status()
    serve.api.patch(f"deployments/{deployment['id']}/schedules/{nightly['id']}", json={"active": True}).raise_for_status()
    serve.api.patch(f"deployments/{serve.deployments()['lora']['id']}", json={"paused": True}).raise_for_status()
    assert serve.stop() == 0
    serve.start()
    after = serve.deployments()
    assert (after["recurring"]["id"], after["recurring"]["parameters"]) == (deployment["id"], mine)
    assert [(one["active"], one["schedule"]["cron"], one["slug"]) for one in after["recurring"]["schedules"]] == [(True, "0 2 * * *", "nightly")]
    assert after["lora"]["paused"]
    assert not after["recover"]["paused"]


def test_the_recurring_recovery_promotes_a_model_that_loras_begin_on_and_then_waits(serve):
    line = aliases.line_folder(LINE)
    shutil.rmtree(line, ignore_errors=True)
    form = {"line": LINE, "index": "beside", "epochs": 1, "batch": 64, "probe": {"samples": 4}}
    first = serve.until_state(serve.run("recurring", recurring=form), "Completed")
    assert first["message"].startswith("Generation 1 was promoted")
    lora = {"out": f"{OUT}/lora", "trained_on": f"{LINE}:latest", "steps": 2, "data": {"name": "chalk"}, "probe": {"samples": 4}}
    serve.until_state(serve.run("lora", lora=lora), "Completed")
    assert record.read(str(ROOT / OUT / "lora")).inference["trained_on"]["id"] == record.read_json(line / "latest.json")["id"]
    again = serve.until_state(serve.run("recurring", recurring=form), "Completed", "Skipped")
    assert (again["type"], again["name"]) == ("COMPLETED", "Skipped")
    shutil.rmtree(line)


@pytest.mark.ci
def test_two_runs_never_work_in_one_folder(serve):
    first = serve.recover("twice")
    second = serve.again(first)
    serve.until_state(second, "Running")
    until(lambda: "Another process works in" in serve.run_log(second), what="refusing")
    until(lambda: len(stages("twice")) == 1, what="the end of the one that was refused")
    before = steps("twice")
    until(lambda: steps("twice") > before + 3, what="training on")
    assert serve.state(second)["type"] == "RUNNING"  # its stage is tried again later
    for run in (second, first):
        serve.cancel(run)
    serve.until_state(first, "Cancelled")


@pytest.mark.ci
def test_a_second_one_on_the_same_address_says_so(serve):
    other = type(serve)(serve.home)
    other.port, other.address = serve.port, serve.address
    with pytest.raises(AssertionError, match="is in use, perhaps by another `make serve`"):
        other.start()


def test_only_the_runs_go_on_when_it_is_killed(serve):
    run = serve.recover("killed")
    flow = engine("killed")
    run_processes = [flow, *flow.children(recursive=True)]
    family = [
        one for one in psutil.Process(serve.process.pid).children(recursive=True) if one not in run_processes and is_run(one)
    ]  # its helper stays with it
    assert len(family) >= 3  # the server and the runners
    serve.process.kill()
    serve.process.wait()
    until(lambda: not any(one.is_running() for one in family), what="the end of the server and the runners")
    before = steps("killed")
    until(lambda: steps("killed") > before + 3, what="training on")
    serve.start()
    assert serve.state(run)["type"] == "RUNNING"
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    until(lambda: not stages("killed"), what="the end of the stage")
    assert checkpoints("killed")


def test_a_server_that_is_gone_for_five_minutes_is_not_missed(serve):
    run = serve.recover("outage", steps=100000)
    server = serve.part("server")
    with socket.socket() as taken:
        server.kill()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        until(lambda: not _bound(taken, serve.port), what="taking its place")
        before, began = steps("outage"), time.monotonic()
        while time.monotonic() - began < 300:
            time.sleep(5)
            assert stages("outage")
        assert steps("outage") > before + 100
    until(lambda: serve._state(run) is not None, what="the server's return")
    assert serve.state(run)["type"] == "RUNNING"
    time.sleep(20)
    assert serve.state(run)["type"] == "RUNNING"
    serve.cancel(run)
    serve.until_state(run, "Cancelled")
    assert checkpoints("outage")


def _bound(one: socket.socket, port: int) -> bool:
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        return True
    return False
