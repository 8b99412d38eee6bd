"""The plan of a pipeline run: reads and checks conf/pipeline/<name>.yaml, and builds the arguments of each stage's command."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from dev2pro import command_line
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}$"  # no slash, so it cannot leave its folder
Name = Annotated[str, StringConstraints(pattern=NAME)]
CONSTANTS = ("null", "true", "false", "nan", "inf")  # Hydra does not read these as strings
Overrides = dict[str, str | int | float | bool | list[str] | list[float] | None]
Model = Literal["base", "recovered", "teacher"]


class Arm(BaseModel):
    """One way of training a LoRA."""

    model_config = ConfigDict(extra="forbid")
    base: Model  # what it is trained on
    guidance: float = Field(gt=0)
    teacher: Model | None = None  # of the loss
    teacher_arm: Name | None = None  # whose LoRA, of the same style, the teacher has and this one begins from
    adapter: int | None = Field(default=None, ge=1)  # rank of the training adapter that is extracted from the recovered model
    lora: Overrides = {}  # what stages.lora is given for this arm besides, such as {loss.name: guidance}

    @property
    def models(self) -> set[str | None]:
        """The models that it reads."""
        return {self.base, self.teacher, "recovered" if self.adapter else None}


class Plan(BaseModel):
    """Which stages run with which values; see conf/pipeline/miniature.yaml."""

    model_config = ConfigDict(extra="forbid")
    base: str
    teacher: str | None = None
    common: Overrides = {}
    recover: Overrides = {}
    lora: Overrides = {}
    evaluate: Overrides = {}
    styles: dict[Name, Overrides]
    arms: dict[Name, Arm]
    processes: dict[Literal["recover", "lora", "evaluate"], int] = {}  # ranks of a stage, where more than one

    @property
    def adapters(self) -> list[int]:
        """The ranks of all training adapters."""
        return sorted({arm.adapter for arm in self.arms.values() if arm.adapter})

    def pairs(self) -> list[tuple[str, str]]:
        """(style, arm) of every LoRA; those that need the recovered model come after the others, and those that need its LoRAs last."""
        arms = sorted(self.arms.items(), key=lambda item: ("recovered" in item[1].models, item[1].teacher_arm is not None))
        return [(style, name) for name, _ in arms for style in self.styles]

    def lora_values(self, style: str, arm: str, out: str) -> dict[str, Any]:
        """What stages.lora is given for one LoRA of a run whose folder is `out`."""
        chosen = self.arms[arm]
        models = {"base": self.base, "teacher": self.teacher, "recovered": stage_folder(out, "recover")}
        values = {"out": stage_folder(out, "lora", style, arm), "arm": arm, "trained_on": models[chosen.base], "guidance": chosen.guidance}
        values |= {"loss.teacher": models[chosen.teacher]} if chosen.teacher else {}
        values |= {"training_adapter": stage_folder(out, "adapter", str(chosen.adapter))} if chosen.adapter else {}
        values |= dict.fromkeys(("start", "loss.teacher_lora"), stage_folder(out, "lora", style, chosen.teacher_arm)) if chosen.teacher_arm else {}
        return {**self.lora, **self.styles[style], **chosen.lora, **values}

    @model_validator(mode="after")
    def _teachers_exist(self) -> "Plan":
        for name, arm in self.arms.items():
            if self.teacher is None and "teacher" in arm.models:
                raise ValueError(f"arms.{name} needs the teacher, and teacher is not set")
            if arm.teacher_arm and ((other := self.arms.get(arm.teacher_arm)) is None or other.teacher_arm or other.base != arm.teacher):
                raise ValueError(f"arms.{name}.teacher_arm={arm.teacher_arm} is no arm that is trained on {arm.teacher} alone")
        return self


def read(name: str) -> Plan:
    """The plan with this name. Raises ConfigError for a missing or invalid one."""
    plans = ROOT / "conf" / "pipeline"
    path = plans / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path.is_file():
        names = ", ".join(sorted(p.stem for p in plans.glob("*.yaml")))
        raise ConfigError(f"plan={name} is not in conf/pipeline. Choose one of {names}, or write {name}.yaml there.")
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.relative_to(ROOT)} is no plan: {error}") from error
    return plan


def hydra_args(*overrides: Mapping[str, Any], **values: Any) -> list[str]:
    """Hydra override arguments from values; later ones win. Strings are quoted, so that no value is parsed as syntax."""
    merged = {key: value for mapping in (*overrides, values) for key, value in mapping.items()}
    return [f"{key}={_quoted(value)}" for key, value in merged.items()]


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) or value.lower() in CONSTANTS):
        return command_line.quoted(value)
    return str(value)


def stage_folder(out: str, *parts: str) -> str:
    """A stage's output folder below the run's folder."""
    return str(Path(out, *parts))
