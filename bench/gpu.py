"""Everything that only a GPU can show, in one sitting: `make gpu`, or `make gpu PIECE=recover-1024` for a part of it.

The tests marked gpu, then random weights of FLUX.1-dev's size through every hardware= file that its stage may use, at 512 and 1024 px, each in a
process of its own. A piece takes at most nine minutes: one that takes longer is ended and written down as such. `--list` names the pieces, and PIECE
is the beginning of some. Results stay in runs/gpu/, and the part of docs/performance.md between its two marks is written anew from all of them after
each piece. DEVICE=cpu SIZE=tiny takes the same path without a GPU and writes runs/gpu/performance.md.
"""

import stages  # isort: skip  # noqa: F401  (first, because it quiets the libraries)

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not take one: the pieces are forked from this process

import hydra
import torch
from omegaconf import OmegaConf

from bench import models, report, train
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from dev2pro.training.distributed import HardwareConfig

LIMIT = 540.0  # seconds
STEPS = {"cuda": 3, "cpu": 1}
SAMPLES = {"recover": 8, "lora": 4}  # of a step and rank, if micro-batches are smaller
DOCUMENT = ROOT / "docs/performance.md"
RESULTS = Path("runs/gpu")


@dataclass(frozen=True)
class Piece:
    """One thing to run: the tests (`stage` is empty), or a stage on a hardware= file."""

    name: str
    stage: str = ""
    px: int = 0
    rung: str = ""


@functools.cache
def rungs() -> dict[str, HardwareConfig]:
    """The hardware= files for GPUs."""
    names = sorted(file.stem for file in (ROOT / "conf/hardware").glob("*.yaml") if file.stem != "cpu")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf/hardware")):
        return {name: HardwareConfig(**OmegaConf.to_container(hydra.compose(name))) for name in names}


def pieces(size: str) -> Iterator[Piece]:
    """All of them, in order. What only a frozen base allows is for LoRAs, sharding for recover; a file for several machines needs those."""
    yield Piece("tests")
    for stage in ("recover", "lora"):
        for px in models.size(size).pixels:
            for rung, hardware in rungs().items():
                other = hardware.int8_base or hardware.offloaded_blocks if stage == "recover" else hardware.shard or hardware.float8
                if not other and hardware.replicas == 1:
                    yield Piece(f"{stage}-{px}-{rung}", stage, px, rung)


def asked(piece: Piece, device: str, size: str, ranks: int) -> train.Asked:
    """What bench.train is to measure. A step has a few samples, so that it takes seconds at any size."""
    hardware = rungs()[piece.rung]
    share = hardware.micro_batch if hardware.step_in_backward and piece.stage == "recover" else max(SAMPLES[piece.stage], hardware.micro_batch)
    overrides = [f"hardware={piece.rung}", f"batch={share * ranks}", *(["hardware.device=cpu", "hardware.threads=1"] if device == "cpu" else [])]
    return train.Asked(stage=piece.stage, size=size, px=piece.px, steps=STEPS[device], overrides=tuple(overrides))


# ---- one piece ---------------------------------------------------------------------------------------------------------------------------


def run(piece: Piece, device: str, size: str) -> dict[str, Any]:
    """The piece's result: `outcome` (ran, refused, does not fit, failed, too long), why, and what was measured."""
    if not piece.stage:
        return run_tests()
    hardware, cards = rungs()[piece.rung], torch.cuda.device_count() if device == "cuda" else 2
    if not hardware.shard:
        return forked(lambda: train.measure(asked(piece, device, size, 1)))
    if cards < 2:
        return {"outcome": "refused", "why": "it shards over several GPUs, and this machine has one"}
    return on_ranks(asked(piece, device, size, cards), cards)


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a forked process, which has the libraries already and gives the GPU's memory back when it ends."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(work, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT) else {"outcome": "too long", "why": f"not done after {LIMIT:.0f} s"}
    except EOFError:
        child.join()
        return {"outcome": "failed", "why": f"its process ended with {child.exitcode}; -9 is often a lack of host memory"}
    finally:
        child.kill()
        child.join()


