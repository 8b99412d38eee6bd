"""Whatever the configuration, a stage runs or refuses: in seconds, in one paragraph, without weights, and never as if it had a bug."""

import importlib
import json
import re
import shutil
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from dev2pro import allowed

SECONDS, PLAN = 3.0, 15.0  # that a refusal may take of this process, and one after a plan, which reckons a step
NAMES = ["a=b (1)", "c#", "shots [2020]", "a{1,2}", "what?", "x, y", "日本", "it's", "$HOME", "2020"]
ODD = [
    "", " ", "null", "true", "nan", ".nan", "inf", "-inf", "1e999", "-1", "0", "1", "9" * 30, "1_0", "[1,2]", "[]", "{a:b}", "{}", "(", "'", '"',
    "~", "~/x", "${", "${seed}", "${oc.env:HOME}", "a,b", "a b", "[a", "a]", "/", "..", "/proc/nowhere", "/dev/null", "x" * 300, "choice(1,2)", "1.5",
]  # fmt: skip
ENCODED = {"resolution": "32", "bucket_step": "8"}
CODES = (0, 2, 3, 4, 75)
UNDRAWN = {"publish", "plan", "check", "hardware.card_gb"}  # a plan takes its seconds, and has tests of its own


@pytest.fixture(scope="module")
def world(tiny_data, tmp_path_factory) -> Path:
    """A folder with a folder of six pictures under every name, an empty one, a file, and a LoRA that does not exist."""
    root = tmp_path_factory.mktemp("world")
    for name in NAMES:
        shutil.copytree(tiny_data / "folder", root / name)
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / "prompts.txt").write_text("one\ntwo\n")
    return root


def command(stage: str, world: Path, tiny: Path, tiny_data: Path) -> dict[str, str]:
    """A command that works."""
    heldout = str(tiny_data / "heldout.tar")
    model = {"model.path": str(tiny), "model.max_sequence_length": "8", "hardware": "cpu", "out": f"{world}/out"}
    data = {"data.train": f"[{world}/2020]", "data.heldout": f"[{heldout}]", "data.resolution": "32", "data.bucket_step": "8",
            "data.read.workers": "0", "data.read.cache": f"{world}/cache", "steps": "1", "batch": "2", "probe.bins": "1",
            "preview.pictures": "0"}  # fmt: skip
    return {
        "recover": model | data,
        "lora": model | data | {"trained_on": str(tiny), "adapter.rank": "2"},
        "distill": model | data | {"teacher": str(tiny)},
        "encode": model
        | {"shards": f"[{heldout}]", "to": f"{world}/encoded", "resolution": "32", "bucket_step": "8", "read.cache": f"{world}/cache"},
        "evaluate": model | {"loras": f"[{world}/empty]", "prompts": f"{world}/prompts.txt"},
        "diagnose": model | {key: data[key] for key in ("data.heldout", "data.resolution", "data.bucket_step", "data.read.cache", "probe.bins")},
        "tune": model | {"lora": f"{world}/empty", "prompts": f"{world}/prompts.txt"},
        "extract": model | {"recovered": str(tiny), "rank": "4"},
        "draw": model | {"prompts": f"{world}/prompts.txt", "resolution": "32", "sampling.steps": "1"},
        "miniature": {"out": f"{world}/out", "part": "pipeline"},
    }[stage]


