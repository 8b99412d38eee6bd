import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import ledger
from dev2pro.artifacts.record import ROOT
from tests.shards import refusal


def test_a_run_of_an_epoch_consumes_its_shards_and_a_shorter_one_does_not(tmp_path):
    book = str(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.consumed(book) == set()
    ledger.record(book, "one", "snap", ["a", "b"], 1.0)
    ledger.record(book, "two", "snap", ["c"], 0.99)
    ledger.record(book, "three", "snap", ["b", "d"], 2.5)
    assert ledger.consumed(book) == {"a", "b", "d"}
    lines = [json.loads(line) for line in Path(book).read_text().splitlines()]
    assert [(line["run"], line["snapshot"], line["epochs"], line["shards"]) for line in lines] == [
        ("one", "snap", 1.0, ["a", "b"]), ("two", "snap", 0.99, []), ("three", "snap", 2.5, ["b", "d"])
    ]  # fmt: skip
    assert all(line["finished"].endswith("Z") for line in lines)


def test_a_run_is_noted_once(tmp_path):
    book = tmp_path / "ledger.jsonl"
    ledger.record(str(book), "one", "snap", ["a"], 1)
    before = book.read_bytes()
    ledger.record(str(book), "one", "snap", ["a", "b"], 2)
    assert book.read_bytes() == before


RECORD_MANY = """
import sys
from data import ledger
from dev2pro.artifacts.record import ROOT
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 12):
    ledger.record(sys.argv[1], f"run {number}", "snap", [f"shard {number}"], 1)
"""


def test_processes_that_write_at_one_time_lose_nothing(tmp_path):
    book = str(tmp_path / "ledger.jsonl")
    several = [subprocess.Popen([sys.executable, "-c", RECORD_MANY, book, str(first)], cwd=ROOT, stderr=subprocess.PIPE) for first in (0, 6, 12)]
    for one in several:
        stderr = one.communicate()[1]
        assert one.returncode == 0, stderr.decode()
    lines = [json.loads(line) for line in Path(book).read_text().splitlines()]
    assert sorted(line["run"] for line in lines) == sorted(f"run {number}" for number in range(24))
    assert ledger.consumed(book) == {f"shard {number}" for number in range(24)}


GOOD = b'{"run": "one", "shards": ["a"]}\n'
HOSTILE = [
    b"no json", b"{}", b"[]", b"3", b"null", b'"run"', b'{"run": 1, "shards": []}', b'{"run": "x", "shards": "abc"}', b'{"run": "x", "shards": [3]}',
    b'{"run": "x", "shards": {"a": 1}}', b'{"run": "x"', b"", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"run": "\x1b[31m"}',
]  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: repr(line)[:30])
def test_a_hostile_line_is_named_and_nothing_is_overwritten(tmp_path, line):
    book = tmp_path / "ledger.jsonl"
    book.write_bytes(GOOD + line + b"\n")
    for work in (lambda: ledger.consumed(str(book)), lambda: ledger.record(str(book), "two", "snap", [], 1)):
        message = refusal(work)
        assert message.startswith(f"{book} is damaged in line ")
        assert "Correct the path, or take the line out" in message
        assert line == b"\xff" or "in line 2 (" in message
    assert book.read_bytes() == GOOD + line + b"\n"


def test_a_ledger_that_is_a_folder(tmp_path):
    assert f"{tmp_path} cannot be read: Is a directory" in refusal(lambda: ledger.consumed(str(tmp_path)))


FAULT = {"shard": "/a.tar", "shard_sha256": "abc", "key": "x", "key_number": 2**64 - 1, "offset": 3, "reason": "r", "step": 1, "slot": 2}


def test_quarantine_files_name_samples(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(json.dumps(FAULT) + "\n" + json.dumps({**FAULT, "step": 9}) + "\n")
    two.write_text(json.dumps({**FAULT, "key_number": 0}) + "\n")
    assert ledger.quarantined([str(one), str(two)]) == {("abc", 2**64 - 1), ("abc", 0)}
    assert ledger.quarantined([]) == frozenset()
    assert "none.jsonl cannot be read: No such file" in refusal(lambda: ledger.quarantined([f"{tmp_path}/none.jsonl"]))


@pytest.mark.parametrize("change", [{"key_number": -1}, {"key_number": 2**64}, {"key_number": "5"}, {"key_number": 1.5}, {"shard_sha256": 3}])
def test_a_quarantine_file_that_is_none(tmp_path, change):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(FAULT) + "\n" + json.dumps(FAULT | change) + "\n")
    assert f"{file} is damaged in line 2 (ValueError: not what a run writes)" in refusal(lambda: ledger.quarantined([str(file)]))
