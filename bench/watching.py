"""What it costs a training to be watched: the same recovery alone, and from a flow that shows it in the UI, in pairs."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dev2pro import artifact
from dev2pro.artifact import ROOT

PAIRS, STEPS = 3, 600
OUT = "runs/bench-watching"
WORDS = ["experiment=miniature", f"steps={STEPS}", "batch=32", "probe.every=100", "probe.samples=16", "checkpoint.every=200", "seed=0", f"out={OUT}"]
FLOW = """
from flows.single import recover
from flows.forms import Recover
recover(Recover(out={out!r}, steps={steps}, batch=32, probe={{"every": 100, "samples": 16}}, checkpoint={{"every": 200}}))
"""


def speed(command: list[str], home: str) -> float:
    """Steps a second of one run, without what is no training."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PREFECT_HOME": home}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return artifact.read(str(ROOT / OUT)).metrics["steps_per_second"]


def main() -> None:
    """Prints the pairs and their ratio."""
    with tempfile.TemporaryDirectory() as home:
        flow = [sys.executable, "-c", FLOW.format(out=OUT, steps=STEPS)]
        pairs = [(speed([sys.executable, "-m", "stages.recover", *WORDS], home), speed(flow, home)) for _ in range(PAIRS)]
    shutil.rmtree(Path(ROOT, OUT))
    ratios = [watched / alone for alone, watched in pairs]
    print(json.dumps({"steps a second (alone, watched)": pairs, "watched to alone": ratios, "median": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
