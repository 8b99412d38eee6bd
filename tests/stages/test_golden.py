"""The first losses of every stage's real entry point on the bundled miniature, against recorded numbers.

Same seed, same loss; a change is explained in LOG.md and recorded with `python tests/stages/test_golden.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 2e-3  # relative; another CPU adds in another order
SMALL = ["experiment=miniature", "seed=3", "probe.samples=8", "probe.every=1000"]
BASE = "data/miniature/pipeline"
COMMANDS = {
    "recover": ["stages.recover", *SMALL, "steps=4"],
    "lora": ["stages.lora", *SMALL, "steps=4", f"trained_on={BASE}", "data.name=chalk", "optim.warmup=0"],
    "distill": ["stages.distill", *SMALL, "steps=3", "teacher=data/miniature/teacher"],
    "pipeline": ["stages.miniature", "part=pipeline", "seed=3", "vae_steps=3", "clip_steps=2"],
    "judge": ["stages.miniature", "part=judge", "seed=3", "judge_steps=2"],
}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def run(name: str, out: Path) -> None:
    subprocess.run([sys.executable, "-m", *COMMANDS[name], f"out={out}"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_first_losses(name, tmp_path, run_stage):
    """One as people start it; the others in this process, which spares the seconds of the imports."""
    if name == "recover":
        run(name, tmp_path)
    else:
        module, *args = COMMANDS[name]
        code, stderr = run_stage(module.removeprefix("stages."), *args, f"out={tmp_path}")
        assert code == 0, stderr
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in COMMANDS:
            run(name, Path(folder) / name)
        GOLDEN.write_text(json.dumps({name: losses(Path(folder) / name) for name in COMMANDS}, indent=1) + "\n")
