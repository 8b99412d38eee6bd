"""The outcome of a line of recovered models after a year: checks its invariants from outside."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from data.shards import snapshot
from dev2pro.artifacts import record
from tests.flows.arrivals import Shards

ROOT = Path(__file__).resolve().parents[2]
BASE = "data/miniature/pipeline"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size(folder: Path) -> int:
    """Bytes of all files in a folder; some may go while it looks."""
    return sum(os.stat(file).st_size for parent, _, names in os.walk(folder) for name in names if os.path.exists(file := os.path.join(parent, name)))


class Outcome:
    """A line's folder, read only in documented ways."""

    def __init__(self, line_folder: Path, shards: Shards, least: int, keep: int) -> None:
        self.line_folder, self.shards, self.least, self.keep = line_folder, shards, least, keep
        records = sorted((int(file.stem), file) for file in line_folder.glob("*.json") if file.stem.isdigit())
        self.generations = [json.loads(file.read_text()) for _, file in records]
        self.finished = [generation for generation in self.generations if generation["verdict"] in ("promoted", "not promoted")]
        self.promoted = [generation for generation in self.generations if generation["verdict"] == "promoted"]
        self.ledger = [json.loads(line) for line in (line_folder / "ledger.jsonl").read_text().splitlines()]

    def folder(self, generation: dict[str, Any]) -> Path:
        return self.line_folder / f"{generation['number']:04d}"

    def alias(self, name: str) -> dict[str, Any]:
        return json.loads((self.line_folder / f"{name}.json").read_text())

    def check(self) -> dict[str, Any]:
        """Raises AssertionError for a violated invariant."""
        self.nothing_twice()
        self.lineage()
        self.verdicts()
        self.disk()
        worse = [generation["number"] for generation in self.finished if generation["verdict"] != "promoted"]
        return {
            "generations": len(self.generations), "promoted": len(self.promoted), "worse": worse,
            "losses": [round(generation["after"], 4) for generation in self.finished], "consumed": sum(len(line["shards"]) for line in self.ledger),
            "bytes": size(self.line_folder), "weights": self.weights,
            "partial": [str(file.relative_to(self.line_folder)) for file in self.line_folder.rglob("*.partial")],
        }  # fmt: skip

    def nothing_twice(self) -> None:
        """Each good shard was trained on once; damaged ones never; what is left waits for more."""
        assert [generation["number"] for generation in self.generations] == list(range(1, len(self.generations) + 1))
        assert all(generation["verdict"] for generation in self.generations), [
            generation for generation in self.generations if not generation["verdict"]
        ]
        seen = Counter(shard for line in self.ledger for shard in line["shards"])
        assert max(seen.values()) == 1, "a shard was consumed twice"
        assert {line["run"]: set(line["shards"]) for line in self.ledger} == {
            generation["id"]: self.trained_on(generation) for generation in self.finished
        }
        come = {sha256(path): path.name for path in self.shards.good + self.shards.noise}
        assert seen.keys() <= come.keys(), "something else was trained on"
        waiting = come.keys() - seen.keys()
        assert 3 * len(waiting) < self.least, f"{[come[shard] for shard in waiting]} were never trained on"  # only those of three samples may wait
        for generation in self.finished:
            steps = [json.loads(row)["step"] for row in (self.folder(generation) / "metrics.jsonl").read_text().splitlines() if '"lr"' in row]
            assert steps == list(range(1, len(steps) + 1)), f"steps of {generation['number']}: {steps}"

    def trained_on(self, generation: dict[str, Any]) -> set[str]:
        return {shard.sha256 for shard in snapshot.read(str(self.folder(generation) / "train.snapshot")).shards}

    def lineage(self) -> None:
        """From the latest back to the base, through every promoted generation, by what records say; and as the command says it."""
        artifact, chain = record.read(str(ROOT / self.alias("latest")["uri"])), list[str]()
        while True:
            chain.append(artifact.id)
            above = {parent["role"]: parent for parent in artifact.parents}
            assert above["base"]["id"] == record.fingerprint(str(ROOT / BASE))
            if "start" not in above:
                break
            artifact = record.read(str(ROOT / above["start"]["uri"]))
            assert artifact.id == above["start"]["id"]
        assert chain[::-1] == [generation["id"] for generation in self.promoted]
        commands = {
            word: self.command(word, str(self.line_folder / self.alias("latest")["uri"].rpartition("/")[2])) for word in ("verify", "lineage")
        }
        assert commands["verify"].returncode == 0, commands["verify"].stdout
        assert commands["lineage"].stdout.count("start  transformer") == len(self.promoted) - 1
        gone = (
            sum(generation["number"] < self.finished[-1]["number"] - self.keep for generation in self.promoted) - 1
        )  # at least: the best one may be old
        assert commands["lineage"].stdout.count("  pruned  ") >= gone
        assert "  gone  " not in commands["lineage"].stdout

    def command(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "dev2pro.artifacts", *args], cwd=ROOT, capture_output=True, text=True, check=False)

    def verdicts(self) -> None:
        """Aliases name what the records say; noise was trained on and not promoted."""
        assert self.alias("latest")["id"] == self.promoted[-1]["id"]
        assert self.alias("best")["id"] == min(self.promoted, key=lambda generation: generation["after"])["id"]
        noise = {sha256(path) for path in self.shards.noise}
        worse = [generation for generation in self.finished if noise & self.trained_on(generation)]
        assert [generation["verdict"] for generation in worse] == ["not promoted"] * len(self.shards.noise)
        for generation, before in zip(self.promoted[1:], self.promoted, strict=False):
            assert abs(generation["before"] - before["after"]) < 1e-5, "each begins with the one before"

    def disk(self) -> None:
        """Only the newest, latest and best have weights; nobody has checkpoints."""
        self.weights = sorted(generation["number"] for generation in self.generations if list(self.folder(generation).rglob("*.safetensors")))
        expected = {int(self.alias(name)["uri"].rpartition("/")[2]) for name in ("latest", "best")} | {
            generation["number"] for generation in self.finished[-self.keep :]
        }
        assert set(self.weights) == expected
        assert not list(self.line_folder.rglob("checkpoint-*"))
        for generation in self.finished:
            files = {file.name for file in self.folder(generation).iterdir()}
            assert files >= {"artifact.json", "config.json", "metrics.jsonl", "train.snapshot", "heldout.snapshot"}, files
