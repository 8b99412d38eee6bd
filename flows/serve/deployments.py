"""What an operator can trigger in the UI, and what of it an operator has changed: that stays, however often this is registered."""

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
from flows.single import distill, evaluate, lora, recover

TRAINING = "training"  # the runner of what needs GPUs; a run waits there for its turn
CHEAP = "cheap"  # the runner of what does not, which never waits behind training
TIME_ZONE = "DEV2PRO_TIME_ZONE"  # of the schedule, such as Europe/Berlin
AT_ONCE = 10  # runs of the cheap runner


@dataclass(frozen=True)
class Deployment:
    """A flow that can be triggered, its name in the UI, and the schedules that it comes with."""

    flow: Flow
    name: str
    schedules: tuple[Schedule, ...] = ()

    def known(self, client: SyncPrefectClient) -> DeploymentResponse | None:
        """What the server has of it."""
        try:
            return client.read_deployment_by_name(f"{self.flow.name}/{self.name}")
        except ObjectNotFound:
            return None


def of(runner: str) -> list[Deployment]:
    """The deployments of a runner."""
    if runner == TRAINING:
        flows = {"pipeline": pipeline, "recover": recover, "lora": lora, "evaluate": evaluate, "distill": distill, "concepts": concepts}
        return [Deployment(flow, name) for name, flow in flows.items()]
    zone = os.environ.get(TIME_ZONE, "UTC")
    nightly = Cron("0 2 * * *", timezone=zone, slug="nightly", active=False)  # an operator switches it on when there are shards to come
    return [Deployment(recurring, "recurring", (nightly,))]


def names() -> list[str]:
    """What they are called, all of them."""
    return [one.name for runner in (TRAINING, CHEAP) for one in of(runner)]


def restore_code_fields(client: SyncPrefectClient) -> list[str]:
    """Takes out what others have told the server about the code of our deployments. Returns a sentence for each that was changed."""
    told = []
    for one in (*of(TRAINING), *of(CHEAP)):
        there = one.known(client)
        if there and (fields := trust.changed(one.flow, there)):
            client.update_deployment(there.id, DeploymentUpdate(**trust.own(one.flow) | {"job_variables": {}}))
            told.append(
                f"somebody has changed {', '.join(fields)} of the deployment {one.name} through the API; it is put right, and nothing was run"
            )
    return told


def run(runner: str) -> None:
    """Registers the deployments of a runner and starts their runs, until the process ends.

    Runs are started from the flows loaded here, not from what the server says about them (Runner.add_flow).
    """
    os.environ[trust.RUNNER] = runner
    starts = Runner(name=runner, limit=len(gpu_slots.names()) if runner == TRAINING else AT_ONCE, pause_on_shutdown=False)
    for one in of(runner):
        starts.add_flow(one.flow, name=one.name, tags=["gpu"], **_as_left(one))
    asyncio.run(starts.start())


def _as_left(deployment: Deployment) -> dict[str, Any]:
    """The schedules, parameters and switch that it has in the UI. Registering it would else switch schedules on that somebody switched off."""
    with get_client(sync_client=True) as client:
        there = deployment.known(client)
    if there is None:
        return {"schedules": list(deployment.schedules)}
    return {"paused": there.paused, "parameters": there.parameters, "schedules": [_kept(one) for one in there.schedules]}


def _kept(schedule: Any) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=schedule.schedule, active=schedule.active, parameters=schedule.parameters, slug=schedule.slug)
