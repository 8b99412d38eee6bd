"""Our LoRA and full fine-tune against diffusers' own dreambooth scripts and a bare loop: the same model, pictures, batch and modules.

`make peers`, or `python -m bench.peers [rounds]`. Every round runs all six once, one after the other; they are compared by CPU seconds, because other
work on the machine changes a wall clock far more. A run's figure is the median of its steps, a program's the lowest of its rounds. The first call
downloads the scripts, at one commit and with their sums checked, and makes runs/bench/peers/venv with what they need beyond this project's packages.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from bench import models
from bench.bare import LAYERS, RANK
from bench.pairs import machine, median, ratio

COMMIT = "58eb52c0803ea9af3abec60841c2a093bdf1f951"  # of huggingface/diffusers, 2026-08-23
SCRIPTS = {
    "train_dreambooth_lora_flux.py": "1e7862bbfb16f2d5fa6f3424a93c2d8383ba4b5f1509c6265777e1eb84d070ef",
    "train_dreambooth_flux.py": "97acda11c6fe799ad85cb7cdbfbf5d1588f5632d068ae3309e58167b09ff6dc2",
}
NEEDS = ("torchvision==0.28.0", "datasets==5.2.0")  # of the scripts, and of nothing else here
PEERS = models.FOLDER / "peers"
SIDE, BATCH, TOKENS = 256, 2, 512
STEPS, WARM = 16, 4
WHO = [(kind, who) for kind in ("lora", "full") for who in ("diffusers", "ours", "bare loop")]
TARGETS = "'.*(" + "|".join(layer.replace(".", "\\.") for layer in LAYERS) + ")'"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Run:
    """CPU and wall seconds of a step, and from the process's start to the end of the first step."""

    cpu: float
    wall: float
    first_cpu: float
    first_wall: float


def script(name: str) -> Path:
    """A script of diffusers, downloaded once. Ends the bench if it is not the one that is meant."""
    file = PEERS / name
    if not file.is_file():
        url = f"https://raw.githubusercontent.com/huggingface/diffusers/{COMMIT}/examples/dreambooth/{name}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise SystemExit(f"{url} could not be read ({error}). Put the file at {file} by other means, and run again.") from error
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SCRIPTS[name]:
        raise SystemExit(f"{file} is another file than diffusers has at {COMMIT[:12]} (its SHA-256 is {found}). Remove it, and run again.")
    return file


def interpreter() -> str:
    """A Python with this project's packages and what the scripts need besides, made once."""
    folder = PEERS / "venv"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        own = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
        (own / "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
        subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *NEEDS], check=True)
        (folder / "ready").touch()
    return str(python)


def programs(model: Path, pictures: Path, held_out: Path, out: str) -> dict[tuple[str, str], list[str]]:
    """(kind, who) -> command line, without the part that notes the steps."""
    theirs = [
        f"--pretrained_model_name_or_path={model}", f"--resolution={SIDE}", f"--train_batch_size={BATCH}", "--guidance_scale=1",
        "--learning_rate=1e-4", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0", f"--max_sequence_length={TOKENS}",
        "--checkpointing_steps=100000", f"--max_train_steps={STEPS}", f"--dataset_name={pictures}", "--caption_column=text",
        "--instance_prompt=a photograph", f"--output_dir={out}/theirs", f"--cache_dir={PEERS}/cache",
    ]  # fmt: skip
    ours = [
        f"model.path={model}", f"model.max_sequence_length={TOKENS}", f"data.train=[{pictures}]", f"data.heldout=[{held_out}]",
        f"data.resolution={SIDE}", "data.aspect=1", "data.bucket_step=16", f"data.read.cache={PEERS}/cache", "data.read.workers=0",
        "hardware=cpu", f"batch={BATCH}", f"steps={STEPS}", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=0", "preview.pictures=0",
        "probe.samples=1", "probe.bins=1", f"probe.every={STEPS}", "checkpoint.every=100000", f"out={out}/ours",
    ]  # fmt: skip
    shape = [str(model), str(SIDE), str(BATCH), str(TOKENS), str(STEPS)]
    lora = [f"trained_on={model}", f"adapter.rank={RANK}", f"adapter.alpha={RANK}", f"adapter.targets={TARGETS}"]
    return {
        ("lora", "diffusers"): [str(script("train_dreambooth_lora_flux.py")), *theirs, f"--rank={RANK}", f"--lora_layers={','.join(LAYERS)}"],
        ("lora", "ours"): ["-m", "stages.lora", *ours, *lora],
        ("lora", "bare loop"): ["-m", "bench.bare", "lora", *shape],
        ("full", "diffusers"): [str(script("train_dreambooth_flux.py")), *theirs],
        ("full", "ours"): ["-m", "stages.recover", *ours, "ema=0"],  # diffusers averages no weights
        ("full", "bare loop"): ["-m", "bench.bare", "full", *shape],
    }


def measured(python: str, program: list[str], folder: str) -> Run:
    """Runs one program to its end."""
    marks = Path(folder) / "marks.json"
    command = [python, "-m", "bench.marks", str(marks), *program]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    steps = json.loads(marks.read_text()) if marks.exists() else []
    if done.returncode or len(steps) != STEPS:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode} after {len(steps)} of {STEPS} steps:\n{done.stderr[-3000:]}")
    wall, cpu = ([after[i] - before[i] for before, after in zip(steps[WARM:], steps[WARM + 1 :], strict=False)] for i in (0, 1))
    return Run(median(cpu), median(wall), steps[0][1], steps[0][0])


def main(rounds: int, out: Path) -> None:
    machine()
    model, pictures, held_out, python = models.pipeline("tiny", weights=True), models.pictures(SIDE), models.held_out(SIDE), interpreter()
    runs: dict[tuple[str, str], list[Run]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(rounds):
        for who in WHO:
            with tempfile.TemporaryDirectory() as folder:
                program = programs(model.resolve(), pictures.resolve(), held_out.resolve(), folder)[who]
                runs.setdefault(who, []).append(measured(python if who[1] == "diffusers" else sys.executable, program, folder))
            last = runs[who][-1]
            print(f"round {number}: {who[0]} {who[1]} {last.cpu:.4f} CPU s a step, {last.first_cpu:.1f} to step 1", flush=True)
            out.write_text(json.dumps({f"{kind}, {name}": [vars(run) for run in results] for (kind, name), results in runs.items()}, indent=1) + "\n")
    print(table(runs))
    machine()


def table(runs: dict[tuple[str, str], list[Run]]) -> str:
    """The lowest of the rounds of each program, and ours over it: of the lowest, and the median and range over the rounds."""
    lines = [
        f"2.4 M parameters, {SIDE} px, batch {BATCH}, {TOKENS} text tokens, one thread, float32; lowest of {len(runs['lora', 'ours'])} rounds",
        f"{'':17}   CPU s a step   wall   CPU s to step 1   wall   ours to it, by CPU",
    ]
    for (kind, who), results in runs.items():
        mine, cpu = [run.cpu for run in runs[kind, "ours"]], [run.cpu for run in results]
        compared = "" if who == "ours" else f"{min(mine) / min(cpu):6.3f}   {ratio(mine, cpu)}"
        first = min(run.first_cpu for run in results), min(run.first_wall for run in results)
        lines.append(f"{kind:5}{who:12}   {min(cpu):12.4f} {min(run.wall for run in results):6.3f}   {first[0]:15.1f} {first[1]:6.1f}   {compared}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--out", type=Path, default=models.FOLDER / "peers.json")
    main(**vars(parser.parse_args()))
