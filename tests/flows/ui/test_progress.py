"""What the UI shows of a stage: metrics read incrementally, readable durations, keys that Prefect accepts."""

import io
import json
from collections import deque

import pytest
from PIL import Image

from dev2pro.artifacts.record import ROOT
from flows.ui import charts, progress
from flows.ui.progress import Rows


def row(step: int, **values: object) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def test_rows_are_read_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    assert rows.read() == []
    path.write_text(row(1, loss=1.5, lr=0.1) + '{"step": 2, "lo')
    assert rows.read() == [(1, 1.5)]
    with path.open("a") as file:
        file.write('ss": 1.25}\n')
    assert rows.read() == [(1, 1.5), (2, 1.25)]
    (tmp_path / "new").write_text(row(1, loss=3.0))  # a run that goes on begins its file anew
    (tmp_path / "new").rename(path)
    assert rows.read() == [(1, 3.0)]


def steps_at(*steps: tuple[float, int]) -> deque:
    return deque((when, {"stage": "recover", "step": step, "of": 1000, "text": ""}) for when, step in steps)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (steps_at((5.0, 3)), "step 3 of 1,000"),
        (steps_at((0.0, 0), (10.0, 100)), "step 100 of 1,000, 10 a second, 1 min 30 s left"),
        (steps_at((0.0, 100), (1000.0, 150)), "step 150 of 1,000, 0.05 a second, 4 h 43 min left"),
        (steps_at((0.0, 999), (1.0, 1000)), "step 1,000 of 1,000, 1 a second, 0 s left"),
    ],
)
def test_how_far_how_fast_how_long(events, expected):
    assert progress.pace(events) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0 s"), (59.9, "59 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (200000, "2 d 7 h")])
def test_durations(seconds, expected):
    assert progress.duration(seconds) == expected


def test_keys_are_what_prefect_takes():
    assert progress.key(ROOT / "runs/demo/lora/chalk/recovered@1") == "demo-lora-chalk-recovered-1"
    assert progress.key(ROOT / "elsewhere/Ä_x") == f"{str(ROOT).strip('/').replace('/', '-').lower()}-elsewhere-x"


def test_curves_are_a_small_picture():
    curve = [{"step": step, "loss": 1 / (1 + step), "loss_usual": 2.0, "guidance_gap": 0.1, "teacher_distance": None} for step in range(0, 1000, 100)]
    for points, panels in ((curve, 2), ([], 1)):
        picture = charts.draw([(step, 1.0) for step in range(5000)], points)
        image = Image.open(io.BytesIO(picture))
        assert image.size == (800, 300), panels
        assert len(picture) < 60_000
