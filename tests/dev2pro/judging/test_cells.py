import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dev2pro.artifacts import record, run_folder
from dev2pro.errors import ConfigError
from dev2pro.judging import cells, prompts


@dataclass(frozen=True)
class LoraLike:
    """As much of a LoRA stage's configuration as an evaluation reads."""

    out: str
    data: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    for name in ("base", "recovered", "teacher"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer/config.json").write_text(json.dumps({"name": name}))
    return {name: str(tmp_path / name) for name in ("base", "recovered", "teacher")}


@pytest.fixture
def lora(tmp_path: Path, models: dict[str, str]):
    def make(style: str, arm: str, trained_on: str = "base", apply_to: str = "base", kind: str = "lora", **parents: str) -> record.Artifact:
        config = LoraLike(str(tmp_path / "lora" / f"{style}-{arm}-{trained_on}-{kind}"), {"name": style})
        made_of = {role: models[name] for role, name in parents.items()}
        assert run_folder.acquire(config.out, "lora", config, made_of) is None
        contract = {
            key: {"path": models[name], "id": record.fingerprint(models[name])} for key, name in (("trained_on", trained_on), ("apply_to", apply_to))
        }
        return record.write(config.out, "lora", kind, config, made_of, step=1, metrics={}, inference={"arm": arm, **contract})

    return make


@pytest.mark.parametrize(
    ("name", "content", "groups"),
    [
        ("a.json", '["a cat", ["a dog", "one dog"]]', [["a cat"], ["a dog", "one dog"]]),
        ("a.txt", "a cat\n\na dog\n", [["a cat"], ["a dog"]]),
    ],
)
def test_prompts_are_grouped_by_meaning(name, content, groups, tmp_path):
    (tmp_path / name).write_text(content)
    assert prompts.read_prompts(str(tmp_path / name)) == groups


@pytest.mark.parametrize("content", ['["one"]', '["a", "a"]', '["a", ""]', '["a", []]', '["a", 3]', '[["a", "a"], "b"]', '{"a": "b"', "3"])
def test_prompts_that_cannot_be_told_apart_are_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"prompts=.*a\.json"):
        prompts.read_prompts(str(tmp_path / "a.json"))


def test_a_plan_has_the_ideal_first_and_every_lora_on_every_model(models, lora, tmp_path):
    for style in ("chalk", "poster"):
        lora(style, "base@1"), lora(style, "recovered@1", "recovered"), lora(style, "teacher@1", "teacher")
    loras = cells.find_loras([str(tmp_path / "lora/*")], models["base"])
    inferences = cells.list_inferences(models["base"], 3.5, 4.0, teacher=models["teacher"], recovered=models["recovered"])
    assert [(one.name, one.guidance, one.cfg_scale) for one in inferences] == [("teacher", 1.0, 4.0), ("base", 3.5, 1.0), ("recovered", 1.0, 4.0)]
    planned = [(style, arm) for style, arm, _ in cells.plan(inferences, loras)]
    arms = ["none", "base@1", "recovered@1", "teacher@1"]
    assert planned[:2] == [("chalk", "ideal"), ("poster", "ideal")]
    assert planned[2:] == [(style, arm) for _ in ("base", "recovered") for style in ("chalk", "poster") for arm in arms]
    assert cells.kinds(loras, teacher=models["teacher"], recovered=models["recovered"]) == {
        "base@1": "base", "recovered@1": "recovered", "teacher@1": "teacher",
    }  # fmt: skip


def test_an_arm_that_needs_the_recovered_model_is_no_rival_of_it(models, lora, tmp_path):
    lora("chalk", "guidance@3.5")
    lora("chalk", "distilled", teacher="recovered")
    lora("chalk", "adapter@1", training_adapter="recovered")
    lora("chalk", "of another", teacher="base")
    loras = cells.find_loras([str(tmp_path / "lora/*")], models["base"])
    assert cells.kinds(loras, teacher=models["teacher"], recovered=models["recovered"]) == {
        "guidance@3.5": "base", "distilled": "recovered", "adapter@1": "recovered", "of another": "base",
    }  # fmt: skip


def test_what_cannot_be_compared_is_refused(models, lora, tmp_path):
    for patterns, message in (
        ([str(tmp_path / "nowhere/*")], "matches no folder. Give the output folders of stages.lora"),
        ([lora("chalk", "x", kind="evaluation").uri], "is a evaluation, not a LoRA. Leave it out"),
        ([lora("chalk", "y", apply_to="teacher").uri], f"is to be applied to {models['teacher']}, not to {models['base']}."),
        ([lora("chalk", "z").uri, lora("chalk", "z", "recovered").uri], "holds arm z of style chalk more than once."),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            cells.find_loras(patterns, models["base"])


def test_a_tuned_lora_is_applied_at_its_strength_and_has_its_style_from_what_it_was_made_of(models, lora, tmp_path):
    lora("chalk", "x@1")
    config = LoraLike(str(tmp_path / "lora/tuned"))
    contract = lora("chalk", "y@1").inference | {"arm": "x@1 tuned", "data": {"name": "chalk"}}
    assert run_folder.acquire(config.out, "tune", config, {"teacher": models["recovered"]}) is None
    parents = {"teacher": models["recovered"]}
    record.write(config.out, "tune", "lora", config, parents, step=1, metrics={}, inference=contract | {"suggested_strength": 0.8})
    loras = {one.inference["arm"]: one for one in cells.find_loras([str(tmp_path / "lora/*")], models["base"])}
    assert {arm: cells.strength(one) for arm, one in loras.items()} == {"x@1": 1.0, "y@1": 1.0, "x@1 tuned": 0.8}
    assert list(cells.by_style(list(loras.values()))) == ["chalk"]
    kinds = cells.kinds(list(loras.values()), teacher=models["teacher"], recovered=models["recovered"])
    assert kinds == {"x@1": "base", "y@1": "base", "x@1 tuned": "recovered"}
    for bad in (0, -1, True, "1", float("nan"), 1e9, None):
        record.write(config.out, "tune", "lora", config, parents, step=1, metrics={}, inference=contract | {"suggested_strength": bad})
        with pytest.raises(ConfigError, match=r"lora/tuned suggests the strength .*, which cannot work"):
            cells.find_loras([config.out], models["base"])
