"""Captions that are cut off, empty, all the same, or written for another program are counted and named before training."""

from pathlib import Path

import pytest

from data import captions, index, sources
from data.storage.transport import ReadConfig, Transport
from data.tokens import T5Tokens
from dev2pro.errors import ConfigError
from tests.shards import jpeg, tar

PIPELINE = str(Path(__file__).resolve().parents[2] / "data/miniature/pipeline")


@pytest.fixture
def built(tmp_path):
    """A snapshot of a tar with these captions, and how it is read."""

    def make(*texts: bytes, empty: bool = False):
        members = [
            one for i, text in enumerate(texts) for one in ((f"{i:02d}.jpg", jpeg(i)), (f"{i:02d}.{'json' if text[:1] == b'{' else 'txt'}", text))
        ]
        (tmp_path / "a.tar").write_bytes(tar(members))
        read = ReadConfig(workers=0, cache=f"{tmp_path}/cache")
        outcome = index.index(f"{tmp_path}/a.tar", Transport(read), empty_captions=empty)
        assert (outcome.error, outcome.samples) == ("", len(texts))
        return sources.build_snapshot([f"{tmp_path}/a.tar"], "x", Transport(read)), read

    return make


def test_captions_longer_than_the_model_reads(built, tmp_path):
    """Words of the miniature's vocabulary are one token each, and one token ends a caption."""
    texts = [b" ".join([b"handwritten"] * words) for words in (7, 8, 20, 30, 9, 30)] + [b'{"captions": ["zero", "' + b"one " * 40 + b'"]}']
    snapshot, read = built(*texts)
    facts = captions.check(snapshot, read, T5Tokens(PIPELINE, 8))
    assert (facts["unit"], facts["limit"], facts["different"], facts["pictures"]) == ("tokens", 8, 6, 7)
    assert facts["longer"]["count"] == 6
    assert [(bad["length"], bad["name"]) for bad in facts["longer"]["examples"]] == [
        (41, f"{tmp_path}/a.tar/06.jpg"), (31, f"{tmp_path}/a.tar/03.jpg"), (21, f"{tmp_path}/a.tar/02.jpg"),
    ]  # fmt: skip
    assert captions.sentences(facts) == [
        "captions longer than the 8 tokens that the model reads, and cut off there: 6 of 7 (the longest: "
        f"41 in {tmp_path}/a.tar/06.jpg, 31 in {tmp_path}/a.tar/03.jpg, 21 in {tmp_path}/a.tar/02.jpg). "
        "Shorten them, or raise model.max_sequence_length, which is at most 512 for FLUX.1."
    ]
    assert not captions.sentences(captions.check(snapshot, read, T5Tokens(PIPELINE, 41)))
    assert captions.check(snapshot, read)["unit"] == "characters"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a (red:1.3) house", "weights such as (word:1.3)"), ("(a red house:.8)", "weights such as (word:1.3)"),
        ("((masterpiece)), a house", "weights such as (word:1.3)"), ("a [dark] house", "brackets such as [word]"),
        ("a house <lora:detail:0.8>", "tags such as <lora:name:1>"), ("a house <LyCO:x>", "tags such as <lora:name:1>"),
        ("a house BREAK a tree", "BREAK"), ("embedding:bad_hands a house", "embedding:name"), ("a {red|green} house", "choices such as {one|other}"),
    ],
)  # fmt: skip
def test_the_syntax_of_other_programs(built, text, kind):
    snapshot, read = built(b"a house", text.encode())
    facts = captions.check(snapshot, read)
    assert list(facts["literal"]) == [kind]
    (said,) = captions.sentences(facts)
    assert said.startswith(f"captions with {kind}, which this model reads literally: 1 of 2 (")
    assert said.endswith("a.tar/01.jpg).")


@pytest.mark.parametrize("text", ["at (about 10:30) a house", "a house (16:9)", "a coffee break", "a: b", "a < b > c", "(red, 1.3)", "a {house}"])
def test_what_only_looks_like_it(built, text):
    assert not captions.sentences(captions.check(*built(b"another", text.encode())))


def test_one_caption_for_all_and_none(built):
    facts = captions.check(*built(b"a house", b"a house", b"a house"))
    assert captions.sentences(facts) == ['all 3 pictures have the same caption, "a house".']
    facts = captions.check(*built(b"a house", b"", b" \n", empty=True))
    assert captions.sentences(facts) == ["empty captions: 2 of 3."]
    assert not captions.sentences(captions.check(*built(b"a house")))
    assert not captions.sentences(captions.check(*built(b'{"captions": ["a", "b"]}', b'{"captions": ["a", "b"]}')))


def test_beyond_the_bound_the_longest_are_read_and_it_is_said(built):
    texts = [b"x" * length for length in (5, 300, 20, 8, 400)] + [b"(short:1.2)"]
    said = captions.sentences(captions.check(*built(*texts), T5Tokens(PIPELINE, 250), most=2))
    assert said[0].startswith("captions longer than the 250 tokens that the model reads, and cut off there: 2 of 6 (")
    assert said[1:] == ["the 2 longest of 6 different captions were read; `python -m data.report` reads all."]


def test_a_model_without_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"The tokenizer_2 of the model .* cannot be read"):
        T5Tokens(str(tmp_path), 512)(["a house"])
