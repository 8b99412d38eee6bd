import math
from pathlib import Path

import hypothesis
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from flows import plan
from flows.plan import Arm, Name, Plan

NASTY = [
    "", " ", "a b", "a,b", "a=b", "'", '"', "it's", 'say "x"', "[1,2]", "{a:b}", "(x)", "~a", "+a", "#", "%", "@", "*", "a\tb", "a\nb", "ä", "日本",
    "\\", "\\\\", "\\'", "a\\", "a\\b", "C:\\models\\flux", "a\\\\'", "glob(*)", "choice(a,b)", "-", ".", "..", "/",
    "${oc.env:HOME}", "${seed}", "$", "\\${seed}", "\\\\${seed}", "'${seed}'", "${", "${seed}\\",
    "null", "Null", "true", "True", "FALSE", "on", "yes", "1", "007", "1.0", ".5", "1e3", "1_000", "-1", "0x10", "inf", "nan",
]  # fmt: skip
texts = st.one_of(st.sampled_from(NASTY), st.text(alphabet="ab01._/-',=\"\\${}[]()~+:# \te", max_size=12), st.text(max_size=12))


def parsed(args: list[str]) -> dict[str, object]:
    """What Hydra's own parser reads."""
    return {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(args)}


def composed(**values: object) -> dict[str, object]:
    """The values a stage gets: the arguments through Hydra and OmegaConf."""
    ConfigStore.instance().store(name="test_plan", node={"seed": 5, "text": "", "some": [], "number": 0.0, "flag": False})
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return OmegaConf.to_container(compose("test_plan", overrides=plan.hydra_args(values)), resolve=True)


# ---- args: no value is read as anything but itself ---------------------------------------------------------------------------------------


@given(text=texts.filter(lambda text: "${" not in text))  # OmegaConf interpolates those, see below
def test_a_string_is_read_back_by_hydra_s_parser(text):
    values = parsed(plan.hydra_args({"data.name": text}))
    assert {key: str(value) for key, value in values.items()} == {"data.name": text}
    assert isinstance(values["data.name"], str)


@given(some=st.lists(texts.filter(lambda text: "${" not in text), max_size=4))
def test_a_list_of_strings_is_read_back(some):
    values = parsed(plan.hydra_args({"loras": some}))["loras"]
    assert [str(value) for value in values] == some
    assert all(isinstance(value, str) for value in values)


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_a_string_reaches_the_stage_as_it_is(text):
    config = composed(text=text, some=[text, "b"])
    assert config["text"] == text
    assert config["some"] == [text, "b"]


@hypothesis.settings(max_examples=30)
@given(text=st.text(alphabet="${}\\'a", max_size=8))
def test_no_string_is_an_interpolation(text):
    assert composed(text=text)["text"] == text


@given(st.one_of(st.integers(-(10**18), 10**18), st.floats(allow_nan=False), st.booleans(), st.none()))
@example(1e-7)
@example(1e22)
@example(-0.0)
@example(math.inf)
def test_numbers_and_constants_are_read_back(value):
    parsed_value = parsed(plan.hydra_args({"optim.lr": value}))["optim.lr"]
    assert parsed_value == value
    assert type(parsed_value) is type(value)


def test_numbers_reach_the_stage():
    config = composed(number=1e-07, flag=True, text=None)
    assert (config["number"], config["flag"], config["text"]) == (1e-07, True, None)


def test_what_comes_later_wins():
    common, specific = {"steps": 1, "seed": 0, "data.name": "ink"}, {"steps": 2}
    assert plan.hydra_args(common, specific, seed=7) == ["steps=2", "seed=7", "data.name=ink"]
    assert common == {"steps": 1, "seed": 0, "data.name": "ink"}
    assert plan.hydra_args() == []


def test_plain_words_stay_readable():
    assert plan.hydra_args(out="runs/demo/lora", trained_on="data/miniature/pipeline", steps=3) == [
        "out=runs/demo/lora",
        "trained_on=data/miniature/pipeline",
        "steps=3",
    ]


# ---- names -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recovered@1", "base@3.5", "a", "A-1_b.c+d", "0"])
def test_names(name):
    assert TypeAdapter(Name).validate_python(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a/../b", "/etc", "a\\b", "-x", ".hidden", "a b", "a\n", "~", "a'", "${x}", "x" * 65, "ä"]
)
def test_names_that_could_lead_out_of_a_folder(name):
    with pytest.raises(ValidationError):
        TypeAdapter(Name).validate_python(name)
    arm = {"base": "recovered", "guidance": 1.0}
    for styles, arms in (({name: {}}, {"a": arm}), ({"s": {}}, {name: arm})):
        with pytest.raises(ValidationError):
            Plan.model_validate({"base": "x", "styles": styles, "arms": arms})


