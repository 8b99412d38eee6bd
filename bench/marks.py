"""Runs a Python program unchanged and notes when each of its optimizer steps ended: `python -m bench.marks FILE (SCRIPT.py | -m MODULE) args...`.

FILE gets a list of [wall, CPU] seconds since the process began, one per step of any torch optimizer. CPU seconds are this process's own.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

MARKS: list[tuple[float, float]] = []


def declare_torchvision() -> None:
    """Declares the operators that torchvision's import asks for and its wheels, made for CUDA, cannot load beside a torch for CPUs.

    The scripts only resize, crop and flip, which are Python.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    MARKS_KEEP.append(library)


MARKS_KEEP: list[torch.library.Library] = []  # a library that is garbage takes its operators with it


def main(file: str, program: list[str]) -> None:
    began = psutil.Process(os.getpid()).create_time()
    register_optimizer_step_post_hook(lambda *_: MARKS.append((time.time() - began, time.process_time())))
    try:
        if program[0] == "-m":
            sys.argv = ["-m", *program[2:]]  # as in `python -m`, while the package is imported
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            if torch.version.cuda is None:
                declare_torchvision()
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    finally:
        Path(file).write_text(json.dumps(MARKS))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