def _answer(work: Callable[[], dict[str, Any]], sender: Any) -> None:
    try:
        sender.send({"outcome": "ran", **work()})
    except ConfigError as error:
        sender.send({"outcome": "refused", "why": str(error)})
    except torch.OutOfMemoryError as error:
        sender.send({"outcome": "does not fit", "why": str(error).splitlines()[0]})
    except Exception as error:
        traceback.print_exc()
        sender.send({"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:500]})


def on_ranks(wanted: train.Asked, ranks: int) -> dict[str, Any]:
    """Measures on several processes, one a GPU."""
    out = RESULTS / "ranks.json"
    out.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "dev2pro.ranks", f"--nproc-per-node={ranks}", "-m", "bench.train", wanted.stage, f"--size={wanted.size}",
        f"--px={wanted.px}", f"--steps={wanted.steps}", f"--out={out}", *wanted.overrides,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT, stderr=subprocess.PIPE, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "too long", "why": f"not done after {LIMIT:.0f} s"}
    if out.is_file():
        return {"outcome": "ran", **json.loads(out.read_text())}
    print(done.stderr, file=sys.stderr)
    why = [line for line in done.stderr.splitlines() if "Error" in line][-1:] or [f"exit code {done.returncode}"]
    return {"outcome": "does not fit" if "OutOfMemoryError" in done.stderr else "failed", "why": why[0][:500]}


def run_tests() -> dict[str, Any]:
    """Runs the tests marked gpu; without a GPU they are collected and skipped."""
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text())
    out = (RESULTS / "tests.xml").resolve()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", f"--junitxml={out}", *files]
    try:
        subprocess.run(command, cwd=ROOT, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "too long", "why": f"not done after {LIMIT:.0f} s"}
    cases = list(xml.etree.ElementTree.parse(out).getroot().iter("testcase"))
    marks = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    results = {case.get("name", ""): next((marks[part.tag] for part in case if part.tag in marks), "passed") for case in cases}
    return {"outcome": "failed" if "failed" in results.values() or not results else "ran", "tests": results}


# ---- all of them ---------------------------------------------------------------------------------------------------------------------------


def main(piece: str, device: str, size: str, out: Path, listed: bool) -> None:
    every = list(pieces(size))
    chosen = [one for one in every if one.name.startswith(piece)]
    if listed:
        print(*(one.name for one in every), sep="\n")
        return
    if not chosen:
        raise SystemExit(f"PIECE={piece} begins no piece. Choose among {', '.join(one.name for one in every)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This machine has no CUDA device that torch can use. Run it where there is one, or try the path with DEVICE=cpu SIZE=tiny.")
    if device == "cpu":  # compiling 8-bit AdamW for each of a model's shapes takes a CPU minutes; here, and in processes started here
        torch.compiler.set_stance("force_eager")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    folder = RESULTS / f"{device}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    machine = forked(lambda: report.environment(torch.device(device)))
    for number, one in enumerate(chosen, 1):
        began = time.monotonic()
        result = run(one, device, size)
        result = {"piece": dataclasses.asdict(one), **machine, **result, "took": round(time.monotonic() - began, 1)}
        (folder / f"{one.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        report.write(out, DOCUMENT, folder)
        print(f"{number}/{len(chosen)} {one.name}: {result['outcome']} after {result['took']} s {result.get('why', '')}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", default="", help="the beginning of a piece's name; all of them without it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default="12b")
    parser.add_argument("--out", type=Path, help="the document to write; docs/performance.md for a GPU, runs/gpu/performance.md for a CPU")
    parser.add_argument("--list", dest="listed", action="store_true")
    given = parser.parse_args()
    given.out = given.out or (DOCUMENT if given.device == "cuda" else RESULTS / "performance.md")
    main(**vars(given))
