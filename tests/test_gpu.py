"""make gpu on a CPU with a tiny model: every piece runs, and the document holds what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, report

ROOT = Path(__file__).resolve().parent.parent
PROSE = (ROOT / "docs/performance.md").read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """(document, process) of the whole of it, in a folder of its own."""
    out = tmp_path_factory.mktemp("gpu") / "performance.md"
    command = [sys.executable, "-m", "bench.gpu", "--device=cpu", "--size=tiny", f"--out={out}"]
    return out, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


def results(process: subprocess.CompletedProcess) -> dict[str, dict]:
    """Piece -> its result, of the pieces that this run names."""
    names = [line.split()[1].removesuffix(":") for line in process.stdout.splitlines() if "/" in line.split(" ")[0] and ": " in line]
    return {name: json.loads((ROOT / f"runs/gpu/cpu-tiny/{name}.json").read_text()) for name in names}


@pytest.mark.slow
@pytest.mark.ci
def test_every_piece_runs_and_is_written_down(done):
    out, process = done
    assert process.returncode == 0, process.stderr[-3000:]
    found = results(process)
    listed = subprocess.run([sys.executable, "-m", "bench.gpu", "--size=tiny", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(found) == listed.stdout.split()
    assert {name: result["outcome"] for name, result in found.items()} == dict.fromkeys(found, "ran")
    assert set(found.pop("tests")["tests"].values()) == {"skipped"}  # collected, and there is no GPU
    assert {result["stage"] for result in found.values()} == {"recover", "lora"}
    for name, result in found.items():
        assert result["sharded"] == result["hardware"]["shard"], name
        assert result["ranks"] == (2 if result["hardware"]["shard"] else 1), name
        assert (result["int8_layers"] > 0) == result["hardware"]["int8_base"], name
        assert sum(result["shares"].values()) == pytest.approx(1, abs=0.01), name
        assert min(result["shares"][part] for part in ("forward", "backward", "optimizer")) > 0, name
        assert 0 < result["utilisation"] < 1, name
        assert result["flops"]["step"] > 1.5 * result["flops"]["forward"], name
    text = out.read_text()
    assert text.startswith(PROSE.split("<!--")[0])  # the prose stays
    rows = [line for line in text.splitlines() if line.startswith(("| recover |", "| lora |"))]
    assert len(rows) == len(found)
    assert text.count("What costs most in") == 2
    assert (ROOT / "docs/performance.md").read_text() == PROSE


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main("tests", "cuda", "tiny", tmp_path / "performance.md", listed=False)


def test_an_unknown_piece_is_refused_with_the_names(tmp_path):
    with pytest.raises(SystemExit, match=r"PIECE=recover-7 begins no piece\. .*recover-512-gpu80"):
        gpu.main("recover-7", "cpu", "12b", tmp_path / "performance.md", listed=False)


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    out, folder = tmp_path / "performance.md", tmp_path / "results"
    folder.mkdir()
    result = {"piece": {"name": "recover-512-gpu8", "stage": "recover"}, "outcome": "does not fit", "device": "one", "memory_gb": 1, "versions": {},
              "date": "2026"}  # fmt: skip
    for why in ("too large", "far too large"):
        (folder / "recover-512-gpu8.json").write_text(json.dumps({**result, "why": why}))
        report.write(out, ROOT / "docs/performance.md", folder)
        assert f"recover-512-gpu8: does not fit. {why}\n" in out.read_text()
        out.write_text(out.read_text() + "kept\n")
    before, _, after = PROSE.partition(report.BEGIN)
    assert out.read_text().startswith(before)
    assert out.read_text().endswith(after.partition(report.END)[2] + "kept\n" * 2)
    out.write_text("nothing here")
    with pytest.raises(SystemExit, match="lacks the line"):
        report.write(out, out, folder)