def test_folders_are_below_the_run_s():
    assert plan.stage_folder("runs/demo", "lora", "chalk", "recovered@1") == "runs/demo/lora/chalk/recovered@1"


# ---- plans -------------------------------------------------------------------------------------------------------------------------------


def make_plan(**values: object) -> Plan:
    arms = {"base@1": {"base": "base", "guidance": 1.0}, "recovered@1": {"base": "recovered", "guidance": 1.0}}
    return Plan.model_validate({"base": "model", "styles": {"chalk": {}, "neon": {}}, "arms": arms} | values)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty conf/pipeline."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    return tmp_path / "conf" / "pipeline"


def test_every_style_with_every_arm_and_the_recovered_ones_last():
    arms = {
        "recovered@1": {"base": "recovered", "guidance": 1.0},
        "base@3.5": {"base": "base", "guidance": 3.5},
        "recovered@2": {"base": "recovered", "guidance": 1.0},
        "empty": {"base": "base", "guidance": 3.5, "teacher": "recovered", "lora": {"loss.name": "guidance"}},
        "teacher@1": {"base": "teacher", "guidance": 1.0},
    }
    assert make_plan(arms=arms, teacher="ideal").pairs() == [
        *[("chalk", "base@3.5"), ("neon", "base@3.5"), ("chalk", "teacher@1"), ("neon", "teacher@1")],
        *[
            ("chalk", "recovered@1"),
            ("neon", "recovered@1"),
            ("chalk", "recovered@2"),
            ("neon", "recovered@2"),
            ("chalk", "empty"),
            ("neon", "empty"),
        ],
    ]


def test_a_distilled_arm_comes_after_its_teacher_s_and_begins_from_it(monkeypatch):
    from flows import pipeline

    started = []
    monkeypatch.setattr(pipeline, "launch", lambda stage, args, out, ranks: started.append(args))
    arms = {
        "redistilled": {"base": "base", "guidance": 3.5, "teacher": "recovered", "teacher_arm": "recovered@1", "lora": {"loss.name": "distillation"}},
        "recovered@1": {"base": "recovered", "guidance": 1.0},
    }
    plan = make_plan(arms=arms)
    assert plan.pairs() == [("chalk", "recovered@1"), ("neon", "recovered@1"), ("chalk", "redistilled"), ("neon", "redistilled")]
    pipeline.lora.fn(plan, 0, "runs/x", "neon", "redistilled", "an artifact", "another")
    theirs = "runs/x/lora/neon/recovered@1"
    assert {"loss.teacher=runs/x/recover", f"loss.teacher_lora='{theirs}'", f"start='{theirs}'", "trained_on=model"} <= set(started[0])


def test_an_arm_with_a_training_adapter_waits_for_it_and_is_given_it(monkeypatch):
    from flows import pipeline

    started = []
    monkeypatch.setattr(pipeline, "launch", lambda stage, args, out, ranks=1: started.append((stage, args, out)))
    plan = make_plan(arms={"adapter@1": {"base": "base", "guidance": 1.0, "adapter": 16}, "plain": {"base": "base", "guidance": 1.0}})
    assert plan.adapters == [16]
    assert plan.pairs()[-1] == ("neon", "adapter@1"), "it needs the recovered model"
    pipeline.extract.fn(plan, 0, "runs/x", 16, "an artifact")
    pipeline.lora.fn(plan, 0, "runs/x", "neon", "adapter@1", "an artifact", None, "the adapter")
    pipeline.lora.fn(plan, 0, "runs/x", "neon", "plain", None)
    (stage, words, out), (_, with_it, _), (_, plain, _) = started
    assert (stage, out) == ("extract", "runs/x/adapter/16")
    assert {"rank=16", "recovered=runs/x/recover"} <= set(words)
    assert {"training_adapter=runs/x/adapter/16", "trained_on=model"} <= set(with_it)
    assert not any(word.startswith("training_adapter") for word in plain)


