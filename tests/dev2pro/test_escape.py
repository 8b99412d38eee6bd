"""What is made safe to show has no character left that a terminal obeys, and in markdown is text and nothing else."""

import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dev2pro.artifact import ROOT
from dev2pro.escape import LONGEST, lines, markdown, printable

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![](http://tracker.example/x.png)", "[click](javascript:alert(1))", "`a` **b**",
    "| a | b |", "\x1b]0;owned\x07\x1b[2J\x1b[31m", "ok\rFAILED", "a\nevaluate: done, forged", "\x9b31m", "\u202etxt.exe", "&lt;script&gt;", "# head",
    "<https://evil.example>", "<!channel>", "- item", "1. item", "~~gone~~", "\\<b>", "[x]: http://evil.example",
]  # fmt: skip
ANYTHING = st.one_of(st.text(), st.text(alphabet="\\`*_{}[]()<>#+-.!|~$&:/@\n\t\x1b\x9b\u202e ab"), st.sampled_from(HOSTILE))
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def obeyed(text: str) -> list[str]:
    """Characters that are no letter, mark, number, punctuation, symbol or space."""
    return [c for c in text if unicodedata.category(c) not in ("Zs",) and not c.isprintable()]


@given(ANYTHING)
def test_a_line_has_nothing_that_a_terminal_obeys(text):
    assert printable(text).isprintable()
    assert not obeyed(lines(text).replace("\n", "").replace("\t", ""))
    assert lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["a cat, 3/4 view", "手書きの三", "ein Füllhorn", "кошка", "قطة", "🐈 é"])
def test_ordinary_text_is_as_it_was(text):
    assert printable(text) == lines(text) == text


@given(ANYTHING)
def test_markdown_is_text_alone(text):
    """In a heading, a list and a cell of a table: the only tokens are those of the page itself."""
    said = markdown(text)
    for page, own in (
        (f"## {said}", {"heading_open", "heading_close"}),
        (f"- {said}", {"bullet_list_open", "list_item_open", "paragraph_open", "paragraph_close", "list_item_close", "bullet_list_close"}),
        (f"| a | b |\n|---|---|\n| {said} | end |", None),
    ):
        tokens = PARSER.parse(page)
        inside = [child for token in tokens for child in token.children or []]
        assert {token.type for token in inside} <= {"text", "text_special"}, page
        if own:
            assert {token.type for token in tokens} - {"inline"} <= own, page
        else:
            assert [token.type for token in tokens].count("td_open") == 2
            assert [token.content for token in tokens if token.type == "inline"][-1] == "end"


@given(ANYTHING)
def test_markdown_shows_the_text_itself(text):
    shown = "".join(child.content for token in PARSER.parse(f"x{markdown(text)}") for child in token.children or [])
    assert shown == "x" + re.sub(r"\s+$", "", printable(" ".join(text.split()))[:LONGEST])


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_a_terminal_obeys_nothing_in_an_error(run_stage, tmp_path):
    code, said = run_stage("lora", "experiment=miniature", f"out={tmp_path}/out", f"trained_on='{tmp_path}/{ESCAPES}'", "arm=x", "data.name=chalk")
    assert code == 2
    assert "\\x1b[2J" in said
    assert said.rstrip("\n").replace("\n", "").isprintable()


def test_a_terminal_obeys_nothing_in_a_traceback():
    code = f"import sys; from dev2pro import stage\ndef work(): raise RuntimeError({ESCAPES!r})\nsys.exit(stage._guarded('x', work))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "RuntimeError: \\x1b]0;owned" in said.stderr
    assert said.stderr.replace("\n", "").isprintable()
