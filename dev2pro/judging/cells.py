"""What an evaluation compares: LoRAs, the models they are applied to, and the cells that these make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dev2pro import allowed
from dev2pro.artifacts import record, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError
from dev2pro.judging import lora_folder
from dev2pro.patterns import matches

TUNED = " tuned"  # the end of an arm's name: its LoRA as stages.tune has chosen to use it
HELP = ("teacher", "training_adapter")  # roles of a LoRA's parents that a recovered model may have
INHERITED = (*HELP, "data.train")  # roles of its parents that a tuned LoRA has as well, for what evaluate makes of them


@dataclass(frozen=True)
class Inference:
    """A model to apply LoRAs to, and how it is sampled."""

    name: str
    path: str
    guidance: float
    cfg_scale: float


def find_loras(patterns: Sequence[str], base: str) -> list[Artifact]:
    """The finished LoRA artifacts of globs and store addresses. Raises ConfigError for none, for other artifacts, and for LoRAs of another base."""
    found = {pattern: [store.resolve(pattern)] if "://" in pattern else matches(pattern) for pattern in patterns}
    folders = [folder for some in found.values() for folder in some]
    if not folders:
        raise ConfigError(f"loras={patterns} matches no folder. Give the output folders of stages.lora, such as loras=[runs/demo/lora/*/*].")
    if missed := [pattern for pattern, some in found.items() if not some]:
        raise ConfigError(f"loras={patterns}: nothing matches {missed[0]}. Correct it, or leave it out.")
    loras = [lora_folder.read(f) for f in folders]
    id = record.fingerprint(base)
    for lora in loras:
        if lora.kind != "lora":
            raise ConfigError(f"{lora.uri} is a {lora.kind}, not a LoRA. Leave it out of loras=.")
        if lora.inference["apply_to"]["id"] != id:
            raise ConfigError(
                f"The LoRA {lora.uri} is to be applied to {lora.inference['apply_to']['path']}, not to {base}. Change model, or leave the LoRA out."
            )
        strength(lora)
    for style, arms in by_style(loras).items():
        names = [lora.inference["arm"] for lora in arms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"loras={patterns} holds arm {min(twice)} of style {style} more than once. Leave one out, or train it under another arm= name."
            )
    return loras


def find_lora(path: str, base: str) -> Artifact:
    """The finished LoRA that stages.lora trained for a base, in a folder or a store. Raises ConfigError for everything else."""
    lora = lora_folder.read(store.resolve(path), "lora")
    if (lora.kind, lora.stage) != ("lora", "lora"):
        raise ConfigError(f"lora={path} is a {lora.kind} of stages.{lora.stage}. Give the output folder of stages.lora itself.")
    if lora.inference["apply_to"]["id"] != record.fingerprint(base):
        raise ConfigError(f"lora={path} is to be applied to {lora.inference['apply_to']['path']}, not to model.path={base}. Change one of them.")
    return lora


def by_style(loras: Sequence[Artifact]) -> dict[str, list[Artifact]]:
    """style -> LoRAs, in the order they were given."""
    styles: dict[str, list[Artifact]] = {}
    for lora in loras:
        styles.setdefault(data(lora)["name"], []).append(lora)
    return styles


def data(lora: Artifact) -> dict[str, Any]:
    """The data configuration that a LoRA was trained with; one of stages.tune has it from the LoRA it was made of."""
    return lora.inference.get("data") or lora.config["data"]


def strength(lora: Artifact) -> float:
    """The strength that a LoRA is to be applied at. Raises ConfigError for one that cannot be meant."""
    value = lora.inference.get("suggested_strength", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in allowed.RANGES["strengths"]:
        raise ConfigError(
            f"The record of the LoRA {lora.uri} suggests the strength {str(value)[:20]}, which cannot work. Make it again, or correct its record."
        )
    return float(value)


def list_inferences(base: str, guidance: float, cfg_scale: float, *, teacher: str | None, recovered: str | None) -> list[Inference]:
    """The models to apply LoRAs to: the base at its usual guidance, the others at guidance 1.0 with true CFG.

    The teacher comes first, because its pictures are the ideal the others are held against.
    """
    return [
        *([Inference("teacher", teacher, 1.0, cfg_scale)] if teacher else []),
        Inference("base", base, guidance, 1.0),
        *([Inference("recovered", recovered, 1.0, cfg_scale)] if recovered else []),
    ]


def plan(inferences: Sequence[Inference], loras: Sequence[Artifact]) -> Iterator[tuple[str, str, Artifact | None]]:
    """(style, arm, LoRA) of every cell; on the teacher only its own LoRA, the ideal."""
    for inference in inferences:
        for style, arms in by_style(loras).items():
            if inference.name == "teacher":
                yield from ((style, "ideal", a) for a in arms if a.inference["trained_on"]["id"] == record.fingerprint(inference.path))
            else:
                yield style, "none", None
                yield from ((style, a.inference["arm"], a) for a in arms)


def kinds(loras: Sequence[Artifact], *, teacher: str | None, recovered: str | None) -> dict[str, str]:
    """arm -> what it was made of: teacher if it was trained on that, recovered if on that or with its help, else base.

    Help is a teacher of the loss or a training adapter. A recovered model without a record is known by `recovered`.
    """
    teacher_id, recovered_id = (record.fingerprint(path) if path else None for path in (teacher, recovered))
    found = {}
    for lora in loras:
        model = lora.inference["trained_on"]
        helpers = [(parent["uri"], parent["id"]) for parent in lora.parents if parent["role"] in HELP]
        is_recovered = any(id == recovered_id or _by_recovery(path) for path, id in [(model["path"], model["id"]), *helpers])
        found[lora.inference["arm"]] = "teacher" if model["id"] == teacher_id else "recovered" if is_recovered else "base"
    return found


def _by_recovery(path: str) -> bool:
    artifact = record.read_if_artifact(store.resolve(path))
    return artifact is not None and artifact.stage in ("recover", "extract")
