"""A run takes only its parameters from the server, validated by its form. API users can fill in forms; they cannot run code.

The runners of `make serve` start the flows they have loaded themselves, whatever code fields the deployment has on the server. These fields
are checked all the same, so that a change is reported.
"""

import os
from typing import Any, NoReturn

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.results import ResultStore

RUNNER = "DEV2PRO_RUNNER"  # set by the runners of `make serve` for their runs. Runs in work pools have their own pull steps (prefect.yaml)


class Refused(RuntimeError):
    """The server gave more than form values: code fields, job variables or a stored result."""


def expected_fields(flow: Flow) -> dict[str, Any]:
    """The code fields of a flow's deployment as `make serve` registers them; Prefect allows changing them through the API."""
    entrypoint = f"{flow.fn.__module__.replace('.', '/')}.py:{flow.fn.__name__}"
    empty = dict.fromkeys(("pull_steps", "job_variables", "storage_document_id", "infrastructure_document_id", "work_pool_name", "work_queue_name"))
    return {"entrypoint": entrypoint, "path": "."} | empty


def changed_fields(flow: Flow, deployment: DeploymentResponse) -> list[str]:
    """Names of the code fields that were changed on the server."""
    return [field for field, value in expected_fields(flow).items() if (getattr(deployment, field) or None) != value]


def check() -> None:
    """Raises Refused if the current run was started from a changed deployment, or with job variables."""
    context = FlowRunContext.get()
    if RUNNER not in os.environ or context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment(context.flow_run.deployment_id)
    _refuse(changed_fields(context.flow, deployment), deployment.name, context.flow_run)


def _refuse(fields: list[str], deployment: str, run: FlowRun) -> None:
    if fields:
        raise Refused(
            f"Nothing was done: on the server, {', '.join(fields)} of the deployment {deployment} is not as make serve has registered it. Somebody "
            "who can use the API has changed it; none of it was run. Start make serve again, which puts it right, and see docs/exposing.md."
        )
    if run.job_variables:
        raise Refused(
            f"Nothing was done: this run was given job variables ({', '.join(run.job_variables)}), and make serve has none. Leave them out."
        )


def _no_result(*_: object, **__: object) -> NoReturn:
    raise Refused("A result that the server points to is not read: it could be a pickle, which runs code. Results of dev2pro are artifacts in runs/.")


# For a run in a finished state Prefect reads the "result" from the location, and with the serializer, that the server names.
for _name in ("read", "aread"):
    setattr(ResultStore, _name, _no_result)
