import json

import pytest

from dev2pro.log import EVENTS, Log, Progress


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_flow(monkeypatch):
    monkeypatch.delenv(EVENTS, raising=False)


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    with Log(str(tmp_path), "lora", 3) as log:
        log.write(1, loss=0.5, lr=1e-3)
        assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 1e-3}]
        log.write(2, loss=0.25, lr=0.0)
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 1e-3}, {"step": 2, "loss": 0.25, "lr": 0.0}]


def test_a_new_run_starts_a_new_file(tmp_path):
    for loss in (1.0, 2.0):
        with Log(str(tmp_path), "lora", 1) as log:
            log.write(1, loss=loss)
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Log(str(tmp_path), "lora", 1, main=False) as log:
        log.write(1, loss=1.0)
        log.step(1, loss=1.0)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_a_flow_gets_events(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(EVENTS, "1")
    with Log(str(tmp_path), "recover (dev2pro)", 1000) as log:
        for step in range(1, 1001):
            log.step(step, loss=1 / 3, held_out=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("@@") for line in lines)
    events = [json.loads(line[2:]) for line in lines]
    assert events[0] == {"stage": "recover (dev2pro)", "step": 1, "of": 1000, "text": "loss 0.3333  held_out 2"}
    assert events[-1]["step"] == 1000  # the last one always comes
    assert len(events) < 500  # but not every one


def test_where_nobody_looks_there_are_few_lines(tmp_path, capsys):
    with Log(str(tmp_path), "lora", 1000) as log:
        for step in range(1, 1001):
            log.step(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "lora: 1000/1000  loss 0.5"
    assert len(lines) < 100
    assert not any(line.startswith("@@") for line in lines)


def test_the_file_is_closed_after_an_error(tmp_path):
    def run() -> None:
        with log:
            log.write(1, loss=1.0)
            raise RuntimeError

    log = Log(str(tmp_path), "lora", 2)
    with pytest.raises(RuntimeError):
        run()
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]
    with pytest.raises(ValueError, match="closed"):
        log.write(2, loss=1.0)


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    with Log(str(tmp_path), "recover", 4) as log:
        for step in (1, 2, 3):
            log.write(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a row
    with Log(str(tmp_path), "recover", 4, first=2) as log:
        log.write(3, loss=30.0)
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_a_bar_on_a_terminal_obeys_no_name(monkeypatch, capsys):
    monkeypatch.delenv(EVENTS, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Progress("lora [bold]x[/bold]\x1b]0;owned\x07", 3) as bar:
        bar.step(3)
    output = capsys.readouterr().out
    assert "\x1b]0" not in output
    assert "[bold]x[/bold]\\x1b]0;owned\\x07" in output.replace("\n", "")
