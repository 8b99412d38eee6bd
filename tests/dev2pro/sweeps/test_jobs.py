"""Which jobs a command has, and the names of their folders."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dev2pro.errors import ConfigError
from dev2pro.sweeps import jobs

VALUES = st.dictionaries(st.sampled_from(["optim.lr", "arm", "trained_on", "+x"]), st.text(max_size=150), min_size=1)


def test_every_combination_in_order_and_one_spelling_of_a_number():
    planned = jobs.plan(["experiment=miniature", "optim.lr=1e-3,0.005", "adapter.rank=4,16", "out=runs/sweep", "hydra.run.dir=."])
    assert [job.name for job in planned] == [f"adapter.rank={rank},optim.lr={lr}" for lr in ("0.001", "0.005") for rank in (4, 16)]
    assert planned[1].values == {"optim.lr": "0.001", "adapter.rank": "16"}
    assert planned[1].words == ["experiment=miniature", "optim.lr=0.001", "adapter.rank=16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "none has them. Give some, such as seed=1,2"),
        (["seed=1,2", "out=a,b"], "out= cannot be swept"),
        (["optim.lr=1e-3,0.001"], "The sweep has optim.lr=0.001 more than once"),
        (["hardware=glob(gpu*)"], "Write the values out, such as hardware=a,b"),
    ],
)
def test_what_is_no_sweep_is_refused(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        jobs.plan(words)


@given(VALUES)
def test_a_name_is_one_folder_whatever_the_values_are(values):
    name = jobs.folder_name(values)
    assert re.fullmatch(r"[\w.,=+@-]+", name, re.ASCII)
    assert len(name) <= jobs.LONGEST
    assert not name.startswith((".", "-"))


@given(VALUES, VALUES)
def test_no_two_combinations_share_a_folder(one, other):
    assert (jobs.folder_name(one) == jobs.folder_name(other)) == (one == other)


def test_names_that_are_alike_once_cleaned_or_cut_stay_apart():
    paths = ["a/b", "a_b", "a b", "../../a", "x" * 300, "x" * 301]
    assert jobs.folder_name({"a": "1,b=2", "b": "3"}) != jobs.folder_name({"a": "1", "b": "2,b=3"})
    names = [jobs.folder_name({"trained_on": path}) for path in paths]
    assert len(set(names)) == len(paths)
    assert names[1] == "trained_on=a_b"
    assert re.fullmatch(r"trained_on=a_b-[0-9a-f]{12}", names[0])
    assert all("/" not in name for name in names)


@pytest.mark.parametrize("word", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_every_way_to_ask_for_a_sweep(word):
    assert jobs.is_flag(word)
    assert not any(map(jobs.is_flag, ["seed=1,2", "-c", "--cfg", "--", "out=-m", "~seed"]))
