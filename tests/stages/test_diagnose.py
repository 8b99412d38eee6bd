"""A base is diagnosed without a teacher, and what is said of the bundled one is held against its teacher's truth."""

import json
import shutil
from pathlib import Path

import pytest

from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig

BUNDLE = Path(__file__).parents[2] / "data" / "miniature"


@pytest.fixture
def diagnose(tmp_path, run_stage):
    def run(*words: str, fails: bool = False):
        out = tmp_path / "out"
        code, stderr = run_stage("diagnose", "experiment=miniature", "probe.bins=4", "probe.samples=16", f"out={out}", *words)
        if fails:
            return code, stderr
        assert code == 0, stderr
        return json.loads((out / "diagnosis.json").read_text()), json.loads((out / "artifact.json").read_text())

    return run


@pytest.fixture
def with_transformer(tmp_path):
    """Makes the bundled pipeline with another of the bundle's transformers."""

    def made(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(BUNDLE / "pipeline", folder, ignore=shutil.ignore_patterns("transformer"))
        shutil.copytree(BUNDLE / name / "transformer", folder / "transformer")
        return folder

    return made


@pytest.fixture
def empty_lora(tmp_path) -> Path:
    """A LoRA for the bundled base that was never trained."""
    transformer, config = flux1.load_transformer(str(BUNDLE / "pipeline")), AdapterConfig(rank=4, alpha=4, targets="attention")
    lora.inject(transformer, config, seed=0)
    (tmp_path / "lora").mkdir()
    lora.save(transformer, config, str(tmp_path / "lora"), {})
    return tmp_path / "lora"


def test_the_bundled_base_as_its_teacher_knows_it(diagnose):
    found, artifact = diagnose("teacher=data/miniature/teacher")
    base = found["found"][0]
    assert base["regime"] == "outside"
    assert 3 < base["acts_like"] < 5
    assert base["response"] == pytest.approx(base["true_response"], abs=0.15)  # what is said without the teacher is near the truth
    assert base["unguided_distance"] < 0.1 * base["teacher_distance"]  # its own empty caption takes the guidance out
    assert base["line_distance"] < 0.2 * base["teacher_distance"]
    assert len(base["by_time"]) == len(found["times"]) == 4
    assert artifact["metrics"]["words"] == found["words"]
    assert [parent["role"] for parent in artifact["parents"]] == ["base", "teacher"]


def test_the_second_base_has_learnt_guidance_1(diagnose, with_transformer):
    found, _ = diagnose(f"model.path={with_transformer('inside')}", "teacher=data/miniature/teacher")
    base = found["found"][0]
    assert base["regime"] == "inside"
    assert base["acts_like"] == pytest.approx(1, abs=0.3)
    assert base["teacher_distance"] < 0.06
    assert base["loss"] == pytest.approx(base["loss_unguided"], rel=0.05)  # recovery has nothing to bring


def test_an_undistilled_model_has_no_guidance_input_to_speak_of(diagnose, with_transformer):
    found, _ = diagnose(f"model.path={with_transformer('teacher')}")
    assert found["found"][0]["regime"] == "dead"


def test_a_lora_without_effect_keeps_the_whole_response(diagnose, empty_lora):
    found, _ = diagnose(f"loras=[{empty_lora}]")
    assert found["found"][1]["response_kept"] == pytest.approx(1)
    assert found["found"][1]["loss_usual"] == pytest.approx(found["found"][0]["loss_usual"])


@pytest.mark.parametrize("line", ["[2]", "[6,2]", "[1,6]", "[2,2]"])
def test_a_line_needs_two_guidances_above_1(diagnose, line):
    code, stderr = diagnose(f"line={line}", fails=True)
    assert code == 2
    assert "is no line" in stderr


def test_a_lora_of_another_model_is_refused_before_anything_is_read(diagnose, tmp_path):
    code, stderr = diagnose(f"loras=[{tmp_path}/nowhere]", fails=True)
    assert code == 2
    assert "nowhere" in stderr
