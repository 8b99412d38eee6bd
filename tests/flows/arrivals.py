"""The weekly events of a line of recovered models: good and bad shards that arrive, and runs that are killed."""

import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.shards import encoded, noise, tar

ROOT = Path(__file__).resolve().parents[2]
INK = ROOT / "data/miniature/shards/ink"
MOMENTS = {  # module, event, what is removed or renamed to, which time: the process is hit just before that
    "pins": ("data.snapshot", "os.rename", "train.snapshot", 1),
    "begins": ("flows.recurring", "os.rename", "<n>.json", 1),
    "saves": ("stages.recover", "os.rename", "checkpoint-2", 1),
    "records": ("stages.recover", "os.rename", "artifact.json", 1),
    "notes": ("stages.recover", "os.rename", "ledger.jsonl", 1),
    "promotes": ("flows.recurring", "os.rename", "latest.json", 1),
    "judges": ("flows.recurring", "os.rename", "<n>.json", 2),
    "prunes": ("dev2pro.artifacts", "os.remove", "diffusion_pytorch_model.safetensors", 1),
}
ANY = "any"  # a moment
HIT = {
    "stages.recover": ["stage", "flow", "all"],
    "flows.recurring": ["flow"],
    "data.snapshot": ["flow", "all"],
    "dev2pro.artifacts": ["flow", "all"],
}


@dataclass
class Week:
    """What arrives, and what happens to the run. `kill`: (a moment, who is hit); so many `runs` are due."""

    arrives: list[str] = field(default_factory=lambda: ["good"])  # good, few, noise, cut, mended, twice
    kill: tuple[str, str] | None = None
    runs: int = 1
    together: bool = False  # they begin at the same time
    diverges: bool = False  # somebody has filled in a learning rate that is far too high
    real: bool = False  # nothing is forked


SHORT = [
    Week(["good"] * 9), Week(["good", "cut"], kill=("notes", "all")), Week(["noise"]), Week(["mended", "few", "twice"], kill=("saves", "stage")),
    Week([], runs=2, together=True),
]  # fmt: skip


def planned(dice: random.Random) -> list[Week]:
    """52: first one of every kind, then all kills at all moments and more of each kind, by chance."""
    kinds = [
        Week(["good"] * 9), Week(kill=("begins", "flow")), Week(["good", "cut"], runs=2), Week([]), Week(["noise"]), Week(["mended"]),
        Week(["good", "twice"]), Week(["few"]), Week(runs=2, together=True), Week(diverges=True),
    ]  # fmt: skip
    kills = [(moment, who) for moment, (module, *_) in MOMENTS.items() for who in HIT[module]] + [(ANY, who) for who in ("flow", "stage", "all")] * 5
    more = [Week(["good"] * dice.randint(1, 2), kill=kill) for kill in kills]
    more += [
        Week([]), Week([]), Week(["few"]), Week(["cut", "good"]), Week(["cut"]), Week(["good", "twice"]), Week(runs=4), Week(real=True),
        Week(real=True),
    ]  # fmt: skip
    dice.shuffle(more)
    return kinds + more + [Week(["mended"]), Week(["mended", "few"])]


class Shards:
    """A folder of tars that grows every week."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice, self.pairs, self.count = folder, dice, pairs(), 0
        self.good, self.noise = list[Path](), list[Path]()
        self.cut: list[tuple[Path, bytes]] = []  # damaged ones, and their undamaged contents
        folder.mkdir(parents=True)

    def arrive(self, kind: str) -> None:
        """One of `Week.arrives`."""
        if kind == "noise":  # enough to be learnt
            drawn = [(key, encoded(noise(number, 32, 32), "WEBP", lossless=True), text) for number, (key, _, text) in enumerate(self.take(64))]
            self.noise.append(self.tar(drawn))
        elif kind == "cut":
            whole = self.tar(self.take(20))
            self.cut.append((whole, whole.read_bytes()))
            whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        elif kind == "mended":
            path, content = self.cut.pop()
            path.write_bytes(content)
            self.good.append(path)
        elif kind == "twice":
            shutil.copy(self.good[-1], self.folder / f"{self.count:04d}-again.tar")
        else:
            self.good.append(self.tar(self.take(3 if kind == "few" else self.dice.randint(12, 24))))

    def take(self, number: int) -> list[tuple[str, bytes, bytes]]:
        return [next(self.pairs) for _ in range(number)]

    def tar(self, samples: list[tuple[str, bytes, bytes]]) -> Path:
        self.count += 1
        path = self.folder / f"{self.count:04d}.tar"
        path.write_bytes(tar([file for key, picture, text in samples for file in ((f"{key}.webp", picture), (f"{key}.txt", text))]))
        return path


def pairs() -> Iterator[tuple[str, bytes, bytes]]:
    """(key, picture, caption) of the miniature's digits, each once."""
    for shard in sorted(INK.glob("train-*.tar")):
        with tarfile.open(shard) as members:
            samples: dict[str, dict[str, bytes]] = {}
            for member in members:
                key, _, ending = member.name.partition(".")
                samples.setdefault(key, {})[ending] = members.extractfile(member).read()  # type: ignore[union-attr]
                if len(samples[key]) == 2:
                    yield f"{shard.stem}-{key}", samples[key]["webp"], samples.pop(key)["txt"]
