"""A base is diagnosed without a teacher, and what is said of the bundled one is held against its teacher's truth."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dev2pro.artifacts import record
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig

BUNDLE = Path(__file__).parents[2] / "data" / "miniature"
BASE, TEACHER = str(BUNDLE / "pipeline"), str(BUNDLE / "teacher")
INK = f"{BUNDLE}/shards/ink/heldout-*.tar"
SMALL = ("probe.bins=2", "probe.samples=4", f"model.path={BASE}")


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


@dataclass(frozen=True)
class LoraLike:
    """As much of a LoRA stage's configuration as a diagnosis reads."""

    out: str
    loss: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def make_lora(tmp_path):
    """Makes a LoRA for the bundled base as stages.lora writes it; random numbers, or no effect without a `size`."""

    def made(name: str, trained_on: str, guidance: float | list[float], size: float = 0.05, **parents: str) -> str:
        transformer, adapter = flux1.load_transformer(BASE), AdapterConfig(rank=4, alpha=4, targets="attention")
        lora.inject(transformer, adapter, seed=0)
        torch.manual_seed(0)
        for key, value in transformer.named_parameters():
            if "lora_B" in key and size:
                torch.nn.init.normal_(value, std=size)
        config = LoraLike(str(tmp_path / name), {"bypass_guidance": True} if "bypassed" in name else {})
        (tmp_path / name).mkdir()
        lora.save(transformer, adapter, config.out, {})
        contract = {"trained_on": {"path": trained_on, "id": record.fingerprint(trained_on)}, "training_guidance": guidance}
        record.write(config.out, "lora", "lora", config, parents, step=1, metrics={}, inference=contract)
        return config.out

    return made


@pytest.fixture
def loads(monkeypatch) -> Iterator[list[tuple[str, int]]]:
    """(path, transformers alive before) of every transformer that is loaded, where no garbage is collected by chance."""
    monkeypatch.setattr("gc.enable", gc.disable)
    seen, alive, load = list[tuple[str, int]](), weakref.WeakSet[torch.nn.Module](), flux1.load_transformer

    def note_load(path: str, *args: Any) -> torch.nn.Module:
        seen.append((path, len(alive)))
        alive.add(transformer := load(path, *args))
        return transformer

    monkeypatch.setattr(flux1, "load_transformer", note_load)
    yield seen
    monkeypatch.undo()
    gc.enable()


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


