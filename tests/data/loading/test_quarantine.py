import json
from pathlib import Path

import pytest

from data import ledger
from data.loading.quarantine import Fault, Quarantine
from dev2pro.errors import DataError
from tests.synthetic import snapshot


def fault(shard: int, row: int, reason: str = "its pixels cannot be decoded") -> Fault:
    return Fault(f"/nowhere/{shard:06d}.tar", f"{shard:064x}", f"{row:04d}.png", row, 512 * row, reason, 7, 3)


def test_every_sample_is_noted_once_across_restarts(tmp_path):
    path = f"{tmp_path}/quarantine.jsonl"
    pins = snapshot([1000, 1000])
    first = Quarantine(pins, path)
    first.add([fault(0, 1), fault(0, 2), fault(0, 1)])
    first.add([fault(0, 2)])
    again = Quarantine(pins, path)
    again.add([fault(0, 1), fault(1, 1)])
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [(line["shard"][-5], line["key"], line["offset"], line["step"], line["slot"]) for line in lines] == [
        ("0", "0001.png", 512, 7, 3), ("0", "0002.png", 1024, 7, 3), ("1", "0001.png", 512, 7, 3),
    ]  # fmt: skip
    assert len(again) == 3
    assert ledger.quarantined([path]) == {(f"{0:064x}", 1), (f"{0:064x}", 2), (f"{1:064x}", 1)}  # what the next snapshot leaves out


@pytest.mark.parametrize(
    ("sizes", "bad", "stops"),
    [
        ([1000], 50, False), ([1000], 51, True), ([100], 10, False), ([100], 11, True), ([5], 1, False), ([5], 2, True),
        ([100_000], 100, False), ([100_000], 101, True),
    ],
)  # fmt: skip
def test_so_many_and_no_more(sizes, bad, stops):
    quarantine = Quarantine(snapshot(sizes))
    faults = [fault(0, row, "torn" if row % 3 else "its pixels cannot be decoded") for row in range(bad)]
    if not stops:
        quarantine.add(faults)
        return
    with pytest.raises(DataError) as caught:
        quarantine.add(faults)
    message = str(caught.value)
    assert f"{bad} of {sizes[0]} samples" in message
    assert "times: torn" in message or bad == 2
    assert "data.snapshot --without" in message


def test_a_bad_shard_is_named_and_bad_pictures_here_and_there_are_counted_together():
    quarantine = Quarantine(snapshot([1000] * 60))
    with pytest.raises(DataError, match=r"51 of 1000 samples of /nowhere/000007\.tar"):
        quarantine.add([fault(7, row) for row in range(51)])
    spread = Quarantine(snapshot([1000] * 60))
    spread.add([fault(shard, 0) for shard in range(60)])
    with pytest.raises(DataError, match="61 of 60000 samples of the data set"):
        spread.add([fault(0, 1)])


def test_a_restart_counts_what_was_noted_before(tmp_path):
    path, pins = f"{tmp_path}/quarantine.jsonl", snapshot([1000])
    Quarantine(pins, path).add([fault(0, row) for row in range(50)])
    with pytest.raises(DataError):
        Quarantine(pins, path).add([fault(0, 50)])


def test_a_file_cut_off_by_a_kill_is_read_to_its_last_whole_line(tmp_path):
    path, pins = tmp_path / "quarantine.jsonl", snapshot([1000])
    Quarantine(pins, str(path)).add([fault(0, 1), fault(0, 2)])
    path.write_bytes(path.read_bytes()[:-20])
    again = Quarantine(pins, str(path))
    again.add([fault(0, 1), fault(0, 2)])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["0001.png", "0002.png"]
