"""Forms: consistent with the stages' configurations, and closed to all other values."""

import dataclasses
import importlib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonschema
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ValidationError

from dev2pro.artifacts.record import ROOT
from flows import plan, roots, single
from flows.concepts import concepts
from flows.forms import Concepts, Diagnose, Distill, Evaluate, Lora, Pipeline, Recover, Recurring, Tune, overrides
from flows.pipeline import pipeline
from flows.recurring import recurring

STAGES = {Recover: "recover", Lora: "lora", Evaluate: "evaluate", Tune: "tune", Diagnose: "diagnose", Distill: "distill"}
FLOWS = {
    Pipeline: pipeline, Recover: single.recover, Lora: single.lora, Evaluate: single.evaluate, Diagnose: single.diagnose,
    Tune: single.tune, Distill: single.distill, Concepts: concepts, Recurring: recurring,
}  # fmt: skip
GROUPS = ("experiment", "model", "hardware")  # of conf/


def fields(form: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Dotted key -> field, of a form and the groups in it."""
    by_key: dict[str, Any] = {}
    for name, field in form.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            by_key |= fields(kind, f"{above}{name}.")
        else:
            by_key[above + name] = field
    return by_key


def plain(kind: Any) -> Any:
    """The type below annotations, without None: int, list[str], ...; of a choice that of what can be chosen."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return plain(next(one for one in get_args(kind) if one is not type(None)))
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0])
    if get_origin(kind) is list:
        return list[plain(get_args(kind)[0])]  # type: ignore[misc]
    return kind


def configured(stage: str, key: str) -> Any:
    """The type of a key in the stage's dataclass."""
    kind = getattr(importlib.import_module(f"stages.{stage}"), f"{stage.title()}Config")
    for name in key.split("."):
        kind = get_type_hints(plain(kind))[name]
    return plain(kind)


@pytest.mark.parametrize("form", STAGES)
def test_every_field_is_one_of_the_stage_s_configuration_and_of_its_type(form):
    for key, field in fields(form).items():
        if key not in (*GROUPS, "processes"):
            assert plain(field.annotation) == configured(STAGES[form], key), key


@pytest.mark.parametrize("form", FLOWS)
def test_every_field_has_a_title_and_help_and_can_be_left_as_it_is(form):
    for key, field in fields(form).items():
        assert field.title, key
        assert len(field.description or "") > 3, key
    assert form() is not None


def test_what_can_be_chosen_is_what_conf_holds():
    for group in GROUPS:
        assert set(get_args(plain_choice(Recover.model_fields[group].annotation))) == {f.stem for f in (ROOT / "conf" / group).glob("*.yaml")}


def plain_choice(kind: Any) -> Any:
    return kind if get_origin(kind) is Literal else next(one for one in get_args(kind) if get_origin(one) is Literal)


FILLED: dict[type, dict[str, Any]] = {
    Recover: {
        "steps": 7,
        "batch": 3,
        "ema": 0.5,
        "data": {"train": ["runs/a*.tar"], "resolution": 64},
        "optim": {"lr": 1e-7},
        "checkpoint": {"keep": 9},
    },
    Lora: {
        "trained_on": "data/miniature/pipeline",
        "adapter": {"rank": 2, "targets": "all"},
        "loss": {"name": "model_guidance", "teacher": "runs/recovered", "teacher_lora": "runs/lora"},
        "start": "runs/lora",
        "probe": {"every": 4},
        "checkpoint": {"loras": 50},
        "publish": "runs/store",
    },
    Evaluate: {"loras": ["runs/a b/*"], "recovered": "runs/x", "prompts": "runs/p.txt", "seeds": 2},
    Tune: {"lora": "runs/a b", "strengths": [0.5, 1.5], "guidances": [2.0], "prompts": "runs/p.txt", "seeds": 2},
    Diagnose: {"data": {"heldout": ["runs/held out"]}, "loras": ["runs/x"], "outside": ["runs/y"], "teacher": "data/miniature/teacher"},
    Distill: {"teacher": "data/miniature/teacher", "model": "miniature", "hardware": "cpu"},
}


@pytest.mark.parametrize("form", FILLED)
def test_what_was_filled_in_reaches_the_stage(form):
    from stages import frame

    name = STAGES[form]
    schema = getattr(importlib.import_module(f"stages.{name}"), f"{name.title()}Config")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    values = overrides(form(**FILLED[form]))
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = frame.typed(schema, compose(name, overrides=plan.hydra_args(values)))
    for key, value in values.items():
        if key not in GROUPS:
            actual: Any = config
            for part in key.split("."):
                actual = getattr(actual, part)
            assert actual == value, key
    assert dataclasses.is_dataclass(config)


def test_what_was_left_empty_is_as_conf_has_it():
    assert overrides(Recover()) == {"out": "runs/ui/recover", "experiment": "miniature", "seed": 0}
    assert overrides(Recover(steps=None, data={"name": None})) == overrides(Recover())


# ---- hostile and mistaken input ----