def test_an_arm_s_own_values_and_models_reach_its_stage(monkeypatch):
    from flows import pipeline

    started = []
    monkeypatch.setattr(pipeline, "launch", lambda stage, args, out, ranks: started.append((stage, args, out)))
    own = {"loss.name": "guidance", "loss.guidance_range": [2, 6], "steps": 7}
    arms = {"empty": {"base": "base", "guidance": 3.5, "teacher": "recovered", "lora": own}, "plain": {"base": "base", "guidance": 1.0}}
    plan = make_plan(arms=arms, lora={"steps": 300, "batch": 4})
    for arm in arms:
        pipeline.lora.fn(plan, 0, "runs/x", "chalk", arm, "an artifact")
    (stage, args, out), (_, plain, _) = started
    assert (stage, out) == ("lora", "runs/x/lora/chalk/empty")
    assert {"steps=7", "batch=4", "loss.name=guidance", "loss.guidance_range=[2.0,6.0]", "trained_on=model", "guidance=3.5"} <= set(args)
    assert "loss.teacher=runs/x/recover" in args
    assert "steps=300" in plain
    assert not [word for word in plain if word.startswith("loss.")]


def test_the_plans_of_this_repository_are_right():
    names = [file.stem for file in (ROOT / "conf" / "pipeline").glob("*.yaml")]
    assert "miniature" in names
    for name in names:
        loaded = plan.read(name)
        assert loaded.pairs()
        assert any(arm.base == "recovered" for arm in loaded.arms.values())


def test_a_plan_is_read(home):
    written = {"base": "model", "teacher": "ideal", "common": {"experiment": "x", "steps": 3}, "styles": {"chalk": {"data.name": "chalk"}}}
    (home / "own.yaml").write_text(yaml.safe_dump(written | {"arms": {"teacher@1": {"base": "teacher", "guidance": 1}}}))
    loaded = plan.read("own")
    assert loaded.common == {"experiment": "x", "steps": 3}
    assert loaded.arms == {"teacher@1": Arm(base="teacher", guidance=1.0)}
    assert loaded.processes == {}


@pytest.mark.parametrize("name", ["nothing", "../evaluate", "", "miniature.yaml", "pipeline/own", "own\n"])
def test_a_plan_that_does_not_exist(home, name):
    (home / "own.yaml").write_text("")
    (home.parent / "evaluate.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        plan.read(name)
    assert f"plan={name} is not in conf/pipeline. Choose one of own" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel": 2}, "parallel"),
        ({"processes": {"recover": "many"}}, "processes.recover"),
        ({"processes": {"judge": 2}}, "processes.judge"),
        ({"stlyes": {}}, "stlyes"),
        ({"base": None}, "base"),
        ({"arms": {"a": {"base": "pro", "guidance": 1}}}, "arms.a.base"),
        ({"arms": {"a": {"base": "base", "guidance": 0}}}, "arms.a.guidance"),
        ({"arms": {"a": {"base": "base", "guidance": 1, "loss": "x"}}}, "arms.a.loss"),
        ({"arms": {"a": {"base": "base", "guidance": 1, "teacher": "pro"}}}, "arms.a.teacher"),
        ({"arms": {"a": {"base": "base", "guidance": 1, "teacher": "teacher"}}}, "teacher is not set"),
        ({"arms": {"a": {"base": "base", "guidance": 1, "teacher": "recovered", "teacher_arm": "b"}}}, "arms.a.teacher_arm=b is no arm"),
        ({"arms": {"a": {"base": "recovered", "guidance": 1, "teacher": "recovered", "teacher_arm": "a"}}}, "arms.a.teacher_arm=a is no arm"),
        ({"arms": {"a": {"base": "base", "guidance": 1, "lora": {"loss": {"name": "x"}}}}}, "arms.a.lora.loss"),
        ({"styles": {"../x": {}}}, "../x"),
        ({"common": {"steps": {"nested": 1}}}, "common.steps"),
        ({"arms": {"teacher@1": {"base": "teacher", "guidance": 1}}}, "teacher"),
    ],
)
def test_a_plan_that_is_none(home, change, named):
    arms = {"base@1": {"base": "base", "guidance": 1.0}}
    (home / "own.yaml").write_text(yaml.safe_dump({"base": "model", "styles": {"chalk": {}}, "arms": arms} | change))
    with pytest.raises(ConfigError) as caught:
        plan.read("own")
    assert str(caught.value).startswith("conf/pipeline/own.yaml ")
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n", "base: [\n", "base: model\n"])
def test_a_file_that_is_no_plan(home, text):
    (home / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"conf/pipeline/own\.yaml is no plan"):
        plan.read("own")
