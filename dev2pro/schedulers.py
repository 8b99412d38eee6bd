"""How long whatever started this process waits between its stop signal and SIGKILL, as far as that can be known from inside. Imports no torch."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from dev2pro import signals

TOLD = "TERMINATION_GRACE_SECONDS"  # set by a job script or a pod that knows
KUBERNETES = 30.0  # terminationGracePeriodSeconds of a pod that names none
LAUNCHER = 600.0  # dev2pro.ranks, where checkpoint.grace is no number
TORCHRUN = 30.0  # torchrun itself


@dataclass(frozen=True, slots=True)
class Limit:
    """`who` kills what has not ended `seconds` after the stop signal; `cure` gives it more time."""

    who: str
    seconds: float
    cure: str


def limits(grace: float | None) -> list[Limit]:
    """What is known, beside `checkpoint.grace` if that is a number. A scheduler that says nothing has no entry."""
    own = _launcher() if grace is None else Limit(f"checkpoint.grace={grace:g}", grace, "Set checkpoint.grace=null, which follows what is measured")
    return [limit for limit in (own, _scheduler()) if limit]


def _scheduler() -> Limit | None:
    told = os.environ.get(TOLD, "")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", told):
        return Limit(TOLD, float(told), f"Let the scheduler wait longer, and set {TOLD} to what it waits")
    if "SLURM_JOB_ID" in os.environ and (wait := _kill_wait()) is not None:
        return Limit("Slurm's KillWait", wait, f"Submit with --signal=TERM@SECONDS, which asks so long before the time limit, and set {TOLD}=SECONDS")
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return Limit("Kubernetes by default", KUBERNETES, f"Set the pod's terminationGracePeriodSeconds, and its variable {TOLD} to the same number")
    return None


def _kill_wait() -> float | None:
    """Seconds, as Slurm's own command tells them; None where it does not."""
    if not (scontrol := shutil.which("scontrol")):
        return None
    try:
        told = subprocess.run([scontrol, "show", "config"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^KillWait\s*=\s*([0-9]+)", told, re.MULTILINE)
    return float(found[1]) if found else None


def _launcher() -> Limit | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if signals.PARENT in os.environ:
        return Limit("dev2pro.ranks", LAUNCHER, "Give checkpoint.grace= as a number of seconds")
    return Limit("torchrun", TORCHRUN, "Start with `python -m dev2pro.ranks` in place of torchrun")
