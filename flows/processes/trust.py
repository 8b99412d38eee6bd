"""What a run takes from the server: its parameters, checked by its form, and nothing else. Whoever may use the API fills in forms, and gets no shell.

The runners of `make serve` start the flows that they have loaded themselves, whatever the server says about code. What it says is looked at
all the same, so that a change is not passed over in silence.
"""

import os
from typing import Any, NoReturn

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.results import ResultStore

RUNNER = "DEV2PRO_RUNNER"  # set by the runners of `make serve`, for their runs. Runs in work pools have pull steps of their own (prefect.yaml)


class Refused(RuntimeError):
    """The server asks for more than a form."""


def own(flow: Flow) -> dict[str, Any]:
    """What `make serve` tells the server about a flow's code, where Prefect lets it be changed through the API."""
    entrypoint = f"{flow.fn.__module__.replace('.', '/')}.py:{flow.fn.__name__}"
    nothing = dict.fromkeys(("pull_steps", "job_variables", "storage_document_id", "infrastructure_document_id", "work_pool_name", "work_queue_name"))
    return {"entrypoint": entrypoint, "path": "."} | nothing


def changed(flow: Flow, deployment: DeploymentResponse) -> list[str]:
    """Names of the fields that somebody has changed."""
    return [field for field, value in own(flow).items() if (getattr(deployment, field) or None) != value]


def check() -> None:
    """Raises Refused when the run in whose context this is called was started from a changed deployment, or with job variables."""
    context = FlowRunContext.get()
    if RUNNER not in os.environ or context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment(context.flow_run.deployment_id)
    _refuse(changed(context.flow, deployment), deployment.name, context.flow_run)


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


# A run that the server declares finished makes Prefect read its "result" from wherever the server says, with whatever serializer it says.
for _name in ("read", "aread"):
    setattr(ResultStore, _name, _no_result)
