"""Words of a command as people type them: a path is itself, whatever its name holds."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from dev2pro import command_line
from dev2pro.errors import ConfigError


@dataclass
class Data:
    """A group."""

    name: str
    train: list[str]


@dataclass
class Schema:
    """A stage's configuration."""

    out: str
    data: Data
    steps: int
    guidance: list[float]
    publish: str | None = None


NAMES = [
    "a=b (1)",
    "c#",
    "shots [2020]",
    "a{1,2}",
    "what?",
    "x, y",
    "日本 #1",
    "it's",
    "$HOME",
    "{}",
    "2020",
    "1e3",
    "~x",
    "null ",
    "a\\b",
    "[x]",
    "true",
]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """The current folder, with a folder of every name."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).mkdir()
    return tmp_path


def value(word: str):
    """What Hydra reads of a word."""
    return OverridesParser.create().parse_override(command_line.read([word], Schema)[0]).value()


@pytest.mark.parametrize("name", NAMES)
def test_what_exists_is_itself(name):
    assert value(f"out={name}") == name
    assert value(f"data.train={name}") == [name]
    assert value(f"data.train=[{name}]") == [name]
    assert value(f"data.train=[{name}, s3://b/{{0..2}}.tar]") == [name, "s3://b/{0..2}.tar"]
    assert value(f"data.train={command_line.quoted(name)}") == [name]


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("out=new (1)", "new (1)"), ("out=a,b", "a,b"), ("data.name=1e3", "1e3"), ("data.name=1_000", "1_000"), ("data.name=007", "007"),
        ("data.name=true", "true"), ("publish=null", None), ("publish='null'", "null"), ("data.train=2020,c#", ["2020", "c#"]),
        ("data.train=s/{000..009}.tar", ["s/{000..009}.tar"]), ("data.train=[s/{a,b}.tar,t[0,1].tar]", ["s/{a,b}.tar", "t[0,1].tar"]),
        ("data.train=new, one", ["new, one"]), ("data.train=['p, q', r]", ["p, q", "r"]), ("data.train=[]", []), ("data.train={a:b}", {"a": "b"}),
        ("steps=1e3", 1000.0), ("guidance=[2,6]", [2, 6]), ("+data.train=c#", ["c#"]), ("data.train=[a\\,b]", ["a,b"]), ("out=", ""),
    ],
)  # fmt: skip
def test_words(word, read):
    assert value(word) == read


@pytest.mark.parametrize("word", ["--cfg", "job", "~publish", "data.train=['a b','c']", "data.train=[plain]", "unknown=a (b)", "steps=(x"])
def test_what_hydra_reads_well_and_what_is_no_text_is_left_to_it(word):
    assert command_line.read([word], Schema) == [word]


def test_what_can_be_read_in_two_ways_is_refused_with_both_words(places):
    for name in ("x", "y"):
        (places / name).mkdir()
    with pytest.raises(ConfigError) as error:
        command_line.read(["data.train=[x, y]"], Schema)
    for reading in (["x, y"], ["x", "y"]):
        word = f"data.train=[{','.join(map(command_line.quoted, reading))}]"
        assert shlex.quote(word) in str(error.value)
        assert value(word) == reading


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12))
def test_a_quoted_text_is_read_back(text):
    if "${" not in text:
        assert value(f"data.train=[{command_line.quoted(text)}]") == [text]
        assert value(f"data.name={command_line.quoted(text)}") == text


def test_what_hydra_cannot_read_is_shown_quoted():
    assert command_line.cure(["data.train=[/pics/a", "b,", "c]"], Schema) == " If [/pics/a b, c] is what it names, type 'data.train=[/pics/a b, c]'."
    told = command_line.cure(["out=/x/${HOME}"], Schema)
    (word,) = shlex.split(told.partition(", type ")[2].rstrip("."))
    assert word == r"out='/x/\${HOME}'"
    assert command_line.cure(["steps=(x", "out=a"], Schema) == ""


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("out=a=b (1),c#", ["a=b (1)", "c#"]),
        ("out=x, y", ["x, y"]),  # a folder of that name
        ("out=x, y,2020", ["x, y", "2020"]),
        ("out='p, q',r", ["p, q", "r"]),
        ("out='p, q'", ["p, q"]),
        ("publish=choice(p,s)", ["p", "s"]),
        ("publish=null,s", [None, "s"]),
        ("data.train=[c#],[it's,x, y]", [["c#"], ["it's", "x, y"]]),
        ("data.train=c#,it's", [["c#", "it's"]]),
        ("steps=1,2", [1, 2]),
    ],
)
def test_a_sweep_goes_through_what_commas_part(word, values):
    [read] = command_line.read([word], Schema, sweep=True)
    override = OverridesParser.create().parse_override(read)
    found = override.sweep_iterator() if override.is_sweep_override() else [override._value]
    assert [override._convert_value(value) for value in found] == values
