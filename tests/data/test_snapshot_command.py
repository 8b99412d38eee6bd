"""`python -m data.snapshot`: new shards, unusable shards, refusals."""

import json
import re
import shutil
from pathlib import Path

from data import ledger, snapshot
from data.shards.sidecar import key_number
from data.shards.snapshot import read
from data.storage.transport import ReadConfig, Transport
from tests.shards import called, command, indexed, jpeg, pairs, tar

SAMPLES = [("small", 16, 16), ("high", 30, 90), ("wide", 90, 30), ("good", 64, 48)]


def shard(path: Path, *samples: tuple[str, int, int]) -> str:
    """An indexed tar of (key, width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [one for i, (key, w, h) in enumerate(samples) for one in ((f"{key}.jpg", jpeg(i, w, h)), (f"{key}.txt", b"words"))]
    assert indexed(path, tar(members)).exit_code == 0
    return str(path)


def numbered(folder: Path, count: int = 3) -> list[str]:
    """Shards of 1, 2, 3 ... samples."""
    return [shard(folder / f"{i}.tar", *((f"{i}-{j}", 32, 24) for j in range(i + 1))) for i in range(count)]


def test_recurring_runs_take_what_is_new(tmp_path):
    shards, book, out = numbered(tmp_path, 2), str(tmp_path / "ledger.jsonl"), tmp_path / "january.snapshot"
    first = command("data.snapshot", f"{tmp_path}/*.tar", "--out", out, "--min-side", "8")
    assert (first.returncode, first.stderr) == (0, "")
    january = read(str(out))
    assert first.stdout == f"snapshot: {out} pins 3 samples in 2 shards ({january.id[:12]})\n"
    ledger.record(book, "run 1", january.id, [one.sha256 for one in january.shards], 1.0)
    code, _, stderr = called(snapshot.main, f"{tmp_path}/*.tar", "--out", tmp_path / "b", "--ledger", book, "--only-new")
    assert code == 3
    assert f"There is nothing new: every shard is in {book}, or empty" in stderr
    assert not (tmp_path / "b").exists()
    shards += numbered(tmp_path, 3)[2:]
    new = command("data.snapshot", *shards, "--out", tmp_path / "new", "--ledger", book, "--only-new")
    assert re.search(r"pins 3 samples in 1 shards, 1 of them new \(", new.stdout), new
    _, stdout, _ = called(snapshot.main, *shards, "--out", tmp_path / "weighed", "--ledger", book, "--new-weight", "3")
    assert "pins 6 samples in 3 shards, 1 of them new" in stdout
    assert [one.repeat for one in read(str(tmp_path / "weighed")).shards] == [1, 1, 3]


def test_what_the_command_refuses(tmp_path):
    path = numbered(tmp_path, 1)[0]
    (tmp_path / "there").write_bytes(b"x")
    for code, args, expected in (
        (3, [path, "--out", tmp_path / "there"], f"snapshot: {tmp_path}/there exists, and runs may depend on it. Choose another --out"),
        (2, [path, "--out", tmp_path / "a", "--new-weight", "0"], "--new-weight: invalid positive value: '0'"),
        (2, [path, "--out", tmp_path / "a", "--new-weight", "2"], "snapshot: What is new, only a ledger can tell"),
        (2, [path, "--out", tmp_path / "a", "--only-new"], "snapshot: What is new, only a ledger can tell. Give --ledger FILE"),
        (3, [path, "--out", tmp_path / "a", "--min-side", "99"], "snapshot: There is no sample to pin"),
        (3, [path, "--out", tmp_path / "a", "--min-side", "99", "--ledger", tmp_path / "l", "--only-new"], "snapshot: There is no sample to pin"),
        (3, [path, "--out", tmp_path / "a", "--without", tmp_path / "there"], f"snapshot: {tmp_path}/there is damaged in line 1"),
    ):
        exit_code, out, stderr = called(snapshot.main, *args)
        assert (exit_code, out) == (code, "")
        assert expected in stderr
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "there").read_bytes() == b"x"


def test_quarantine_files_are_left_out(tmp_path):
    path = shard(tmp_path / "a.tar", *SAMPLES)
    line = {"shard_sha256": snapshot.build([path], Transport(ReadConfig())).shards[0].sha256, "key_number": key_number("high"), "reason": "x"}
    (tmp_path / "quarantine.jsonl").write_text(json.dumps(line) + "\n")
    _, stdout, _ = called(snapshot.main, path, "--out", tmp_path / "a.snapshot", "--without", tmp_path / "quarantine.jsonl")
    assert "pins 3 samples" in stdout
    assert key_number("high") not in read(str(tmp_path / "a.snapshot")).columns["key"].tolist()


def test_what_cannot_be_used_is_left_out_and_reported(tmp_path):
    _, one, other = numbered(tmp_path)
    (tmp_path / "cut.tar").write_bytes(tar(pairs())[:5000])
    shutil.copy(one, tmp_path / "copy.tar")
    indexed(tmp_path / "copy.tar")
    Path(other).write_bytes(tar(pairs()))
    args = [f"{tmp_path}/*.tar", f"{tmp_path}/0*", "--out", tmp_path / "a.snapshot", "--skip-unusable", "--report", tmp_path / "report.json"]
    (tmp_path / "0.tar.index").rename(tmp_path / "index")  # or the second pattern matches it as well
    code, stdout, _ = called(snapshot.main, *args)
    assert code == 0
    assert stdout.startswith("left out, as they cannot be used: 4\n")
    report = json.loads((tmp_path / "report.json").read_text())
    why = {"0.tar": "is not indexed", "2.tar": "changed since", "copy.tar": "hold the same bytes", "cut.tar": "is not indexed"}
    reasons = {Path(one["shard"]).name: one["reason"] for one in report["unusable"]}
    assert reasons.keys() == why.keys()
    assert all(why[name] in reason for name, reason in reasons.items()), reasons
    assert {key: report[key] for key in ("shards", "pinned", "samples")} == {"shards": 5, "pinned": 1, "samples": 2}
    assert [Path(one.url).name for one in read(str(tmp_path / "a.snapshot")).shards] == ["1.tar"]


def test_a_shard_that_is_mended_is_there_again(tmp_path):
    good = tar(pairs())
    (tmp_path / "a.tar").write_bytes(good[:5000])
    numbered(tmp_path, 1)
    for content, count in ((good[:5000], 1), (good, 7)):
        indexed(tmp_path / "a.tar", content)
        _, stdout, _ = called(snapshot.main, f"{tmp_path}/*.tar", "--out", tmp_path / f"{count}.snapshot", "--skip-unusable")
        assert f"pins {count} samples" in stdout


def test_the_report_is_written_when_there_is_nothing_new(tmp_path):
    numbered(tmp_path, 2)
    shards = snapshot.build([f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"], Transport(ReadConfig())).shards
    ledger.record(str(tmp_path / "ledger"), "run 1", "", [one.sha256 for one in shards], 1.0)
    args = ["--out", tmp_path / "a", "--ledger", tmp_path / "ledger", "--only-new", "--report", tmp_path / "report.json"]
    assert called(snapshot.main, f"{tmp_path}/*.tar", *args)[0] == 3
    assert json.loads((tmp_path / "report.json").read_text()) == {"shards": 2, "pinned": 0, "samples": 0, "unusable": []}


def test_a_mistake_in_a_place_is_no_shard_to_leave_out(tmp_path):
    for wrong, expected in ((f"{tmp_path}/none*.tar", "nothing matches"), (f"ftp://{tmp_path}/a.tar", "cannot be read: of addresses only")):
        code, _, stderr = called(snapshot.main, wrong, "--out", tmp_path / "a", "--skip-unusable", "--report", tmp_path / "report.json")
        assert code == 3
        assert expected in stderr
    assert not (tmp_path / "report.json").exists()
