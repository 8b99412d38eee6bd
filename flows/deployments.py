"""What an operator can trigger in the UI, and what of it an operator has changed: that stays, however often this is registered."""

import os
from collections.abc import Sequence
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron

from flows.concepts import concepts
from flows.pipeline import pipeline
from flows.recurring import recurring
from flows.single import distill, evaluate, lora, recover

TRAINING = "training"  # the runner of what needs GPUs; a run waits there for its turn
CHEAP = "cheap"  # the runner of what does not, which never waits behind training
TIME_ZONE = "DEV2PRO_TIME_ZONE"  # of the schedule, such as Europe/Berlin


def made(runner: str) -> list[RunnerDeployment]:
    """The deployments of a runner."""
    if runner == TRAINING:
        return [
            pipeline.to_deployment("pipeline", tags=["gpu"]),
            recover.to_deployment("recover", tags=["gpu"]),
            lora.to_deployment("lora", tags=["gpu"]),
            evaluate.to_deployment("evaluate", tags=["gpu"]),
            distill.to_deployment("distill", tags=["gpu"]),
            concepts.to_deployment("concepts", tags=["gpu"]),
        ]
    zone = os.environ.get(TIME_ZONE, "UTC")
    nightly = Cron("0 2 * * *", timezone=zone, slug="nightly", active=False)  # an operator switches it on when there are shards to come
    return [recurring.to_deployment("recurring", tags=["gpu"], schedules=[nightly])]


def names() -> list[str]:
    """What they are called, all of them."""
    return [one.name for runner in (TRAINING, CHEAP) for one in made(runner)]


def as_left(deployments: Sequence[RunnerDeployment]) -> list[RunnerDeployment]:
    """The deployments, those that are known with the schedules, the parameters and the switches that they have in the UI.

    Registering them would else put back what the code says: switch schedules on that somebody switched off, and forget what was filled in.
    """
    with get_client(sync_client=True) as client:
        for deployment in deployments:
            try:
                there = client.read_deployment_by_name(deployment.full_name)
            except ObjectNotFound:
                continue
            deployment.paused, deployment.parameters = there.paused, there.parameters
            deployment.schedules = [_kept(one) for one in there.schedules]
    return list(deployments)


def _kept(schedule: Any) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=schedule.schedule, active=schedule.active, parameters=schedule.parameters, slug=schedule.slug)
