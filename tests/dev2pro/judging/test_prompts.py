"""Prompt files as people have them: which groups they make, what is told, and what is refused where."""

import json
import re

import pytest

from dev2pro.errors import ConfigError
from dev2pro.judging.prompts import read_prompts

TWO = [["a five"], ["a seven"]]
KOHYA = "a seven --n blurry --w 512 --h 512 --d 1 --l 3.5 --s 30"

READ: dict[str, tuple[str, bytes | str, list[list[str]]]] = {
    "lines": ("a.txt", "a five\n\n  \na seven", TWO),
    "spaces as they are": ("a.txt", " a five \na seven\t\n", [[" a five "], ["a seven\t"]]),
    "a byte order mark": ("a.txt", b"\xef\xbb\xbfa five\r\na seven", TWO),
    "UTF-16, little end first": ("a.txt", "\ufeffa five\r\na seven".encode("utf-16-le"), TWO),
    "UTF-16, big end first": ("a.txt", "\ufeffa five\na seven".encode("utf-16-be"), TWO),
    "UTF-32": ("a.txt", "\ufeffa five\na seven".encode("utf-32-le"), TWO),
    "old Macs": ("a.txt", b"a five\ra seven\r", TWO),
    "capitals": ("A.TXT", "a five\na seven", TWO),
    "no ending": ("prompts", "a five\na seven", TWO),
    "brackets that are no JSON": ("a.txt", "[five] a five\n{seven}", [["[five] a five"], ["{seven}"]]),
    "dashes that are no option": ("a.txt", "a five -- drawn\na semi--colon\n---", [["a five -- drawn"], ["a semi--colon"], ["---"]]),
    "other scripts": ("a.txt", "数字の五\n七 🖊️", [["数字の五"], ["七 🖊️"]]),
    "a list": ("a.json", '["a five", "a seven"]', TWO),
    "a list in capitals": ("A.JSON", '["a five", "a seven"]', TWO),
    "a list with a mark": ("a.json", b'\xef\xbb\xbf["a five", "a seven"]', TWO),
    "wordings": ("a.json", '["a cat", ["a dog", "one dog"]]', [["a cat"], ["a dog", "one dog"]]),
    "a hash in JSON": ("a.json", '["#5", "a seven"]', [["#5"], ["a seven"]]),
    "lines within a prompt in JSON": ("a.json", '["a five\\nin ink", "a seven"]', [["a five\nin ink"], ["a seven"]]),
    "objects": ("a.json", '[{"prompt": "a five"}, {"prompt": "a seven"}]', TWO),
    "objects of text": ("a.json", '[{"text": "a five"}, {"caption": ["a seven", "one seven"]}]', [["a five"], ["a seven", "one seven"]]),
    "objects with labels": ("a.json", '[{"id": 1, "prompt": "a five", "category": "x"}, "a seven"]', TWO),
    "names": ("a.json", '{"x": "a five", "y": ["a seven", "one seven"]}', [["a five"], ["a seven", "one seven"]]),
    "names of objects": ("a.json", '{"x": {"prompt": "a five"}, "y": {"prompt": "a seven"}}', TWO),
    "prompts in an object": ("a.json", '{"prompts": ["a five", {"text": "a seven"}], "name": "mine"}', TWO),
    "JSON Lines": ("a.jsonl", '{"prompt": "a five"}\n\n"a seven"\r\n["a one", "one"]', [*TWO, ["a one", "one"]]),
    "JSON Lines in capitals": ("a.JSONL", '{"text": "a five"}\n{"text": "a seven"}\n', TWO),
    "wordings that differ in capitals": ("a.json", '[["a five", "A five"], "a seven"]', [["a five", "A five"], ["a seven"]]),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case, tmp_path):
    name, content, groups = READ[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_prompts(str(tmp_path / name)) == groups


REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "options": ("a.txt", f"a five\n{KOHYA}", "line 2 holds the option --n, which would be sampled as words"),
    "prompts in an object in an object": ("a.json", '{"prompts": {"prompts": ["a five"]}}', "Here it holds 1."),
    "one option": ("a.txt", "a five --s 30\na seven", "line 1 holds the option --s"),
    "a size": ("a.txt", "a five\n\na seven --ar 16:9", "line 3 holds the option --ar"),
    "an option alone": ("a.txt", "a five\n--w=512", "line 2 holds the option --w"),
    "options in JSON": ("a.json", json.dumps(["a five", KOHYA]), "entry 2 holds the option --n"),
    "options as keys": ("a.json", '[{"prompt": "a five", "width": 512}, "a seven"]', "entry 1 holds 'width' beside its prompt"),
    "a negative prompt": ("a.jsonl", '{"prompt": "a five", "negative_prompt": "x"}\n"a seven"', "line 1 holds 'negative_prompt' beside"),
    "settings of all": ("a.json", '{"prompts": ["a five", "a seven"], "steps": 3}', "the file holds 'steps' beside its prompt"),
    "a LoRA": ("a.txt", "a five\n<lora:chalk:1> a seven", "line 2 holds <lora:...>"),
    "numbers": ("a.json", '["a five", 7]', "entry 2 is a number where a prompt should be"),
    "truth": ("a.json", '["a five", true]', "entry 2 is true or false"),
    "null": ("a.json", '["a five", null]', "entry 2 is null"),
    "a list in a list in a list": ("a.json", '["a five", [["a seven"]]]', "entry 2 is a list in a list"),
    "an object in wordings": ("a.json", '["a five", [{"prompt": "a seven"}]]', "entry 2 is an object in a list of wordings"),
    "an object of numbers": ("a.json", '{"x": "a five", "y": 7}', "entry 'y' is a number"),
    "an object of other keys": ("a.json", '[{"title": "a five"}, "a seven"]', "entry 1 is an object with none of prompt, text, caption"),
    "two keys": ("a.json", '[{"prompt": "a five", "caption": "5"}, "a seven"]', "entry 1 is an object with prompt and caption"),
    "a name twice": ("a.json", '{"x": "a five", "x": "a seven"}', "holds the name 'x' twice in one object"),
    "an empty list": ("a.json", "[]", "Here it holds none"),
    "an empty object": ("a.json", "{}", "Here it holds none"),
    "an empty group": ("a.json", '["a five", []]', "entry 2 is empty"),
    "an empty prompt": ("a.json", '["a five", ["a seven", " "]]', "entry 2 is empty"),
    "a string": ("a.json", '"a five"', "it holds 1."),
    "one": ("a.txt", "a five\n# a seven", "Here it holds 1."),
    "one object": ("a.json", '{"prompt": "a five"}', "Here it holds 1."),
    "nothing": ("a.txt", "", "Here it holds none"),
    "no JSON": ("a.json", '["a five"', "the file is no JSON"),
    "no JSON in a line": ("a.jsonl", '"a five"\na seven', "line 2 is no JSON"),
    "deep": ("a.json", "[" * 100_000, "the file is no JSON"),
    "twice": ("a.txt", "a five\na seven\na five", "'a five' is in line 1 and in line 3"),
    "twice in other capitals": ("a.txt", "a five\nA  Five ", "'A  Five ' in line 2 differs from line 1 only in spaces or capitals"),
    "twice among wordings": ("a.json", '[["a five", "a five"], "a seven"]', "'a five' is in entry 1 and in entry 1"),
    "NUL": ("a.txt", b"a five\na se\0ven", "line 2 holds the control character U+0000"),
    "escape": ("a.txt", "a five\n\x1b[31ma seven", "line 2 holds the control character U+001B"),
    "form feed": ("a.txt", "a five\x0ca seven\na one", "line 1 holds the control character U+000C"),
    "a control character in JSON": ("a.json", '["a five", "a\\u0007"]', "entry 2 holds the control character U+0007"),
    "a line separator": ("a.txt", "a five\u2028a seven\na one", "line 1 holds the control character U+2028"),
    "a mark inside": ("a.txt", "a five\n\ufeffa seven", "line 2 holds the control character U+FEFF, a byte order mark inside"),
    "a lost character": ("a.txt", "a five\na caf\ufffd", "U+FFFD, the mark of a character that was lost"),
    "half a character": ("a.json", '["a five", "a \\ud83d"]', "entry 2 holds half of a surrogate pair"),
    "Latin-1": ("a.txt", "a five\na café".encode("latin-1"), "byte 0xe9 in line 2 is no UTF-8; it may be Windows-1252 or Latin-1"),
    "half of UTF-16": ("a.txt", b"\xff\xfea", "in line 1 is no UTF-16"),
    "UTF-16 without a mark": ("a.txt", "a five\na seven".encode("utf-16-le"), "as UTF-16 without a byte order mark does"),
    "JSON under another name": ("a.txt", '["a five",\n"a seven"]', "line 1 is JSON"),
    "JSON Lines under another name": ("a.txt", 'a five\n{"prompt": "a seven"}', "line 2 is JSON"),
    "a table": ("a.csv", "prompt\na five\na seven", ".csv files are not read"),
    "YAML": ("A.YAML", "- a five\n- a seven", ".yaml files are not read"),
    "a huge file": ("a.txt", "a" * (17 << 20), "bytes, and every prompt is sampled"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_prompts(str(tmp_path / name))
    assert str(caught.value).startswith(f"prompts={tmp_path / name} ")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_what_is_no_file(tmp_path):
    for path, message in ((tmp_path, "it is a folder"), (tmp_path / "gone.txt", "there is no such file"), (f"{tmp_path}/a\0b", "prompts=")):
        with pytest.raises(ConfigError, match=message):
            read_prompts(str(path))


def test_what_is_left_out_is_told(tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("# digits\na five\n  #a six\na (seven:1.3)\n#\n#\n")
    assert read_prompts(str(file)) == [["a five"], ["a (seven:1.3)"]]
    told = capsys.readouterr().err
    assert f"prompts={file}: line 1, line 3, line 5 and 1 more left out: a line that begins with # is a comment." in told
    assert "the weights in brackets of line 4 are read as the characters they are" in told
    named = tmp_path / "a.json"
    named.write_text('{"x": "a five", "y": "a seven"}')
    assert read_prompts(str(named)) == TWO
    assert "the 2 names of its object are not sampled" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    read_prompts(str(file))
    assert capsys.readouterr().err == "", "one rank tells it for all"