Bad = tuple[type, dict[str, Any], str]
IN_THE_FORM: list[Bad] = [
    (Recover, {"stepz": 5}, "stepz"),
    (Recover, {"_target_": "os.system"}, "_target_"),
    (Recover, {"optim": {"_target_": "os.system"}}, "optim._target_"),
    (Recover, {"data": {"name": "${oc.env:AWS_SECRET_ACCESS_KEY}"}}, "data.name"),
    (Recover, {"data": {"train": ["runs/${oc.env:HOME}"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["_target_"]}}, "data.train.0"),
    (Recover, {"out": "runs/../../etc"}, "out"),
    (Recover, {"out": "/etc/cron.d"}, "out"),
    (Recover, {"out": "runs/a b"}, "out"),
    (Recover, {"out": "runs"}, "out"),
    (Recover, {"data": {"train": ["../other"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["~/pictures"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["a\x1b[2Jb"]}}, "data.train.0"),
    (Recover, {"data": {"train": []}}, "data.train"),
    (Recover, {"data": {"train": "runs/x.tar"}}, "data.train"),
    (Recover, {"steps": 0}, "steps"),
    (Recover, {"steps": "many"}, "steps"),
    (Recover, {"steps": 10**9}, "steps"),
    (Recover, {"optim": {"lr": 5}}, "optim.lr"),
    (Recover, {"hardware": "../../etc"}, "hardware"),
    (Recover, {"hardware": "gpu24,cpu"}, "hardware"),
    (Recover, {"model": "hydra.searchpath=[file:///tmp]"}, "model"),
    (Recover, {"experiment": "--config-dir=/tmp"}, "experiment"),
    (Recover, {"processes": 65}, "processes"),
    (Recover, {"seed": -1}, "seed"),
    (Lora, {"arm": "a;rm -rf ~"}, "arm"),
    (Lora, {"adapter": {"targets": ".*"}}, "adapter.targets"),
    (Tune, {"strengths": [0]}, "strengths.0"),
    (Tune, {"guidances": [200]}, "guidances.0"),
    (Tune, {"strengths": []}, "strengths"),
    (Recover, {"checkpoint": {"loras": 5}}, "checkpoint.loras"),
    (Pipeline, {"plan": "../../etc/passwd"}, "plan"),
    (Pipeline, {"plan": "miniature", "evil": 1}, "evil"),
    (Concepts, {"concepts": [{"name": "a/b"}]}, "concepts.0.name"),
]  # fmt: skip
AT_THE_START: list[Bad] = [  # what JSON schema cannot say
    (Recover, {"data": {"train": ["/etc/passwd"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["http://169.254.169.254/latest/meta-data"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["s3://somebody-else/x.tar"]}}, "data.train.0"),
    (Recover, {"data": {"train": ["pipe:touch pwned"]}}, "data.train.0"),
    (Recover, {"publish": "file:///etc"}, "publish"),
    (Recover, {"optim": {"lr": float("nan")}}, "optim.lr"),
    (Lora, {"trained_on": "/root/.ssh"}, "trained_on"),
    (Evaluate, {"prompts": "/etc/shadow"}, "prompts"),
    (Concepts, {"concepts": [{"name": "a"}, {"name": "a"}]}, "concepts"),
]  # fmt: skip


def names(some: list[Bad]) -> list[str]:
    return [f"{form.__name__} {key} {number}" for number, (form, _, key) in enumerate(some)]


def refused(form: type[BaseModel], values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as error:
        form(**values)
    assert key in {".".join(map(str, one["loc"])) for one in error.value.errors()}


@pytest.mark.parametrize(("form", "values", "key"), IN_THE_FORM, ids=names(IN_THE_FORM))
def test_bad_input_is_refused_in_the_form(form, values, key):
    refused(form, values, key)
    schema = parameter_schema(FLOWS[form]).model_dump_for_openapi()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({next(iter(schema["properties"])): values}, schema)


@pytest.mark.parametrize(("form", "values", "key"), AT_THE_START, ids=names(AT_THE_START))
def test_bad_input_is_refused_when_the_run_starts(form, values, key):
    refused(form, values, key)


def test_a_link_that_leads_outside_is_outside(tmp_path):
    link = ROOT / "runs" / "test-link"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(ValidationError, match="outside"):
            Recover(data={"train": ["runs/test-link/*.tar"]})
        with pytest.raises(ValidationError, match="outside"):
            Recover(out="runs/test-link/out")
    finally:
        link.unlink()


def test_roots_can_be_added(tmp_path, monkeypatch):
    monkeypatch.setenv(roots.ROOTS, f"{tmp_path}, s3://ours/shards")
    for url in (f"{tmp_path}/pictures", "s3://ours/shards/a.tar", "s3://ours/shards/{000..999}.tar", "data/miniature/pipeline"):
        assert Recover(data={"train": [url]}).data.train == [url]
    for url in ("s3://ours/shardsother/a.tar", f"{tmp_path}x/a", "s3://ours/other/a.tar", "https://ours/shards/a.tar"):
        with pytest.raises(ValidationError, match=r"outside of the places that this machine offers.*DEV2PRO_ROOTS"):
            Recover(data={"train": [url]})


def test_aliases_need_no_root():
    for alias in ("latest", "best", "other:latest"):
        assert Lora(trained_on=alias).trained_on == alias


@pytest.mark.parametrize(
    "url", [".env", "./.prefect/password", "runs/../.env", "*/.git/*", "runs/{a,.b}/../.x", f"{ROOT}/.env", "s3://ours/shards/.x"]
)
def test_hidden_files_hold_secrets_and_are_not_read(url, monkeypatch):
    monkeypatch.setenv(roots.ROOTS, "s3://ours/shards")
    with pytest.raises(ValidationError, match=r"hidden|should match pattern"):
        Evaluate(prompts=url)


def test_a_project_in_a_hidden_folder_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv(roots.ROOTS, f"{tmp_path}/.mine")
    assert Evaluate(prompts=f"{tmp_path}/.mine/prompts.txt").prompts
