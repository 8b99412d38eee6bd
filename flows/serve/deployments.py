"""The deployments an operator can trigger in the UI. Registering them again keeps what an operator has changed."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule

from flows.concepts import concepts
from flows.pipeline import pipeline
from flows.processes import gpu_slots, trust
from flows.recurring import recurring
from flows.single import diagnose, distill, evaluate, lora, recover, tune

TRAINING = "training"  # the runner of flows that need GPUs; its runs queue
CHEAP = "cheap"  # the runner of other flows, which never wait behind training
TIME_ZONE = "DEV2PRO_TIME_ZONE"  # of the schedule, such as Europe/Berlin
AT_ONCE = 10  # runs of the cheap runner


@dataclass(frozen=True)
class Deployment:
    """A flow that can be triggered, its name in the UI, and its initial schedules."""

    flow: Flow
    name: str
    schedules: tuple[Schedule, ...] = ()

    def read_registered(self, client: SyncPrefectClient) -> DeploymentResponse | None:
        """The deployment on the server; None if it is not registered."""
        try:
            return client.read_deployment_by_name(f"{self.flow.name}/{self.name}")
        except ObjectNotFound:
            return None


def for_runner(runner: str) -> list[Deployment]:
    """The deployments of a runner."""
    if runner == TRAINING:
        flows = (pipeline, recover, lora, tune, evaluate, diagnose, distill, concepts)
        return [Deployment(flow, flow.fn.__name__) for flow in flows]
    zone = os.environ.get(TIME_ZONE, "UTC")
    nightly = Cron("0 2 * * *", timezone=zone, slug="nightly", active=False)  # an operator activates it
    return [Deployment(recurring, "recurring", (nightly,))]


def names() -> list[str]:
    """Names of all deployments."""
    return [deployment.name for runner in (TRAINING, CHEAP) for deployment in for_runner(runner)]


def restore_code_fields(client: SyncPrefectClient) -> list[str]:
    """Restores the code fields of our deployments that were changed through the API. Returns one message per changed deployment."""
    messages = []
    for deployment in (*for_runner(TRAINING), *for_runner(CHEAP)):
        registered = deployment.read_registered(client)
        if registered and (fields := trust.changed_fields(deployment.flow, registered)):
            client.update_deployment(registered.id, DeploymentUpdate(**trust.expected_fields(deployment.flow) | {"job_variables": {}}))
            messages.append(
                f"somebody has changed {', '.join(fields)} of the deployment {deployment.name} through the API; it is put right, and nothing was run"
            )
    return messages


def run(runner: str) -> None:
    """Registers the deployments of a runner and starts their runs, until the process ends.

    Runs use the flows loaded here, not the code fields on the server (Runner.add_flow).
    """
    os.environ[trust.RUNNER] = runner
    prefect_runner = Runner(name=runner, limit=len(gpu_slots.names()) if runner == TRAINING else AT_ONCE, pause_on_shutdown=False)
    for deployment in for_runner(runner):
        prefect_runner.add_flow(deployment.flow, name=deployment.name, tags=["gpu"], **_current_settings(deployment))
    asyncio.run(prefect_runner.start())


def _current_settings(deployment: Deployment) -> dict[str, Any]:
    """Its schedules, parameters and pause switch on the server. Without them, registering it would reactivate disabled schedules."""
    with get_client(sync_client=True) as client:
        registered = deployment.read_registered(client)
    if registered is None:
        return {"schedules": list(deployment.schedules)}
    return {
        "paused": registered.paused,
        "parameters": registered.parameters,
        "schedules": [_schedule_create(schedule) for schedule in registered.schedules],
    }


def _schedule_create(schedule: Any) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=schedule.schedule, active=schedule.active, parameters=schedule.parameters, slug=schedule.slug)
