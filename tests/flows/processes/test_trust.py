"""A run takes only form values from the server: changed code fields are detected, and no result that the server points to is read."""

import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest

from dev2pro.artifacts.record import ROOT
from flows.processes import trust
from flows.serve import deployments
from flows.single import evaluate

CHANGES = {
    "pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}],
    "entrypoint": "runs/evil.py:evaluate",
    "path": "/tmp",
    "job_variables": {"command": "id"},
    "storage_document_id": uuid4(),
    "infrastructure_document_id": uuid4(),
    "work_pool_name": "theirs",
    "work_queue_name": "theirs",
}

PICKLED = """
import pickle, subprocess, sys
from prefect.client.schemas.objects import State, StateType
if sys.argv[2] == "ours":
    import flows.processes.trust
class Evil:
    def __reduce__(self):
        return subprocess.check_call, (["touch", sys.argv[1] + ".pwned"],)
from prefect.results import ResultStore
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.serializers import PickleSerializer
metadata = ResultRecordMetadata(storage_key=sys.argv[1], serializer=PickleSerializer())
blob = ResultRecord(result=Evil(), metadata=metadata).serialize()
open(sys.argv[1], "wb").write(blob)
for kind in (StateType.COMPLETED, StateType.FAILED):
    try:
        State(type=kind, data=metadata).result(raise_on_failure=False, _sync=True)
    except Exception as error:
        print(type(error).__name__)
"""


def registered(**changes: object) -> SimpleNamespace:
    """The deployment `evaluate` as Prefect returns it, unchanged but for these fields."""
    return SimpleNamespace(**trust.expected_fields(evaluate) | {"pull_steps": [], "job_variables": {}} | changes)


def test_what_make_serve_registers_is_no_change():
    assert not trust.changed_fields(evaluate, registered())
    assert trust.expected_fields(evaluate)["entrypoint"] == "flows/single.py:evaluate"


def test_every_entrypoint_is_a_file_and_a_flow_of_ours():
    for runner in (deployments.TRAINING, deployments.CHEAP):
        for deployment in deployments.for_runner(runner):
            file, name = trust.expected_fields(deployment.flow)["entrypoint"].split(":")
            assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_is_noticed(field):
    assert set(CHANGES) == set(trust.expected_fields(evaluate))
    assert trust.changed_fields(evaluate, registered(**{field: CHANGES[field]})) == [field]


@pytest.mark.parametrize(("who", "runs"), [("prefect", True), ("ours", False)])
def test_a_result_that_the_server_points_to_is_not_read(tmp_path, who, runs):
    """Prefect itself runs the pickle, which shows that the attack works."""
    result = subprocess.run(
        [sys.executable, "-c", PICKLED, tmp_path / "result", who], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert (tmp_path / "result.pwned").exists() == runs, result.stdout + result.stderr
    if not runs:
        assert result.stdout.split() == ["Refused", "Refused"]
