"""The files of docs/clusters/: their commands are commands of this project, and their times, exit codes and sizes are those of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dev2pro import ranks

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/clusters"
FINAL = {2, 3, 4, 5}  # exit codes that would come again
STAND_INS = {  # what a machine without Slurm has in its place
    "srun": 'shift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & done\nhighest=0\n'
    'for job in $(jobs -p); do wait "$job"; code=$?; [ "$code" -gt "$highest" ] && highest=$code; done\nexit "$highest"\n',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SLURM_SUBMIT_DIR/requeued"; fi\n',
}
WORK = """
import os, sys, time
code = int(sys.argv[1 + int(os.environ["GROUP_RANK"])])
time.sleep(0 if 2 <= code <= 5 else 3)  # the cause comes first
sys.exit(code)
"""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def test_slurm_gives_the_ranks_the_time_to_save():
    script = (FOLDER / "recover.sbatch").read_text()
    before_the_end = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", script, re.MULTILINE)[1])
    assert ranks.grace_seconds(re.findall(r"checkpoint\.grace=\d+", script)) < before_the_end
    assert f"'[{min(FINAL)}-{max(FINAL)}]'" in script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "ends", "requeued"), [(("0", "0"), 0, False), (("3", "0"), 3, False), (("76", "76"), 75, True), (("130", "130"), 130, True)]
)
def test_the_job_is_started_again_unless_the_cause_would_come_again(codes, ends, requeued, tmp_path):
    """The script itself, with two machines of two ranks; Slurm's commands have stand-ins."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "work.py").write_text(WORK)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(tmp_path)}
    own = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{tmp_path}", "PY": sys.executable, "RANKS": "2"}
    command = ["bash", str(FOLDER / "recover.sbatch"), "work", *codes]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | slurm | own, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize(("name", "machines"), [("kubernetes-8.yaml", 1), ("kubernetes-64.yaml", 8)])
def test_kubernetes_runs_the_stage_and_knows_its_exit_codes(name, machines):
    *services, job = documents(name)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    rule = next(rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")["onExitCodes"]
    assert (set(rule["values"]), rule["containerName"], pod["restartPolicy"]) == (FINAL, container["name"], "Never")
    assert ranks.grace_seconds(container["args"]) < pod["terminationGracePeriodSeconds"]
    launched = parsed(container["args"])
    assert container["command"] == ["python", "-m", "dev2pro.ranks"]
    assert launched.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert (spec.get("completions", 1), spec.get("parallelism", 1)) == (machines, machines)
    if machines > 1:
        assert launched.nnodes == str(machines)
        assert spec["completionMode"] == "Indexed"  # which names the pods <job>-<index>
        assert launched.rdzv_endpoint.partition(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
        assert services[0]["metadata"]["name"] == pod["subdomain"]
        assert services[0]["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    else:
        assert launched.standalone
    assert_configuration(launched.training_script, launched.training_script_args, 8 * machines)


def parsed(args: list[str]) -> Any:
    """As torchrun reads them."""
    from torch.distributed import run

    return run.parse_args(args)


def assert_configuration(module: str, args: list[str], ranks: int) -> None:
    """What Hydra makes of the words fits the stage, and the batch its ranks."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from stages import frame, recover

    assert module == "stages.recover"
    ConfigStore.instance().store(name="recover_schema", node=recover.RecoverConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = frame.typed(recover.RecoverConfig, compose("recover", args))
    assert config.hardware.shard
    assert config.batch % ranks == 0
    assert config.hardware.replicas == ranks // 8
    assert not Path(config.out).is_absolute()  # below /dev2pro/runs, which is the volume
    assert config.out.startswith("runs/")
