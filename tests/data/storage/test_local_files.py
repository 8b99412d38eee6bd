"""Local files: reads while files change, and atomic writes."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.storage import transport
from data.storage.http import ChangedError
from data.storage.transport import Transport, write_atomic
from dev2pro.errors import DataError, SpaceError
from tests.servers import impatient, in_child


def test_what_is_not_there_or_no_file_is_told_at_once(tmp_path):
    used, file = Transport(impatient()), tmp_path / "file"
    file.touch()
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (
        ("none", "does not exist"),
        ("file/x", "does not exist"),
        ("", "is a folder"),
        ("pipe", "device or pipe"),
        ("x" * 300, "too long"),
    ):
        for ask in (used.info, lambda path: used.read(path, 0, 1)):
            with pytest.raises(DataError, match=expected):
                ask(str(tmp_path / name))


def test_a_file_that_may_not_be_read_is_told_at_once(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)

    def work() -> None:
        if not os.geteuid():  # root may read everything
            tmp_path.chmod(0o755)
            os.chdir(tmp_path)
            os.seteuid(65534)
        for path, ask in (
            ("secret", lambda path: Transport(impatient()).read(path, 0, 1)),
            ("new", lambda path: Transport(impatient()).write(path, b"")),
        ):
            with pytest.raises(DataError, match=f"{path} may not be read or written"):
                ask(path)

    tmp_path.chmod(0o555)
    assert in_child(work) == 0
    tmp_path.chmod(0o755)


def test_a_file_shorter_than_it_was_is_another_one(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    used = Transport(impatient())
    assert used.read(str(tmp_path / "file"), 4, 6) == b"456789"
    with pytest.raises(ChangedError, match="it ends before byte 11"):
        used.read(str(tmp_path / "file"), 4, 7)


def test_a_file_that_took_the_place_of_another_is_read_anew(tmp_path):
    path, used = str(tmp_path / "file"), Transport(impatient())
    for content in (b"old", b"new", b"other"):
        used.write(path, content)
        assert used.read_all(path, 10) == content


def test_open_files_are_few_and_never_closed_under_a_reader(tmp_path):
    for number in range(600):
        (tmp_path / str(number)).write_bytes(bytes([number % 256]) * 1000)
    used, most, before = Transport(impatient()), [0], len(os.listdir("/proc/self/fd"))

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for turn in range(1000):
            number = draw.randrange(600)
            assert used.read(str(tmp_path / str(number)), 10, 20) == bytes([number % 256]) * 20
            if turn % 20 == 0:
                most.append(len(os.listdir("/proc/self/fd")))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert max(most) <= before + 256 + 8 + 8


WRITER = """
import sys
from data.storage.transport import write_atomic
while True:
    for letter in (b"a", b"b"):
        write_atomic(sys.argv[1], letter * 3_000_000)
        print("x", flush=True)
"""


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    root, file = str(pathlib.Path(transport.__file__).parents[2]), tmp_path / "file"
    for turn in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], cwd=root, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.004 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        content = file.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    write_atomic(str(tmp_path / "file"), b"old")
    with pytest.raises(TypeError):
        write_atomic(str(tmp_path / "file"), "text")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_threads_may_write_the_same_file(tmp_path):
    path = str(tmp_path / "file")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_atomic(path, bytes([number]) * 300_000), range(64)))
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 300_000
    assert len(set(content)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_moved_within_a_disk_and_to_another(tmp_path, small_disk):
    for target in (tmp_path / "new" / "folder" / "file", small_disk / "folder" / "file"):
        for content in (b"first", b"second"):
            (tmp_path / "made").write_bytes(content)
            Transport(impatient()).move(str(tmp_path / "made"), str(target))
            assert target.read_bytes() == content
            assert [one.name for one in target.parent.iterdir()] == ["file"]
            assert not (tmp_path / "made").exists()


def test_a_file_that_cannot_be_moved_stays(tmp_path, small_disk):
    (tmp_path / "made").write_bytes(bytes(2 << 20))
    with pytest.raises(SpaceError, match="no room is left"):
        Transport(impatient()).move(str(tmp_path / "made"), str(small_disk / "file"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be used"):
        Transport(impatient()).move(str(tmp_path / "made"), str(tmp_path / "folder"))
    assert (tmp_path / "made").stat().st_size == 2 << 20
    assert not list(small_disk.iterdir())


def test_a_full_disk_is_told_as_such(small_disk):
    with pytest.raises(SpaceError, match="no room is left"):
        Transport(impatient()).write(str(small_disk / "file"), bytes(2 << 20))
    assert not list(small_disk.iterdir())
