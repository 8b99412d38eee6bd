"""Verdicts of generations, their aliases, and which files of older ones are kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dev2pro.artifacts import record
from dev2pro.errors import ConfigError
from flows.generations import aliases, history, lifecycle
from flows.processes.launch import StageFailed


@pytest.fixture
def line_folder(tmp_path, monkeypatch) -> Path:
    """The empty folder of a line, and a model."""
    for module in (aliases, lifecycle):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    aliases.line_folder("main").mkdir(parents=True)
    return aliases.line_folder("main")


def started(number: int, **more: Any) -> lifecycle.Generation:
    values = {"words": [], "processes": 1, "tolerance": 0.1, "samples": 9, "shards": 1, "begun": lifecycle.now()}
    return lifecycle.write(lifecycle.Generation("main", number, **values | more))


def config(**more: Any) -> Any:
    """A recover config, reduced to what the held-out loss depends on."""
    values = {
        "out": "",
        "seed": 0,
        "guidance": 1.0,
        "model": {"path": "model"},
        "data": {"resolution": 32},
        "probe": {"samples": 4, "bins": 2, "every": 9},
    }
    return dataclasses.make_dataclass("Config", list(values))(**values | more)


def write_artifact(generation: lifecycle.Generation, before: float, after: float, heldout: str = "5", **more: Any) -> record.Artifact:
    """Writes the artifact that recover makes for a generation."""
    folder = Path(generation.out)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/model.safetensors").write_bytes(b"weights %d" % generation.number)
    (folder / "checkpoint-3").mkdir()
    parents = {"base": "model", "data.heldout": ("heldout.snapshot", heldout * 64)}
    return record.write(
        generation.out,
        "recover",
        "transformer",
        config(**more),
        parents,
        step=3,
        metrics={"curve": [{"step": 0, "loss": before}, {"step": 3, "loss": after}]},
    )


def finished(number: int, before: float, after: float, **more: Any) -> lifecycle.Generation:
    generation = started(number)
    result = write_artifact(generation, before, after, **more)
    judged = lifecycle.with_verdict(generation, result)
    for _ in range(2):  # a run that was killed afterwards repeats it
        lifecycle.finalize(judged, result)
        assert repr(lifecycle.with_verdict(generation, result)) == repr(judged)
    assert repr(lifecycle.load_all("main")[-1]) == repr(judged)  # a loss that is no number is not equal to itself
    return judged


def test_what_is_no_worse_is_promoted_and_the_lowest_loss_is_best(line_folder):
    assert aliases.target("main", "latest") is None
    with pytest.raises(ConfigError, match="latest names no model yet"):
        aliases.resolve("latest")
    for number, (before, after) in enumerate(((1.0, 0.5), (0.5, 0.54), (0.54, 0.4)), 1):
        assert finished(number, before, after).verdict == "promoted"
        assert aliases.resolve("latest") == f"runs/recurring/main/{number:04d}"
        assert aliases.resolve("main:best") == f"runs/recurring/main/{3 if number == 3 else 1:04d}"
    assert json.loads((line_folder / "latest.json").read_text())["id"] == record.read("runs/recurring/main/0003").id


def test_what_is_worse_is_kept_and_not_promoted(line_folder):
    finished(1, 1.0, 0.5)
    for number, after in ((2, 0.5501), (3, float("nan")), (4, float("inf"))):
        judged = finished(number, 0.5, after)
        assert judged.verdict == "not promoted"
        assert "more than 10% above the 0.50000 of the model it began with" in judged.why
        assert aliases.resolve("latest") == aliases.resolve("best") == "runs/recurring/main/0001"
        assert record.read(judged.out).id == judged.id
    assert finished(5, 0.5, 0.5499).verdict == "promoted"


def test_small_steps_down_do_not_add_up(line_folder):
    finished(1, 1.0, 0.5)
    assert finished(2, 0.5, 0.54).verdict == "promoted"
    judged = finished(3, 0.54, 0.58)
    assert judged.verdict == "not promoted"
    assert "above the 0.50000 of the best one" in judged.why


def test_losses_that_were_measured_in_another_way_are_not_compared(line_folder):
    finished(1, 1.0, 0.5)
    for number, more in enumerate(({"heldout": "6"}, {"seed": 1}, {"probe": {"samples": 5, "bins": 2, "every": 9}}, {"data": {"resolution": 64}}), 2):
        assert finished(number, 0.9, 0.8, **more).verdict == "promoted"
        assert aliases.resolve("best") == f"runs/recurring/main/{number:04d}", "the best one of what is measured now"
    assert finished(6, 0.8, 0.7, data={"resolution": 64}, probe={"samples": 4, "bins": 2, "every": 3}).verdict == "promoted"
    assert finished(7, 0.7, 0.79, data={"resolution": 64}).verdict == "not promoted"


@pytest.mark.parametrize(("code", "times"), [(2, 1), (3, 1), (5, 1), (1, 3), (4, None), (75, None), (130, None), (-9, None)])
def test_a_generation_that_would_fail_again_is_given_up_and_the_others_are_gone_on_with(line_folder, code, times):
    generation = started(1)
    for time in range(1, 6):
        generation = lifecycle.failed(generation, StageFailed("recover ended", code))
        assert generation.verdict == ("failed" if times and time >= times else "")
        assert lifecycle.load_all("main") == [generation]


def test_checkpoints_of_finished_generations_go_and_of_failed_ones_all_but_what_tells_why(line_folder):
    finished(1, 1.0, 0.5)
    under_way, over = started(2), started(3)
    for generation in (under_way, over):
        for name in (
            "checkpoint-3/weights.safetensors",
            "config.json",
            "train.snapshot",
            "metrics.jsonl",
            "quarantine-1.jsonl",
            "transformer/a.safetensors",
        ):
            (Path(generation.out) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(generation.out) / name).write_text("{}")
    lifecycle.failed(over, StageFailed("recover ended", 5))
    (line_folder / "ledger.jsonl.12-34.partial").touch()
    for _ in range(2):
        lifecycle.clean_up("main")
        assert not list(line_folder.glob("*.partial"))
        assert sorted(file.name for file in Path("runs/recurring/main/0001").iterdir()) == ["artifact.json", "transformer"]
        assert sorted(file.name for file in Path(over.out).iterdir()) == ["metrics.jsonl", "quarantine-1.jsonl", "train.snapshot"]
        assert len(list(Path(under_way.out).rglob("*"))) == 8
    assert lifecycle.quarantines("main") == [f"runs/recurring/main/{number}/quarantine-1.jsonl" for number in ("0002", "0003")]


def test_old_weights_may_go_but_for_the_newest_and_those_that_have_a_name(line_folder):
    for number, (before, after) in enumerate(((1.0, 0.5), (0.5, 0.4), (0.4, 0.43), (0.43, 0.9), (0.43, 0.42), (0.42, 0.43)), 1):
        finished(number, before, after)
    below = "runs/recurring/main/"
    assert lifecycle.prunable("main", 2) == [f"{below}{number:04d}" for number in (1, 3, 4)]
    assert lifecycle.prunable("main", 1) == [f"{below}{number:04d}" for number in (1, 3, 4, 5)]
    assert lifecycle.prunable("main", 9) == []
    Path(below, "0003/transformer/model.safetensors").unlink()
    assert lifecycle.prunable("main", 2) == [f"{below}{number:04d}" for number in (1, 4)]


def test_a_line_is_one_run_s_at_a_time(line_folder, monkeypatch):
    monkeypatch.setattr(lifecycle, "LOCK_TIMEOUT", 0.2)
    with lifecycle.exclusive("main") as first, lifecycle.exclusive("main") as second, lifecycle.exclusive("other") as third:
        assert first is not None
        assert second is None
        assert third is not None
    with lifecycle.exclusive("main") as first:
        assert first is not None


def test_a_damaged_record_is_told(line_folder):
    started(1)
    (line_folder / "0002.json").write_text('{"line": "main"}')
    with pytest.raises(ConfigError, match="is damaged"):
        lifecycle.load_all("main")


def test_a_generation_s_story_is_told(line_folder):
    finished(1, 1.0, 0.5)
    finished(2, 0.5, 0.9)
    lifecycle.failed(started(3), StageFailed("recover ended with exit code 5: <b>|`x`", 5))
    started(4)
    page = history.page("main", [{"shard": "a.tar", "reason": "[a](http://evil.example) is | rejected\nat byte 5"}])
    rows = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| 4", "| 3", "| 2", "| 1"]
    assert [row[3:6] for row in rows] == [
        ["", "", "under way"], ["", "", r"failed: recover ended with exit code 5: \<b\>\|\`x\`"],
        ["0.50000", "0.90000", "not promoted: its held-out loss is 0.90000, more than 10% above the 0.50000 of the model it began with"],
        ["1.00000", "0.50000", "promoted"],
    ]  # fmt: skip
    assert "- **latest** is `runs/recurring/main/0001`" in page
    assert r"- \[a\]\(http://evil.example\) is \| rejected at byte 5" in page
    assert "1 shards cannot be used" in page