@st.composite
def commands(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A stage, and one to three of its keys with values that are odd, of another type, at the ends of a range, or places that exist or do not."""
    stage = draw(st.sampled_from(["recover", "lora", "lora", "distill", "encode", "evaluate", "diagnose", "extract", "tune", "draw", "miniature"]))
    schema = allowed.keys(getattr(importlib.import_module(f"stages.{stage}"), f"{stage.title()}Config"))
    changes = {}
    for key in draw(st.lists(st.sampled_from(sorted(set(schema) - UNDRAWN)), min_size=1, max_size=3, unique=True)):
        places = [f"@/{name}" for name in (*NAMES, "empty", "file", "nothing", "2020/x")]
        if key in ("out", "to", "cells") or key.endswith("read.cache"):
            places = [f"@/cache/{name}" for name in NAMES]
        number = st.integers(0, 40).map(str) if schema[key] is int else st.sampled_from(["0", "0.5", "1", "1.0e-3", "3"])
        flag, place = st.sampled_from(["true", "false", "2"]), st.sampled_from([*places, *(f"[{place}]" for place in places)])
        likely = flag if schema[key] is bool else number if schema[key] in (int, float) else place
        text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
        changes[key] = draw(place if key.endswith("read.cache") else likely | likely | st.sampled_from(ODD) | text)  # the cache alone is written
    return stage, changes


def told(stage: str, changes: dict[str, str], run_stage, world: Path, tiny: Path, tiny_data: Path, *, check: bool) -> tuple[int, str, float]:
    """(exit code, stderr, seconds of this process) of a command that works but for the changes."""
    words = command(stage, world, tiny, tiny_data) | {key: value.replace("@", str(world)) for key, value in changes.items()}
    began = time.process_time()
    code, stderr = run_stage(stage, *(f"{key}={value}" for key, value in words.items()), *(["check=true"] if check else []))
    return code, stderr, time.process_time() - began


def judge(stage: str, changes: dict[str, str], code: int, stderr: str, seconds: float) -> None:
    """What holds for every end."""
    case = json.dumps([stage, changes, code, stderr[-2000:]], ensure_ascii=False)
    assert code in CODES, case
    assert "Traceback" not in stderr, case
    if code:
        assert stderr.startswith(f"{stage}: ") or "\n" + f"{stage}: " in stderr, case
        assert "\n\n" not in stderr.strip(), case
        assert seconds < (PLAN if "hardware.card_gb" in changes else SECONDS), f"{seconds:.1f} s: {case}"


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Whoever opens the weights of a model fails; a LoRA's file is opened, for its shapes."""
    monkeypatch.setattr("dev2pro.training.sharding.safe_open", lambda *_, **__: pytest.fail("it opened weights"))
    for kind in ("diffusers.FluxTransformer2DModel", "diffusers.AutoencoderKL", "transformers.T5EncoderModel", "transformers.CLIPTextModel",
                 "transformers.CLIPModel"):  # fmt: skip
        monkeypatch.setattr(f"{kind}.from_pretrained", lambda *_, **__: pytest.fail("it loaded weights"))


def files(world: Path) -> set[str]:
    """Every file and folder but those of the cache."""
    return {str(path) for path in world.rglob("*") if not re.search("cache|/packed", str(path))}


SETTINGS = {"suppress_health_check": list(hypothesis.HealthCheck), "deadline": None}


@pytest.mark.parametrize("examples", [35, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_check_ends_in_seconds_in_a_paragraph_and_writes_nothing(examples, run_stage, world, tiny, tiny_data, no_weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = set[int]()

    @hypothesis.settings(**SETTINGS, max_examples=examples)
    @hypothesis.given(commands())
    def ends_well(drawn: tuple[str, dict[str, str]]) -> None:
        stage, changes = drawn
        code, stderr, seconds = told(stage, changes, run_stage, world, tiny, tiny_data, check=True)
        judge(stage, changes, code, stderr, seconds)
        seen.add(code)
        assert files(world) == before, (stage, changes)

    before = files(world)
    told("recover", {}, run_stage, world, tiny, tiny_data, check=True)  # what a process imports and compiles once is not timed
    ends_well()
    assert {0, 2} <= seen


@pytest.mark.parametrize("examples", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_ends_as_its_check_says(examples, run_stage, world, tiny, tiny_data, tmp_path_factory):
    @hypothesis.settings(**SETTINGS, max_examples=examples)
    @hypothesis.given(commands().filter(lambda drawn: drawn[0] == "lora" and not {"steps", "out", "data.read.workers"} & set(drawn[1])))
    def ends_well(drawn: tuple[str, dict[str, str]]) -> None:
        stage, changes = drawn
        changes = changes | {"out": str(tmp_path_factory.mktemp("run"))}
        expected, *_ = told(stage, changes, run_stage, world, tiny, tiny_data, check=True)
        code, stderr, seconds = told(stage, changes, run_stage, world, tiny, tiny_data, check=False)
        judge(stage, changes, code, stderr, seconds)
        assert code == expected, (changes, stderr)

    ends_well()
