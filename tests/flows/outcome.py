"""What a line of recovered models has come to after a year: everything that must be so, looked at from outside."""

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


def sha256(place: Path) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()


def size(place: Path) -> int:
    """Bytes of all files in a folder; some may go while it looks."""
    return sum(os.stat(file).st_size for folder, _, names in os.walk(place) for name in names if os.path.exists(file := os.path.join(folder, name)))


class Outcome:
    """A line's folder, read with nothing but what is documented about it."""

    def __init__(self, place: Path, shards: Shards, least: int, keep: int) -> None:
        self.place, self.shards, self.least, self.keep = place, shards, least, keep
        records = sorted((int(file.stem), file) for file in place.glob("*.json") if file.stem.isdigit())
        self.generations = [json.loads(file.read_text()) for _, file in records]
        self.finished = [one for one in self.generations if one["verdict"] in ("promoted", "not promoted")]
        self.promoted = [one for one in self.generations if one["verdict"] == "promoted"]
        self.ledger = [json.loads(line) for line in (place / "ledger.jsonl").read_text().splitlines()]

    def folder(self, one: dict[str, Any]) -> Path:
        return self.place / f"{one['number']:04d}"

    def alias(self, name: str) -> dict[str, Any]:
        return json.loads((self.place / f"{name}.json").read_text())

    def check(self) -> dict[str, Any]:
        """Raises AssertionError for what is not as it must be."""
        self.nothing_twice()
        self.lineage()
        self.verdicts()
        self.disk()
        worse = [one["number"] for one in self.finished if one["verdict"] != "promoted"]
        return {
            "generations": len(self.generations), "promoted": len(self.promoted), "worse": worse,
            "losses": [round(one["after"], 4) for one in self.finished], "consumed": sum(len(line["shards"]) for line in self.ledger),
            "bytes": size(self.place), "weights": self.weights,
            "partial": [str(file.relative_to(self.place)) for file in self.place.rglob("*.partial")],
        }  # fmt: skip

    def nothing_twice(self) -> None:
        """Each good shard was trained on once; damaged ones never; what is left waits for more."""
        assert [one["number"] for one in self.generations] == list(range(1, len(self.generations) + 1))
        assert all(one["verdict"] for one in self.generations), [one for one in self.generations if not one["verdict"]]
        seen = Counter(shard for line in self.ledger for shard in line["shards"])
        assert max(seen.values()) == 1, "a shard was consumed twice"
        assert {line["run"]: set(line["shards"]) for line in self.ledger} == {one["id"]: self.trained_on(one) for one in self.finished}
        come = {sha256(place): place.name for place in self.shards.good + self.shards.noise}
        assert seen.keys() <= come.keys(), "something else was trained on"
        waiting = come.keys() - seen.keys()
        assert 3 * len(waiting) < self.least, f"{[come[one] for one in waiting]} were never trained on"  # only those of three samples may wait
        for one in self.finished:
            steps = [json.loads(row)["step"] for row in (self.folder(one) / "metrics.jsonl").read_text().splitlines() if '"lr"' in row]
            assert steps == list(range(1, len(steps) + 1)), f"steps of {one['number']}: {steps}"

    def trained_on(self, one: dict[str, Any]) -> set[str]:
        return {shard.sha256 for shard in snapshot.read(str(self.folder(one) / "train.snapshot")).shards}

    def lineage(self) -> None:
        """From the latest back to the base, through every promoted one, by what records say; and as the command says it."""
        made, chain = record.read(str(ROOT / self.alias("latest")["uri"])), list[str]()
        while True:
            chain.append(made.id)
            above = {parent["role"]: parent for parent in made.parents}
            assert above["base"]["id"] == record.fingerprint(str(ROOT / BASE))
            if "start" not in above:
                break
            made = record.read(str(ROOT / above["start"]["uri"]))
            assert made.id == above["start"]["id"]
        assert chain[::-1] == [one["id"] for one in self.promoted]
        told = {word: self.command(word, str(self.place / self.alias("latest")["uri"].rpartition("/")[2])) for word in ("verify", "lineage")}
        assert told["verify"].returncode == 0, told["verify"].stdout
        assert told["lineage"].stdout.count("start  transformer") == len(self.promoted) - 1
        gone = sum(one["number"] < self.finished[-1]["number"] - self.keep for one in self.promoted) - 1  # at least: the best one may be old
        assert told["lineage"].stdout.count("  pruned  ") >= gone
        assert "  gone  " not in told["lineage"].stdout

    def command(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "dev2pro.artifacts", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    def verdicts(self) -> None:
        """Aliases name what the records say; noise was trained on and not promoted."""
        assert self.alias("latest")["id"] == self.promoted[-1]["id"]
        assert self.alias("best")["id"] == min(self.promoted, key=lambda one: one["after"])["id"]
        noise = {sha256(place) for place in self.shards.noise}
        worse = [one for one in self.finished if noise & self.trained_on(one)]
        assert [one["verdict"] for one in worse] == ["not promoted"] * len(self.shards.noise)
        for one, before in zip(self.promoted[1:], self.promoted, strict=False):
            assert abs(one["before"] - before["after"]) < 1e-5, "each begins with the one before"

    def disk(self) -> None:
        """Only the newest, latest and best have weights; nobody has checkpoints."""
        self.weights = sorted(one["number"] for one in self.generations if list(self.folder(one).rglob("*.safetensors")))
        kept = {int(self.alias(name)["uri"].rpartition("/")[2]) for name in ("latest", "best")} | {
            one["number"] for one in self.finished[-self.keep :]
        }
        assert set(self.weights) == kept
        assert not list(self.place.rglob("checkpoint-*"))
        for one in self.finished:
            left = {file.name for file in self.folder(one).iterdir()}
            assert left >= {"artifact.json", "config.json", "metrics.jsonl", "train.snapshot", "heldout.snapshot"}, left
