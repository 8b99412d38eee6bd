"""Makes the UI tell the truth about flow runs whose process is gone: what was cut off goes on, what died has crashed."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Scheduled, State

from flows.processes import liveness

OPEN = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
LINGER = 20.0  # seconds for Prefect's own runner to notice first


class Reconciler:
    """Looks again and again; remembers since when something was odd."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client, self._since, self._told, self._cancelled = client, dict[UUID, float](), set[UUID](), set[UUID]()

    def reconcile(self) -> None:
        """At every run that began on this machine: the state of a dead one is put right; a living one that is to be cancelled is told so."""
        for run in [run for told in self._told if (run := self._run(told)) and run.state and run.state.is_final()]:
            self._told.discard(run.id)
            if run.state and run.state.is_crashed():  # as its process has it, which knows of a signal alone
                self.client.set_flow_run_state(run.id, Cancelled(message="It has saved and ended."), force=True)
        self._cancelled.clear()  # one that was cancelled may have been tried again
        for life in liveness.started_runs():
            run = self._run(life.run)
            if run and run.state and run.state.is_cancelling():
                self._cancelled.add(run.id)
            if run is None or run.state is None or run.state.is_final():
                self._settled(life)
            elif life.pid and run.state.type != StateType.CANCELLING:
                self._since.pop(life.run, None)
            elif time.monotonic() - self._since.setdefault(life.run, time.monotonic()) > LINGER:
                if life.pid:
                    self._tell(life)
                else:
                    self._put(run, Crashed(message="Its process was killed. Retry goes on from the last checkpoint."))
                    self._settled(life)

    def resume(self, deployments: Iterable[str], ended: Iterable[UUID] = ()) -> list[str]:
        """When nothing of ours runs: schedules again, for now, every run of these deployments that was cut off. Returns their names.

        `ended`: runs that were told to end, and so have crashed.
        """
        chosen = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(OPEN))))
        runs = self.client.read_flow_runs(
            flow_run_filter=chosen, deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=list(deployments)))
        )
        living = {life.run for life in liveness.started_runs() if life.pid}
        gone = [run for run in runs if run.id not in living]
        gone += [run for one in ended if (run := self._run(one)) and run.state and run.state.is_crashed()]
        for run in gone:
            self._put(run, Scheduled(name="Resuming", message="dev2pro was stopped while this ran; it goes on from its last checkpoint."))
            liveness.forget(run.id)
        return [run.name for run in gone if not self._is_cancelled(run)]

    def _put(self, run: FlowRun, state: State) -> None:
        if self._is_cancelled(run):
            state = Cancelled(message="Its process is gone.")
        self.client.set_flow_run_state(run.id, state, force=True)

    def _is_cancelled(self, run: FlowRun) -> bool:
        return run.id in self._cancelled or bool(run.state and run.state.is_cancelling())

    def _tell(self, life: liveness.RunProcess) -> None:
        """Its runner is not there any more, or was started anew and does not know it."""
        with suppress(ProcessLookupError, PermissionError):
            os.kill(life.pid, signal.SIGTERM)
        self._told.add(life.run)
        self._since[life.run] = time.monotonic() + 60

    def _settled(self, life: liveness.RunProcess) -> None:
        self._since.pop(life.run, None)
        if not life.pid:
            liveness.forget(life.run)

    def _run(self, run: UUID) -> FlowRun | None:
        try:
            return self.client.read_flow_run(run)
        except ObjectNotFound:
            return None