def by_lora(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The LoRAs of a diagnosis by the names of their folders."""
    return {Path(one["name"]).name: one for one in found["found"][1:]}


def test_a_lora_without_effect_keeps_the_whole_response_leaks_nothing_and_has_no_gap(diagnose, make_lora):
    found, _ = diagnose(f"loras=[{make_lora('empty', TEACHER, 1.0, size=0)}]", f"outside=[{INK}]")
    base, one = found["found"]
    assert one["response_kept"] == pytest.approx(1)
    assert one["loss_usual"] == base["loss_usual"]
    assert one["effect"] == one["transfer"]["effect_trained"] == 0
    assert one["transfer"]["cosine"] is one["transfer"]["ratio"] is None
    assert (one["forgetting"]["leak"], one["forgetting"]["loss_rise"]) == (0, 0)
    assert found["words"][-1].endswith("changes by +0.000.")
    assert " It has no effect." in found["words"][-1]


def test_the_gap_of_loras_of_the_base_itself_is_the_guidance_only(diagnose, make_lora, loads):
    made = [make_lora(f"at-{guidance}", BASE, guidance) for guidance in (3.5, [2.0, 6.0], 1.0, 3.0)]
    loads.clear()
    found, _ = diagnose(f"loras={made}".replace("'", '"'), *SMALL)
    usual, over_a_range, at_1, at_3 = (one["transfer"] for one in found["found"][1:])
    for gap in (usual, over_a_range):
        assert (gap["cosine"], gap["ratio"]) == (pytest.approx(1), pytest.approx(1))
        assert all((one["cosine"], one["ratio"]) == (pytest.approx(1), pytest.approx(1)) for one in gap["by_time"])
    assert 0.9 < at_1["cosine"] < 1 - 1e-4
    assert 0.9 < at_3["cosine"] < 1 - 1e-4
    assert at_1["cosine"] != pytest.approx(at_3["cosine"], abs=1e-4)
    assert len(at_1["by_time"]) == len(found["times"])
    assert [(path, before) for path, before in loads] == [(BASE, 0), (BASE, 0)]  # again for guidance 3, which is asked of no base
    assert {one["transfer"]["trained_on"] for one in found["found"][1:]} == {BASE}


def test_the_gap_to_another_model_which_is_loaded_once_and_alone(diagnose, make_lora, loads, tmp_path):
    base, teacher = flux1.load_transformer(BASE), flux1.load_transformer(TEACHER)
    whole = [part for _, part, _ in lora.extract(base, teacher, 96, torch.device("cpu"))]
    (tmp_path / "adapter").mkdir()
    lora.write({key: value for part in whole for key, value in part.items()}, str(tmp_path / "adapter"), {})
    made = [make_lora("one", TEACHER, 1.0), make_lora("merged", BASE, 1.0, training_adapter=str(tmp_path / "adapter")),
            make_lora("bypassed", BASE, 1.0), make_lora("two", TEACHER, 1.0), make_lora("weak", TEACHER, 1.0, size=1e-4)]  # fmt: skip
    del base, teacher
    loads.clear()
    found, _ = diagnose(f"loras=[{','.join(made)}]", *SMALL)
    gaps = {name: one["transfer"] for name, one in by_lora(found).items()}
    assert loads == [(BASE, 0), (TEACHER, 0), (BASE, 0), (BASE, 0)]  # the base, the teacher for all, the merged one, the bypassed one
    for key in ("cosine", "ratio", "effect_trained"):
        assert gaps["one"][key] == gaps["two"][key]
        assert gaps["merged"][key] == pytest.approx(gaps["one"][key], rel=1e-3), "base and adapter are the teacher"
    assert 0 < gaps["one"]["cosine"] < 0.999
    assert gaps["bypassed"]["cosine"] != pytest.approx(gaps["one"]["cosine"], abs=1e-3)
    assert gaps["weak"]["effect_trained"] < 0.1 * gaps["one"]["effect_trained"]
    assert gaps["merged"]["trained_on"] == f"{BASE} with the training adapter {tmp_path}/adapter"


def test_a_lora_whose_training_base_is_not_here_is_reported_without_the_gap(diagnose, make_lora, with_transformer):
    folder = with_transformer("teacher")
    path = make_lora("mine", str(folder), 1.0)
    shutil.rmtree(folder)
    found, _ = diagnose(f"loras=[{path}]", *SMALL)
    assert found["found"][1]["transfer"].keys() == {"missing"}
    assert found["found"][1]["effect"] > 0
    assert f"not compared with that in its training: {folder}, which it was trained on, is not here" in found["words"][-1]


def test_forgetting_is_held_against_the_style_s_own_pictures(diagnose, make_lora):
    path = make_lora("mine", BASE, 3.5)
    found, _ = diagnose(f"loras=[{path}]", f"outside=[{INK}]", *SMALL)  # ink is the bundled data.heldout itself
    base, one = found["found"]
    assert one["forgetting"]["leak"] == pytest.approx(1)
    assert one["forgetting"]["loss_unguided"] == pytest.approx(one["loss_unguided"])
    assert one["forgetting"]["loss_rise"] == pytest.approx(one["loss_unguided"] - base["loss_unguided"], abs=1e-6)
    shutil.rmtree(Path(path).parent / "out")
    elsewhere, _ = diagnose(f"loras=[{path}]", f"outside=[{INK.replace('ink', 'chalk')}]", *SMALL)
    assert elsewhere["found"][1]["forgetting"]["leak"] != pytest.approx(1, abs=1e-3)
    assert elsewhere["found"][1]["transfer"] == one["transfer"]


def test_pictures_outside_that_are_not_there_are_told_before_anything_is_loaded(diagnose, tmp_path, loads):
    code, stderr = diagnose(f"outside=[{tmp_path}/nowhere-*.tar]", fails=True)
    assert (code, loads) == (3, [])
    assert "outside: nothing matches" in stderr


@pytest.mark.parametrize("line", ["[2]", "[6,2]", "[1,6]", "[2,2]"])
def test_a_line_needs_two_guidances_above_1(diagnose, line):
    code, stderr = diagnose(f"line={line}", fails=True)
    assert code == 2
    assert "is no line" in stderr


def test_a_lora_of_another_model_is_refused_before_anything_is_read(diagnose, tmp_path):
    code, stderr = diagnose(f"loras=[{tmp_path}/nowhere]", fails=True)
    assert code == 2
    assert "nowhere" in stderr
