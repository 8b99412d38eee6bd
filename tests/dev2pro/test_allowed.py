"""Every number of every configuration has a range, the forms have the same, and what is outside is refused in words."""

import importlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dev2pro import allowed
from dev2pro.errors import ConfigError

STAGES = ("recover", "lora", "distill", "encode", "evaluate", "diagnose", "extract", "tune", "draw", "miniature")


def schema(stage: str) -> type:
    return getattr(importlib.import_module(f"stages.{stage}"), f"{stage.title()}Config")


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_range(stage):
    numbers = [key for key, kind in allowed.keys(schema(stage)).items() if kind in (int, float, list[int], list[float])]
    assert "seed" in numbers or stage == "encode"
    assert [key for key in numbers if allowed.range_of(key) is None] == []


def test_every_range_is_that_of_a_number_and_every_path_that_of_a_text():
    kinds = [allowed.keys(schema(stage)) for stage in STAGES]
    ends = {end for keys in kinds for key in keys for end in allowed.ends(key)}
    assert set(allowed.RANGES) <= ends
    texts = {key for keys in kinds for key, kind in keys.items() if kind in (str, list[str])}
    for name in (*allowed.PATHS, *allowed.NAMES):
        assert any(allowed.is_one_of(key, (name,)) for key in texts), name


def test_a_path_s_key_is_the_whole_key():
    assert allowed.is_one_of("data.read.cache", allowed.WRITTEN)
    assert not allowed.is_one_of("x.out", allowed.WRITTEN)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.alpha", 0, "0.001 or more"), ("adapter.alpha", -16, "0.001 or more"), ("adapter.alpha", 1e-30, "0.001 or more"),
        ("adapter.alpha", math.inf, "0.001 to 65,536"), ("adapter.rank", 100_000, "1 to 16,384"), ("optim.lr", 0, "1e-09 or more"),
        ("optim.lr", -1e-4, "1e-09 or more"), ("optim.lr", 1e-300, "1e-09 or more"), ("optim.lr", math.nan, "1e-09 to 1"), ("seed", -1, "0 or more"),
        ("seed", 2**63, "0 to 9,223,372,036,854,775,807"), ("ema", 1.0, "not 1, which would keep the first weights"), ("guidance", -1.0, "0 or more"),
        ("guidance", [2.0, math.inf], "0 to 100"), ("optim.beta2", 1.0, "0 to less than 1"), ("optim.clip", 0.0, "more than 0, up to 1,000,000"),
        ("guard.spike", 1.0, "0, which is off, or more than 1"), ("guard.spike", -1.0, "0, which is off, or more than 1"),
        ("model.max_sequence_length", 513, "1 to 512"), ("data.read.workers", 100_000, "0 to 256"), ("data.read.idle_timeout", 0, "more than 0"),
    ],
)  # fmt: skip
def test_what_cannot_mean_anything_is_refused_with_its_range(key, value, words):
    with pytest.raises(ConfigError) as error:
        allowed.checked(key, value)
    shown = value[-1] if isinstance(value, list) else value
    assert f"{key}={shown} cannot work. Choose " in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("guard.spike", 0.0), ("checkpoint.grace", None), ("seed", 2**63 - 1), ("ema", 0.0), ("guidance", [2, 6])]
)
def test_what_means_something_is_kept(key, value):
    assert allowed.checked(key, value) == value


@given(key=st.sampled_from(sorted(allowed.RANGES)), value=st.one_of(st.floats(), st.integers(-(10**20), 10**20)))
def test_a_form_accepts_only_what_a_stage_accepts(key, value):
    bounds = allowed.RANGES[key].bounds()
    tests = {"ge": lambda b: value >= b, "gt": lambda b: value > b, "le": lambda b: value <= b, "lt": lambda b: value < b}
    accepted = math.isfinite(value) and all(tests[name](bound) for name, bound in bounds.items())
    assert (value in allowed.RANGES[key]) or not accepted


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", ".hidden", "a\0b", "a\nb", "x" * 65, "\udcff"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(ConfigError, match=r"data\.name="):
        allowed.checked("data.name", name)


@pytest.mark.parametrize("name", ["mine", "日本", "a b (1)", "recovered@1"])
def test_a_name(name):
    assert allowed.checked("data.name", name) == name


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert allowed.checked("data.train", ["~/a", "b~"]) == [f"{tmp_path}/a", "b~"]
    assert allowed.checked("adapter.targets", "~/a") == "~/a"  # no path
    with pytest.raises(ConfigError, match="home folder of nobody"):
        allowed.checked("out", "~nobody-here/x")
    (tmp_path / "~").mkdir()
    assert allowed.checked("out", "~") == "~"


@pytest.mark.parametrize(("out", "words"), [("file/x", "cannot be a folder"), ("file", "cannot be a folder"), ("x" * 300, "File name too long")])
def test_a_folder_that_cannot_be_made(out, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=words):
        allowed.checked("out", out)


def test_remote_places_are_left_alone():
    value: Any = ["s3://bucket/{000..999}.tar", "https://host/" + "x" * 300]
    assert allowed.checked("data.train", value) == value
