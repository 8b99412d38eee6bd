import argparse
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import commands, index
from data.shards import sidecar
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import ConfigError, TryAgainError
from tests.servers import Server
from tests.shards import DAMAGES, FORMS, ROOT, called, command, indexed, jpeg, pairs, refusal, tar


def options(*shards: str | Path, **others: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"shards": [*map(str, shards)], "to": None, "workers": 2, "captions": "drop", "allow_partial": False, "report": None} | others
    )


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"{i:03d}.tar" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(tar(pairs(i + 1)))
    return paths


def sidecars(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if ".tar." in file.name or file.name.endswith(".index")}


def test_only_a_whole_shard_gets_an_index(tmp_path):
    for name, damage in DAMAGES.items():
        outcome = indexed(tmp_path / "a.tar", damage(tar(pairs()))[0])
        assert (outcome.exit_code, sidecars(tmp_path)) == (3, {}), name
        assert outcome.error.startswith(f"{tmp_path}/a.tar is rejected at byte")
    assert indexed(tmp_path / "a.tar", tar(pairs())).samples == 6
    assert list(sidecars(tmp_path)) == ["a.tar.index"]


def test_what_is_indexed_is_not_read_again_until_it_changes(tmp_path):
    path = tmp_path / "a.tar"
    assert not indexed(path, tar(pairs())).reused
    before = (tmp_path / "a.tar.index").stat()
    again = indexed(path)
    assert (again.reused, again.samples, again.error) == (True, 6, "")
    assert (tmp_path / "a.tar.index").stat() == before
    assert indexed(path, tar(pairs(5))).samples == 5, "another size"
    os.utime(path, ns=(1, 1))
    assert not indexed(path).reused, "another time of change"
    assert indexed(path).reused


def test_another_policy_is_another_index(tmp_path):
    path, content = tmp_path / "a.tar", tar([*pairs(1), ("b.jpg", jpeg(7))])
    assert [one["key"] for one in indexed(path, content, empty_captions=False).rejected] == ["b"]
    for policy, samples in ((True, 2), (False, 1)):
        outcome, again = indexed(path, empty_captions=policy), indexed(path, empty_captions=policy)
        assert (outcome.reused, again.reused, outcome.samples, again.samples) == (False, True, samples, samples)
    assert not indexed(path, empty_captions=False, allow_partial=True).reused


def test_an_index_whose_shard_is_gone_or_damaged_now_is_not_believed(tmp_path):
    path = tmp_path / "a.tar"
    indexed(path, tar(pairs()))
    assert "is rejected at byte" in indexed(path, tar(pairs())[:5000]).error
    path.unlink()
    assert "does not exist" in indexed(path).error


def test_any_number_of_workers_does_the_same(tmp_path, capsys):
    paths = write_shards(tmp_path, 5)
    assert index.work(options(f"{tmp_path}/*.tar", workers=1)) == 0
    one = sidecars(tmp_path)
    for path in paths:
        Path(f"{path}.index").unlink()
    assert index.work(options(f"{tmp_path}/{{000..004}}.tar", paths[0], workers=3)) == 0
    assert sidecars(tmp_path) == one
    assert len(one) == 5
    assert "index: 5 shards with 15 samples (0 were indexed before); rejected are 0 samples and 0 shards" in capsys.readouterr().out


def test_a_folder_of_their_own_tells_shards_of_one_name_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, 1 + (folder == "b"))
    sidecar_folder = str(tmp_path / "deep" / "indexes")
    assert index.work(options(f"{tmp_path}/a/*.tar", f"{tmp_path}/b/*.tar", to=sidecar_folder)) == 0
    assert len(sidecars(tmp_path / "deep")) == 3
    assert sidecars(tmp_path / "a") == {}
    entry = sidecar.read(f"{tmp_path}/b/001.tar", Transport(ReadConfig()), sidecar_folder)
    assert len(entry) == 2
    message = refusal(lambda: sidecar.read(f"{tmp_path}/c.tar", Transport(ReadConfig()), sidecar_folder))
    assert f"`python -m data.index {tmp_path}/c.tar --to {sidecar_folder}`" in message
    capsys.readouterr()


