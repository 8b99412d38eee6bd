"""Escaped text has no control characters for a terminal, and in markdown it is plain text."""

import logging
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import DataError
from dev2pro.escape import JOINERS, LONGEST, Record, lines, markdown, printable

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![](http://tracker.example/x.png)", "[click](javascript:alert(1))", "`a` **b**",
    "| a | b |", "\x1b]0;owned\x07\x1b[2J\x1b[31m", "ok\rFAILED", "a\nevaluate: done, forged", "\x9b31m", "\u202etxt.exe", "&lt;script&gt;", "# head",
    "<https://evil.example>", "<!channel>", "- item", "1. item", "~~gone~~", "\\<b>", "[x]: http://evil.example",
]  # fmt: skip
ANYTHING = st.one_of(st.text(), st.text(alphabet="\\`*_{}[]()<>#+-.!|~$&:/@\n\t\x1b\x9b\u202e ab"), st.sampled_from(HOSTILE))
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def obeyed(text: str) -> list[str]:
    """Characters that are no letter, mark, number, punctuation, symbol or space."""
    return [c for c in text if unicodedata.category(c) != "Zs" and not c.isprintable() and c not in JOINERS]


@given(ANYTHING)
def test_a_line_has_nothing_that_a_terminal_obeys(text):
    assert not obeyed(printable(text))
    assert not obeyed(lines(text).replace("\n", "").replace("\t", ""))
    assert lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "text",
    [
        "a cat, 3/4 view",
        "手書き\u3000三",
        "ein Füllhorn",
        "trois\xa0chats\u202f!",
        "кошка",
        "قطة",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "🐈 é",
        "👩\u200d🚀",
    ],
)
def test_ordinary_text_is_as_it_was(text):
    assert printable(text) == lines(text) == text


@given(ANYTHING)
def test_no_line_passes_for_another_message(text):
    first, *more = lines(text).split("\n")
    assert first == printable(first.replace("\t", "")) or "\t" in first
    assert all(not line or line[0].isspace() for line in more)
    assert lines(lines(text)) == lines(text)


def test_an_error_is_safe_wherever_it_comes_out():
    text = str(DataError("a\x1b[2J\u202e is broken:\nlora: done, forged\n  an item of ours"))
    assert text == "a\\x1b[2J\\u202e is broken:\n  lora: done, forged\n  an item of ours"
    assert str(DataError("an ordinary one: 手書き. Mend it.")) == "an ordinary one: 手書き. Mend it."


def test_a_library_s_log_record_is_safe():
    log_record = Record("x", logging.WARNING, "f", 1, "a model of type `%s`, %d", ("clip\x1b[2J\nforged", 3), None)
    assert log_record.getMessage() == "a model of type `clip\\x1b[2J\n  forged`, 3"


@given(ANYTHING)
def test_markdown_is_text_alone(text):
    """In a heading, a list and a cell of a table: the only tokens are those of the page itself."""
    escaped = markdown(text)
    for page, expected in (
        (f"## {escaped}", {"heading_open", "heading_close"}),
        (f"- {escaped}", {"bullet_list_open", "list_item_open", "paragraph_open", "paragraph_close", "list_item_close", "bullet_list_close"}),
        (f"| a | b |\n|---|---|\n| {escaped} | end |", None),
    ):
        tokens = PARSER.parse(page)
        inside = [child for token in tokens for child in token.children or []]
        assert {token.type for token in inside} <= {"text", "text_special"}, page
        if expected:
            assert {token.type for token in tokens} - {"inline"} <= expected, page
        else:
            assert [token.type for token in tokens].count("td_open") == 2
            assert [token.content for token in tokens if token.type == "inline"][-1] == "end"


@given(ANYTHING)
def test_markdown_shows_the_text_itself(text):
    rendered = "".join(child.content for token in PARSER.parse(f"x{markdown(text)}") for child in token.children or [])
    assert rendered == "x" + re.sub(r"\s+$", "", printable(" ".join(text.split()))[:LONGEST])


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_a_terminal_obeys_nothing_in_an_error(run_stage, tmp_path):
    code, stderr = run_stage("lora", "experiment=miniature", f"out={tmp_path}/out", f"trained_on='{tmp_path}/{ESCAPES}'", "arm=x", "data.name=chalk")
    assert code == 2
    assert "\\x1b[2J" in stderr
    assert stderr.rstrip("\n").replace("\n", "").isprintable()


def test_a_terminal_obeys_nothing_in_a_traceback():
    code = f"import sys; from stages import frame\ndef work(): raise RuntimeError({ESCAPES!r})\nsys.exit(frame._exit_code('x', work))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RuntimeError: \\x1b]0;owned" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def test_a_terminal_obeys_nothing_that_a_library_logs():
    code = f"import logging, sys; from stages import frame\ndef work(): logging.getLogger('library').warning({ESCAPES!r}); raise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", f"{code}\nframe._exit_code('x', work)"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "\\x1b]0;owned" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("args", [["dev2pro.artifacts", "show"], ["data.index"], ["data.pack"], ["data.snapshot", "--out=x"]])
def test_a_terminal_obeys_nothing_in_an_error_of_a_command(args, tmp_path):
    strange = tmp_path / f"a{ESCAPES}\nforged: done"
    strange.mkdir()
    (strange / "artifact.json").write_text('{"schema": "\\u001b[2J"}')
    last = [tmp_path / "out"] if args[0] == "data.pack" else []
    result = subprocess.run([sys.executable, "-m", *args, strange, *last], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (2, 3)
    assert "\\x1b]0;owned" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()
    assert all(line.startswith("  ") for line in result.stderr.splitlines()[1:])


def test_a_terminal_obeys_nothing_in_what_no_command_foresaw(tmp_path):
    code = f"from data import commands\ndef work(_): raise RuntimeError({ESCAPES!r})\ncommands.run('x', commands.make_parser('x', ''), work)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RuntimeError: \\x1b]0;owned" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()
