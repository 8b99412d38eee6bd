"""Reconciles flow-run states with processes: reschedules interrupted runs, and marks dead ones as crashed."""

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
LINGER = 20.0  # seconds Prefect's own runner has to update the state first


class Reconciler:
    """Compares states with processes; `reconcile` is called periodically. Tracks since when each state has been inconsistent."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client, self._since, self._terminated, self._cancelled = client, dict[UUID, float](), set[UUID](), set[UUID]()

    def reconcile(self) -> None:
        """For every run started on this machine: corrects the state of a dead one, and terminates a living one that is being cancelled."""
        for run in [run for terminated in self._terminated if (run := self._run(terminated)) and run.state and run.state.is_final()]:
            self._terminated.discard(run.id)
            if run.state and run.state.is_crashed():  # set by its process, which only got a signal
                self.client.set_flow_run_state(run.id, Cancelled(message="It has saved and ended."), force=True)
        self._cancelled.clear()  # a cancelled run may have been retried
        for process in liveness.started_runs():
            run = self._run(process.run_id)
            if run and run.state and run.state.is_cancelling():
                self._cancelled.add(run.id)
            if run is None or run.state is None or run.state.is_final():
                self._forget(process)
            elif process.pid and run.state.type != StateType.CANCELLING:
                self._since.pop(process.run_id, None)
            elif time.monotonic() - self._since.setdefault(process.run_id, time.monotonic()) > LINGER:
                if process.pid:
                    self._terminate(process)
                else:
                    self._set_state(run, Crashed(message="Its process was killed. Retry goes on from the last checkpoint."))
                    self._forget(process)

    def resume(self, deployments: Iterable[str], ended: Iterable[UUID] = ()) -> list[str]:
        """Reschedules every interrupted run of these deployments. Call it when none of ours runs. Returns their names.

        `ended`: runs that were terminated, and so are in a crashed state.
        """
        chosen = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(OPEN))))
        runs = self.client.read_flow_runs(
            flow_run_filter=chosen, deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=list(deployments)))
        )
        living = {process.run_id for process in liveness.started_runs() if process.pid}
        gone = [run for run in runs if run.id not in living]
        gone += [run for run_id in ended if (run := self._run(run_id)) and run.state and run.state.is_crashed()]
        for run in gone:
            self._set_state(run, Scheduled(name="Resuming", message="dev2pro was stopped while this ran; it goes on from its last checkpoint."))
            liveness.remove(run.id)
        return [run.name for run in gone if not self._is_cancelled(run)]

    def _set_state(self, run: FlowRun, state: State) -> None:
        if self._is_cancelled(run):
            state = Cancelled(message="Its process is gone.")
        self.client.set_flow_run_state(run.id, state, force=True)

    def _is_cancelled(self, run: FlowRun) -> bool:
        return run.id in self._cancelled or bool(run.state and run.state.is_cancelling())

    def _terminate(self, process: liveness.RunProcess) -> None:
        """Sends SIGTERM, for a runner that has ended, or has restarted and does not know the run."""
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGTERM)
        self._terminated.add(process.run_id)
        self._since[process.run_id] = time.monotonic() + 60

    def _forget(self, process: liveness.RunProcess) -> None:
        self._since.pop(process.run_id, None)
        if not process.pid:
            liveness.remove(process.run_id)

    def _run(self, run_id: UUID) -> FlowRun | None:
        try:
            return self.client.read_flow_run(run_id)
        except ObjectNotFound:
            return None