def test_shards_behind_http_are_indexed_into_a_folder(tmp_path, capsys):
    (tmp_path / "served").mkdir()
    write_shards(tmp_path / "served", 2)
    with Server(tmp_path / "served") as server:
        message = refusal(lambda: index.work(options(f"{server.url}/{{000..001}}.tar")), ConfigError)
        assert server.requests == [], "told before gigabytes were read"
        assert f"{server.url}/000.tar" in message
        assert "--to FOLDER" in message
        assert index.work(options(f"{server.url}/{{000..001}}.tar", to=str(tmp_path / "to"))) == 0
        assert index.work(options(f"{server.url}/{{000..002}}.tar", to=str(tmp_path / "to"))) == 3
    captured = capsys.readouterr()
    assert "2 shards with 3 samples (2 were indexed before); rejected are 0 samples and 1 shards" in captured.out
    assert f"index: {server.url}/002.tar cannot be had (HTTP status 404)" in captured.err


def test_a_folder_is_no_shard(tmp_path):
    message = refusal(lambda: index.work(options(tmp_path)), ConfigError)
    assert message.startswith(f"{tmp_path} is a folder. Name the tars in it, as in '{tmp_path}/*.tar', or")
    assert f"`python -m data.pack {tmp_path} OUT`" in message


def test_a_network_that_is_away_is_another_exit_code_than_bad_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(index, "ReadConfig", lambda: ReadConfig(retries=0))
    with Server(tmp_path) as server:
        pass
    assert index.work(options(f"{server.url}/000.tar", to=str(tmp_path))) == 75
    assert "could not be read in 1 tries" in capsys.readouterr().err


def test_rejected_samples_and_members_of_no_use_are_told(tmp_path, capsys):
    members = [*pairs(2), ("b.jpg", jpeg(7)), ("c.jpg", b"8BPS"), ("c.txt", b"x"), ("d.cls", b"1"), ("e.cls", b"1"), ("readme", b"x")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert index.work(options(tmp_path / "a.tar")) == 0
    captured = capsys.readouterr().out.splitlines()
    assert captured[0] == "rejected samples: 2"
    assert re.fullmatch(rf"{tmp_path}/a.tar\t\d+\tb\tit has no caption", captured[1])
    assert re.fullmatch(rf"{tmp_path}/a.tar\t\d+\tc\tit is no readable picture \(JPEG, PNG, WEBP, .*\)", captured[2])
    assert captured[3] == "index: 3 members are of no use here: 2 .cls, 1 without a key"
    assert captured[4] == "index: 1 shards with 2 samples (0 were indexed before); rejected are 2 samples and 0 shards"


# ---- as a command --------------------------------------------------------------------------------------------------------------------


def test_programs_are_told_what_became_of_the_shards(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([*pairs(2), ("b.jpg", jpeg(7))]))
    (tmp_path / "cut.tar").write_bytes(tar(pairs())[:5000])
    assert called(index.main, f"{tmp_path}/*.tar", "--workers", "1", "--report", tmp_path / "report.json")[0] == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["shards"], report["samples"]) == (2, 2)
    assert [(one["shard"], one["key"], one["reason"]) for one in report["rejected"]] == [(f"{tmp_path}/a.tar", "b", "it has no caption")]
    assert [one["shard"] for one in report["unusable"]] == [f"{tmp_path}/cut.tar"]
    assert f"{tmp_path}/cut.tar is rejected at byte" in report["unusable"][0]["reason"]


def test_the_command_and_its_exit_codes(tmp_path):
    write_shards(tmp_path, 2)
    good = command("data.index", f"{tmp_path}/*.tar")
    assert (good.returncode, good.stderr) == (0, "")
    (tmp_path / "bad.tar").write_bytes(tar(pairs())[:5000])
    bad = command("data.index", f"{tmp_path}/*.tar")
    assert bad.returncode == 3
    assert "2 shards with 3 samples (2 were indexed before); rejected are 0 samples and 1 shards" in bad.stdout
    assert re.fullmatch(rf"index: {tmp_path}/bad.tar is rejected at byte \d+: .*of which the file holds.*--allow-partial .*\n", bad.stderr)
    code, stdout, _ = called(index.main, tmp_path / "bad.tar", "--allow-partial", "--workers", "1")
    assert code == 0
    assert "1 shards with 1 samples" in stdout
    assert re.search(rf"index: {tmp_path}/bad.tar is used only up to its damage at byte \d+: '0001.jpg' has", stdout)
    code, _, stderr = called(index.main, f"{tmp_path}/{{000..003}}.tar")
    assert code == 3
    assert f"nothing matches {tmp_path}/002.tar, one of {tmp_path}/{{000..003}}.tar. Correct the path" in stderr
    code, _, stderr = called(index.main, tmp_path / "bad.tar", "--workers", "0")
    assert code == 2
    assert "--workers: invalid positive value: '0'" in stderr


