"""How near to the teacher each way of recovering comes, and at what cost: `python -m bench.recovery`, `--base inside --variant full --seed 1`.

A variant is a few values for stages.recover, or a LoRA that stages.lora trains on the base at guidance 1. Each becomes a row of
docs/recovery/<base>.csv as it is finished; a row that is there is not made again, and a stage that was interrupted goes on.
`python -m bench.recovery_tables` writes the tables and the figure of docs/recovery.md from them.
"""

import stages  # isort: skip  # noqa: F401  (first, because it quiets the libraries)

import argparse
import csv
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import study
from data import digits, sources
from dev2pro.artifacts import record
from dev2pro.artifacts.record import Artifact
from dev2pro.models import flow_matching, flux1, lora
from dev2pro.models.encodings import PromptEncoder, concatenate
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.models.lora import AdapterConfig
from dev2pro.training import checkpoint_space, distributed, feed, trainable
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.optim import OptimConfig
from flows.plan import hydra_args

RUNS, RESULTS = Path("runs/recovery"), Path("docs/recovery")
TEACHER = study.BUNDLE / "teacher"
BASES = ("outside", "inside")
CFG = 3.5
COMMON = {"experiment": "miniature", "preview.pictures": 0, "probe.every": 100, "checkpoint.every": 500}
LORA = COMMON | {"probe.every": 1000, "steps": 500, "batch": 32, "caption_dropout": 0.1, "guidance": 1.0, "adapter.targets": "all"}
INK = f"{study.BUNDLE}/shards/ink/train-*.tar"  # the training pictures: 1,500, with 50 captions
PARTS = {"fifth": 5, "twentieth": 20}  # every so many of them
OWN = {"own@3.5": CFG, "own@1": 1.0}  # the guidance at which the base draws its own for their captions, 30 for each: as many


@dataclass(frozen=True)
class Variant:
    """Values for a stage."""

    values: dict[str, Any]
    stage: str = "recover"
    pictures: tuple[str, ...] = ()  # ink, of PARTS, of OWN; ink without


def _lora(rank: int, lr: float) -> Variant:
    return Variant({"adapter.rank": rank, "adapter.alpha": rank, "optim.lr": lr}, "lora")


VARIANTS = {
    "full": Variant({}),
    "full at lr 0.002": Variant({"optim.lr": 2e-3}),
    "125 steps": Variant({"steps": 125}),
    "250 steps": Variant({"steps": 250}),
    "1000 steps": Variant({"steps": 1000}),
    "constant rate": Variant({"optim.schedule": "constant_with_warmup"}),
    "constant rate with stop 0.01": Variant({"optim.schedule": "constant_with_warmup", "stop": 0.01, "probe.every": 25}),
    "dropout 0": Variant({"caption_dropout": 0.0}),
    "dropout 0.3": Variant({"caption_dropout": 0.3}),
    "dropout 0.5": Variant({"caption_dropout": 0.5}),
    "logit mean 0.5": Variant({"logit_mean": 0.5}),
    "logit mean 1": Variant({"logit_mean": 1.0}),
    "a fifth of the pictures": Variant({}, pictures=("fifth",)),
    "a twentieth of the pictures": Variant({}, pictures=("twentieth",)),
    "own pictures": Variant({}, pictures=("own@3.5",)),
    "own and real pictures": Variant({}, pictures=("own@3.5", "ink")),
    "own pictures at guidance 1": Variant({}, pictures=("own@1",)),
    "double blocks": Variant({"trainable": ["transformer_blocks.*"]}),
    "single blocks": Variant({"trainable": ["single_transformer_blocks.*"]}),
    "attention": Variant({"trainable": ["*.attn.*"]}),
    "attention at lr 0.003": Variant({"trainable": ["*.attn.*"], "optim.lr": 3e-3}),
    "LoRA 4": _lora(4, 5e-3),
    "LoRA 16": _lora(16, 5e-3),
    "LoRA 64": _lora(64, 5e-3),
    "LoRA 16 at lr 0.002": _lora(16, 2e-3),
}
FIELDS = ("base", "seed", "variant", "pictures", "steps", "batch", "trained", "state_mb", "cpu_seconds", "loss", "distance", "high", "empty", "cfg")


class Distances:
    """A model's distances to the teacher on the held-out pictures: mean squares over the probe's pictures and times, at guidance 1."""

    def __init__(self, base: str) -> None:
        model = ModelConfig(path=str(study.pipeline(base)), usual_guidance=CFG, max_sequence_length=8)
        accelerator = distributed.accelerator(HardwareConfig(device="cpu"))
        encoders = Encoders(model, torch.float32, accelerator.device)
        prompts = PromptEncoder(model, encoders, 1e9)
        batches = sources.squares([str(study.BUNDLE / "shards/ink/heldout-000000.tar")], "data.heldout", 32)
        pictures = concatenate([feed.encode(batch, encoders, prompts) for batch in itertools.islice(batches, -(-96 // sources.SQUARES_BATCH))])
        config, scheduler = ProbeConfig(every=1, samples=96, bins=8), flux1.scheduler_settings(model.path)
        self.probe, self.empty = HeldoutProbe(pictures, config, accelerator, scheduler=scheduler, seed=0, batch=64), prompts.empty
        self.teacher = self._predictions(flux1.load_transformer(str(TEACHER)))

    @torch.no_grad()
    def _predictions(self, model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Of every pass, the velocities for the captions and for the empty one."""
        return list(zip(self.probe.predictions(model.eval(), 1.0), self.probe.predictions(model, 1.0, self.empty), strict=True))

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """loss; `distance` for the captions, `high` at the noisier half of the times; `empty` for the empty one; `cfg` for both by true CFG."""
        target, sums = flow_matching.velocity(self.probe.x0, self.probe.noise), dict.fromkeys(FIELDS[FIELDS.index("loss") :], 0.0)
        for (number, rows), (v, u), (true, true_u) in zip(self.probe.passes, self._predictions(model), self.teacher, strict=True):
            guided = [flow_matching.apply_cfg(unconditional, one, CFG) for unconditional, one in ((u, v), (true_u, true))]
            pairs = {"loss": (v, target[rows]), "distance": (v, true), "empty": (u, true_u), "cfg": tuple(guided)}
            pairs |= {"high": (v, true)} if number >= self.probe.bins // 2 else {}
            for name, (a, b) in pairs.items():
                sums[name] += (a - b).square().mean().item() * len(v) / (self.probe.count * self.probe.bins)
        return sums | {"high": 2 * sums["high"]}  # a mean over half the times


def pictures(base: str, name: str) -> str:
    """The shards of a name in Variant.pictures; those that are not bundled are made once."""
    if name in OWN:
        return draw(base, OWN[name])
    return shard(name) if name in PARTS else INK


def shard(name: str) -> str:
    """A tar with every so many of the training pictures."""
    path = RUNS / f"pictures/{name}.tar"
    if not path.with_name(f"{path.name}.index").is_file():
        digits.write_shard(path, digits.load()[0][:: PARTS[name]], digits.ink, 0)
    return str(path)


def draw(base: str, guidance: float, seeds: int = 30) -> str:
    """Shards of the base's own pictures at a guidance, `seeds` for each caption of the training pictures."""
    out = RUNS / base / f"own-{guidance:g}"
    values = {"experiment": "miniature", "prompts": None, "captions": [INK], "seeds": seeds, "guidance": guidance}
    values |= {"model.path": str(study.pipeline(base)), "out": str(out)}
    study.run(study.Job(f"own pictures at {guidance:g}", "draw", hydra_args(values)), str(RUNS / base / "log.txt"))
    return f"{out}/*.tar"


def train(base: str, seed: int, name: str, log: Path) -> tuple[Artifact, float]:
    """Runs a variant's stage: its artifact, and the seconds of a CPU that this took."""
    variant, pipeline = VARIANTS[name], str(study.pipeline(base))
    out = RUNS / base / str(seed) / name.replace(" ", "-")
    values = variant.values | {"model.path": pipeline, "seed": seed, "out": str(out)}
    values |= {"data.train": [pictures(base, one) for one in variant.pictures]} if variant.pictures else {}
    values = LORA | {"trained_on": pipeline} | values if variant.stage == "lora" else COMMON | values
    begun = time.process_time()
    study.run(study.Job(name, variant.stage, hydra_args(values)), str(log))
    return record.read(str(out)), time.process_time() - begun


def trained(base: str, artifact: Artifact) -> tuple[int, int]:
    """How many parameters were trained, and the bytes of the training state: these, their average and two moments."""
    skeleton, config = flux1.skeleton(str(study.pipeline(base))), artifact.config
    if artifact.stage == "lora":
        lora.inject(skeleton, AdapterConfig(**config["adapter"]), 0)
    parameters = checkpoint_space.trained(trainable.select(skeleton, config.get("trainable"), base))
    return sum(p.numel() for p in parameters), checkpoint_space.state_bytes(parameters, OptimConfig(lr=1.0), "ema" in config)


def row(base: str, seed: int, name: str, distances: Distances) -> dict[str, Any]:
    """A variant's row; `none` is the base itself."""
    cost: dict[str, Any] = dict.fromkeys(("pictures", "steps", "batch", "trained", "state_mb", "cpu_seconds"), 0)
    path = str(study.pipeline(base))
    if name == "none":
        model = flux1.load_transformer(path)
    else:
        artifact, seconds = train(base, seed, name, RUNS / base / "log.txt")
        parameters, state = trained(base, artifact)
        cost = {"pictures": artifact.metrics["data"]["samples"], "steps": artifact.step, "batch": artifact.config["batch"], "trained": parameters,
                "state_mb": round(state / 1e6, 2), "cpu_seconds": round(seconds, 1)}  # fmt: skip
        model = flux1.load_transformer(path if artifact.stage == "lora" else artifact.uri)
        if artifact.stage == "lora":
            lora.merge(model, artifact.uri)
    measured = {key: f"{value:.6g}" for key, value in distances(model).items()}
    return {"base": base, "seed": seed, "variant": name, **cost, **measured}


def part(base: str, seeds: list[int], names: list[str]) -> None:
    """Makes the rows that a base's CSV lacks."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RUNS / base).mkdir(parents=True, exist_ok=True)
    path, distances = RESULTS / f"{base}.csv", Distances(base)
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    for seed, name in itertools.product(seeds, ["none", *names]):
        if any((one["seed"], one["variant"]) == (str(seed), name) for one in rows):
            continue
        rows.append({key: str(value) for key, value in row(base, seed, name, distances).items()})
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        print(f"{base} {seed} {name}: " + ", ".join(f"{key} {rows[-1][key]}" for key in FIELDS[3:]), flush=True)


def main() -> None:
    """Makes what is asked for, one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, action="append", help="may be given several times; both without it")
    parser.add_argument("--seed", type=int, action="append", help="may be given several times; 0 without it")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="may be given several times; all of them without it")
    asked = parser.parse_args()
    for base in asked.base or BASES:
        part(base, asked.seed or [0], asked.variant or list(VARIANTS))


if __name__ == "__main__":
    main()