def test_nothing_in_a_shard_reaches_the_terminal_as_it_is(tmp_path):
    hostile = "\x1b[31m[bold]:smile:\x1b]0;owned\x07\u202e"
    (tmp_path / "a.tar").write_bytes(tar([(f"{hostile}.txt", b"x"), (f"b.{hostile}", b"x")], FORMS["pax"]))
    (tmp_path / f"{hostile}.tar").write_bytes(b"\x1b[32m" * 200)
    terminal, end = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "data.index", f"{tmp_path}/*.tar"], cwd=ROOT, stdout=end, stderr=end, env=os.environ | {"COLUMNS": "400"}
    )
    os.close(end)
    output = b""
    try:
        while part := os.read(terminal, 1 << 16):
            output += part
    except OSError:  # how a terminal ends
        pass
    assert child.wait() == 3
    os.close(terminal)
    text = output.decode()
    assert "\\x1b[31m[bold]:smile:\\x1b]0;owned\\x07\\u202e" in text
    assert "the file begins with b'\\x1b[32m" in text
    for bad in ("\x1b[31m[", "\x1b[32m\x1b[32m", "\x1b]0", "\x07", "\u202e", "😄"):
        assert bad not in text


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def begin_a_long_one(folder: Path, done: int) -> tuple[subprocess.Popen, list[int]]:
    """Starts a command that indexes many shards and waits for `done` of them. Returns it and its workers."""
    content = tar([(f"{i:04d}.{end}", one) for i in range(300) for end, one in (("jpg", jpeg()), ("txt", b"x"))])
    for number in range(16):
        (folder / f"{number:03d}.tar").write_bytes(content)
    child = subprocess.Popen(
        [sys.executable, "-m", "data.index", f"{folder}/*.tar", "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(list(folder.glob("*.index"))) < done:
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    return child, children(child.pid)


def gone(pids: list[int]) -> bool:
    """Whether the processes end within seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_killed_in_the_middle_it_leaves_whole_indexes_only_and_goes_on(tmp_path):
    child, workers = begin_a_long_one(tmp_path, 3)
    child.kill()
    child.communicate()
    assert len(workers) == 2
    assert gone(workers)
    indexes = list(tmp_path.glob("*.index"))
    assert 3 <= len(indexes) < 16
    assert all(len(sidecar.read(str(file).removesuffix(".index"), Transport(ReadConfig()))) == 300 for file in indexes)
    after = command("data.index", f"{tmp_path}/*.tar")
    assert after.returncode == 0
    assert f"16 shards with 4,800 samples ({len(indexes)} were indexed before)" in after.stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_interrupted_it_ends_at_once_and_says_so(tmp_path, how):
    child, workers = begin_a_long_one(tmp_path, 1)
    child.send_signal(how)
    _, stderr = child.communicate(timeout=300)
    assert stderr == "index: interrupted. Nothing is half done; run the same command again.\n"
    assert child.returncode == 130
    assert gone(workers)
    assert len(list(tmp_path.glob("*.index"))) < 16


def test_it_ends_with_the_flow_that_started_it(tmp_path):
    (tmp_path / "slow.tar").write_bytes(tar(pairs(40)))
    with Server(tmp_path, faults=lambda *_: "stall middle") as server:
        child = [sys.executable, "-m", "data.index", f"{server.url}/slow.tar", "--to", str(tmp_path)]
        flow = f"import os, subprocess; subprocess.run({child}, env=os.environ | {{'DEV2PRO_EVENTS': '1'}})"
        parent = subprocess.Popen([sys.executable, "-c", flow], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert parent.stderr is not None
        while not server.requests:
            time.sleep(0.01)
        parent.kill()
        assert "index: interrupted" in parent.stderr.read()  # which comes to an end with the last process that holds it
        parent.wait()


def test_a_worker_that_is_killed_is_no_crash():
    def work() -> None:
        with commands.processes(1) as pool:
            pool.submit(signal.raise_signal, signal.SIGKILL).result()

    assert "fewer --workers" in refusal(work, TryAgainError)


FULL = """
from data import commands

def work(_):
    with open("/dev/full", "w") as file:
        file.write("x")

commands.run("index", commands.make_parser("x", ""), work)
"""


def test_a_full_disk_has_its_own_exit_code():
    done = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr == "index: a file: No space left on device. Make room and run the same command again.\n"
