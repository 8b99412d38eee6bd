"""The forms of the flows: typed, bounded and described. Invalid values are refused with their key, in the form or when the run starts.

A form mirrors the stage's configuration: `data.train` is the field `train` of the group `data`. An empty field keeps the value of conf/.
"""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, field_validator

from flows.form_fields import Base, Experiment, Group, Hardware, Line, Model, Name, PlanName, RunFolder, Seed, Strength, Text, Url, form_field, number
from flows.generations.aliases import LINE

FOLDER_HELP = "Where the result goes, below runs/. The same values into the same folder go on, or return at once what is finished."
TRAINED_ON_HELP = "latest or best: what the recurring recovery promoted; else a model's folder or store address."


class Data(Group):
    """Which pictures."""

    model_config = ConfigDict(title="Pictures")
    name: Name | None = form_field("Name", "Of the data set or style, for tables; in the miniature ink, chalk, sideways, poster or halftone.")
    train: list[Url] | None = form_field("Training", "A snapshot, indexed tars, or folders of captioned pictures.", min_length=1)
    heldout: list[Url] | None = form_field("Held out", "Pictures to measure on, never trained on.", min_length=1)
    resolution: int | None = number("resolution", "Resolution", "Pixels: side of the square whose area every picture is scaled to.")


class Optim(Group):
    """How the weights are moved."""

    model_config = ConfigDict(title="Optimizer")
    lr: float | None = number("lr", "Learning rate", "Recovery of FLUX.1-dev: 0.00001; a LoRA: 0.0001.")
    warmup: int | None = number("optim.warmup", "Warm-up", "Steps until the learning rate is full.")


class Checkpoint(Group):
    """When the run is written down."""

    model_config = ConfigDict(title="Checkpoints")
    every: int | None = number("checkpoint.every", "Every", "Steps between two checkpoints.")
    keep: int | None = number("checkpoint.keep", "Keep", "How many of the newest; the best one is kept besides.")


class LoraCheckpoint(Checkpoint):
    """When the run is written down, and which steps are kept as LoRAs."""

    loras: int | None = number("checkpoint.loras", "LoRAs", "Steps between two LoRAs that are kept besides, for tune to choose among; 0 is none.")


class Probe(Group):
    """What is measured on held-out pictures while it runs."""

    model_config = ConfigDict(title="Measuring")
    every: int | None = number("probe.every", "Every", "Steps between two measurements.")
    samples: int | None = number("probe.samples", "Pictures", "Held-out pictures to measure on.")


class Adapter(Group):
    """The LoRA itself."""

    model_config = ConfigDict(title="Adapter")
    rank: int | None = number("adapter.rank", "Rank", "Its size, at most that of the layers it goes to.")
    alpha: float | None = number("adapter.alpha", "Alpha", "Its effect is scaled by alpha / rank.")
    targets: Literal["attention", "attention+mlp", "all"] | None = form_field("Targets", "Which layers it goes to.")


class Loss(Group):
    """What the LoRA is trained with."""

    model_config = ConfigDict(title="Loss")
    name: Literal["flow_matching", "guidance", "cfg_augmented", "distillation", "model_guidance"] | None = form_field(
        "Loss",
        "flow_matching is for a recovered model. The others train on the base itself, at guidance 3.5: guidance and cfg_augmented for twice the "
        "passes, distillation and model_guidance for a few steps, from a LoRA that was trained on the recovered model.",
    )
    teacher: Url | None = form_field("Teacher", "Of the last two losses: the recovered model's folder or store address.")
    teacher_lora: Url | None = form_field("Its LoRA", "Of the last two losses: the style's LoRA that was trained on the teacher.")


class Preserve(Group):
    """What the LoRA leaves as it was."""

    model_config = ConfigDict(title="Preserve")
    weight: float | None = number("preserve.weight", "Weight", "Of the preservation loss: 0 is off, 1 is usual, at more than twice the time.")
    trigger: Text | None = form_field("Trigger", "The word of captions for what is learnt; without one the empty caption is preserved.")
    class_word: Text | None = form_field("Class", "Stands for the trigger in captions that are drawn as before, such as dog.")


class Pipeline(Group):
    """Recover, train the LoRAs, evaluate."""

    model_config = ConfigDict(title="pipeline")
    plan: PlanName = form_field("Plan", "What is trained and compared, from conf/pipeline/. smoke is a minute's trial of everything.", "miniature")
    out: RunFolder = form_field(
        "Folder", "Where everything goes, below runs/. The same plan into the same folder goes on; finished stages are skipped.", "runs/demo"
    )
    seed: Seed = 0


class Stage(Group):
    """What every stage is asked."""

    out: RunFolder
    experiment: Experiment = form_field("Experiment", "miniature is the bundled digit world; own is your model and your pictures.", "miniature")
    model: Model | None = form_field("Model", "The base, as conf/model/ describes it.")
    hardware: Hardware | None = form_field("Hardware", "This machine, as conf/hardware/ describes it.")
    processes: int = form_field("Processes", "One for each GPU that the stage shall use.", 1, ge=1, le=64)
    seed: Seed = 0
    publish: Url | None = form_field("Publish", "A store, such as s3://bucket/artifacts, where the finished artifact goes besides.")


class Training(Stage):
    """What every training stage is asked."""

    steps: int | None = number("steps", "Steps", "Optimizer steps. With more of them a finished run goes on.")
    batch: int | None = number("batch", "Batch", "Pictures per optimizer step, over all processes.")
    data: Data = form_field("Pictures", "Which pictures.", Data)
    optim: Optim = form_field("Optimizer", "How the weights are moved.", Optim)
    checkpoint: Checkpoint = form_field("Checkpoints", "When the run is written down.", Checkpoint)
    probe: Probe = form_field("Measuring", "What is measured while it runs.", Probe)


class Recover(Training):
    """Fine-tunes the whole base at guidance 1.0 (dev2pro)."""

    model_config = ConfigDict(title="recover (dev2pro)")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/recover")
    ema: float | None = number("ema", "Averaging", "Decay of the averaged weights; 0 is none.")
    stop: float | None = number("stop", "Stop", "Ends when the steps left would gain less than this share of what was gained, such as 0.01.")
    trainable: list[Text] | None = form_field(
        "Trained weights", "Names with * for anything, such as single_transformer_blocks.*; the others are frozen.", min_length=1
    )


class Lora(Training):
    """Trains a LoRA on a recovered model, or on any base."""

    model_config = ConfigDict(title="lora")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/lora")
    trained_on: Base = form_field("Trained on", TRAINED_ON_HELP, "latest")
    arm: Name = form_field("Arm", "Its name in tables.", "recovered@1")
    guidance: float = number("guidance", "Guidance", "What the base expects in training: 1.0 for a recovered one.", 1.0)
    checkpoint: LoraCheckpoint = form_field("Checkpoints", "When the run is written down.", LoraCheckpoint)
    adapter: Adapter = form_field("Adapter", "The LoRA itself.", Adapter)
    loss: Loss = form_field("Loss", "What it is trained with.", Loss)
    start: Url | None = form_field("Begin from", "A LoRA with the same adapter, such as that of the loss's teacher.")
    preserve: Preserve = form_field("Preserve", "What it leaves as it was.", Preserve)


class Evaluate(Stage):
    """Puts every LoRA on every base, judges the pictures and compares."""

    model_config = ConfigDict(title="evaluate")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/evaluate")
    loras: list[Url] = form_field("LoRAs", "Folders of finished LoRAs; * stands for any name.", lambda: ["runs/ui/lora"], min_length=1)
    recovered: Base | None = form_field(
        "Recovered", "A recovered model to put them on as well; latest and best are what the recurring recovery promoted."
    )
    prompts: Url | None = form_field("Prompts", "A text file with a prompt a line.")
    seeds: int | None = number("seeds", "Seeds", "Pictures for each prompt.")


class Tune(Stage):
    """Finds which step of a LoRA works best on the base, at which strength and guidance."""

    model_config = ConfigDict(title="tune")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/tune")
    lora: Url = form_field("LoRA", "The folder of a finished LoRA, trained with LoRAs kept besides its checkpoints.", "runs/ui/lora")
    strengths: list[Strength] | None = form_field("Strengths", "What its effect is multiplied by; 1 is always tried.", min_length=1, max_length=16)
    guidances: list[Strength] | None = form_field("Guidances", "Of the base; its usual one is always tried.", min_length=1, max_length=16)
    prompts: Url | None = form_field("Prompts", "A text file with a prompt a line.")
    seeds: int | None = number("seeds", "Seeds", "Pictures for each prompt and point, 2 or more.")


class Judged(Group):
    """Which pictures a model is judged on."""

    model_config = ConfigDict(title="Pictures")
    heldout: list[Url] | None = form_field("Held out", "Captioned pictures that the model was not trained on: a few dozen.", min_length=1)
    resolution: int | None = number("resolution", "Resolution", "Pixels: side of the square that every picture is scaled to.")


class Diagnose(Stage):
    """Tells without a teacher how a base was distilled and what its guidance input does."""

    model_config = ConfigDict(title="diagnose")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/diagnose")
    data: Judged = form_field("Pictures", "Which pictures.", Judged)
    loras: list[Url] | None = form_field("LoRAs", "Folders of LoRAs for this base: how much of its guidance each keeps, and of its training.")
    outside: list[Url] | None = form_field("Outside", "Captioned pictures that are not of the LoRAs' style: what the LoRAs do to them.")
    teacher: Base | None = form_field("Teacher", "An undistilled or recovered model, to hold the numbers against.")


class Distill(Training):
    """Makes a guidance-distilled student from an undistilled teacher."""

    model_config = ConfigDict(title="distill")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/ui/distill")
    teacher: Base = form_field("Teacher", "A folder with an undistilled transformer.", "data/miniature/teacher")


class Concept(Group):
    """A style or subject, and its pictures."""

    model_config = ConfigDict(title="Concept")
    name: Name = form_field("Name", "Its folder and its name in tables; in the miniature chalk, sideways, poster or halftone.", ...)
    train: list[Url] | None = form_field("Training", "Folders of captioned pictures, indexed tars, or a snapshot.", min_length=1)
    heldout: list[Url] | None = form_field("Held out", "Pictures to measure on, never trained on.", min_length=1)


class Concepts(Training):
    """One recovered model, many LoRAs."""

    model_config = ConfigDict(title="concepts")
    out: RunFolder = form_field("Folder", FOLDER_HELP, "runs/concepts")
    trained_on: Base = form_field("Trained on", TRAINED_ON_HELP, "latest")
    concepts: list[Concept] = form_field(
        "Concepts", "What to train.", lambda: [Concept(name="chalk"), Concept(name="poster")], min_length=1, max_length=1000
    )
    at_once: int = form_field("At once", "Concepts that are worked on at the same time; each waits for a free GPU besides.", 2, ge=1, le=64)
    base: Base | None = form_field("Rival", "Also train each on this base, to compare: twice the work. In the miniature data/miniature/pipeline.")
    adapter: Adapter = form_field("Adapter", "The LoRA itself.", Adapter)
    prompts: Url | None = form_field("Prompts", "A text file with a prompt a line, to judge by.")
    seeds: int | None = number("seeds", "Seeds", "Pictures for each prompt.")

    @field_validator("concepts")
    @classmethod
    def _all_different(cls, concepts: list[Concept]) -> list[Concept]:
        names = [concept.name for concept in concepts]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is there twice. Give every concept a name of its own")
        return concepts


INDEXES, BESIDE = "runs/cache/indexes", "beside"  # the first needs no write access to the folders of the tars
RECOVER_FIELDS: dict[str, Any] = dict(Recover.model_fields)  # for forms that share some of these fields


class Recurring(Group):
    """What is new is trained on, time after time, each generation on top of the one before."""

    model_config = ConfigDict(title="recurring recovery")
    line: Line = form_field("Line", "Of recovered models, each made from the one before; other pictures or another base are another line.", LINE)
    shards: list[Url] = form_field(
        "Shards", "Tars, of which there may be more every time; * stands for any name. They are indexed by the run.",
        lambda: ["data/miniature/shards/ink/train-*.tar"], min_length=1,
    )  # fmt: skip
    heldout: list[Url] = form_field(
        "Held out", "Indexed tars or folders to measure on, always the same and never trained on.",
        lambda: ["data/miniature/shards/ink/heldout-*.tar"], min_length=1,
    )  # fmt: skip
    index: Url = form_field(
        "Indexes", f"A folder for what is in each tar, or {BESIDE}: in the tars' own folders, as `python -m data.index` does it.", INDEXES
    )
    resolution: int | None = number("resolution", "Resolution", "Pixels: side of the square whose area every picture is scaled to.")
    least: int = form_field("At least", "Fewer new samples than these wait for more.", 256, ge=1, le=1_000_000_000)
    epochs: float = form_field("Epochs", "Over what is new.", 1.0, ge=1, le=1000)
    batch: int = number("batch", "Batch", "Pictures per optimizer step, over all processes.", 32)
    tolerance: float = form_field("Tolerance", "By how much the held-out loss may grow, as a share, for a model to be promoted.", 0.01, ge=0, le=1)
    keep: int = form_field("Keep", "How many of the newest generations keep their weights; latest and best do besides.", 3, ge=1, le=10_000)
    experiment: Experiment = RECOVER_FIELDS["experiment"]
    model: Model | None = RECOVER_FIELDS["model"]
    hardware: Hardware | None = RECOVER_FIELDS["hardware"]
    processes: int = RECOVER_FIELDS["processes"]
    seed: Seed = 0
    publish: Url | None = RECOVER_FIELDS["publish"]
    ema: float | None = RECOVER_FIELDS["ema"]
    optim: Optim = RECOVER_FIELDS["optim"]
    checkpoint: Checkpoint = RECOVER_FIELDS["checkpoint"]
    probe: Probe = RECOVER_FIELDS["probe"]


def overrides(form: Group, fields: Collection[str] = ()) -> dict[str, Any]:
    """The form's values as dotted keys of a stage's configuration, without empty fields. `fields`: only these."""
    values = form.model_dump(mode="json", exclude_none=True, exclude={"processes"})
    return _flat({key: value for key, value in values.items() if not fields or key in fields})


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    return {
        k: v
        for key, value in values.items()
        for k, v in (_flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}).items()
    }


def mistakes(error: ValidationError, form: type[Group]) -> list[str]:
    """One sentence per validation error: the key, its value, the error, and the field's description."""
    sentences = []
    for detail in error.errors():
        field = form.model_fields.get(str(detail["loc"][0]))
        description = field.description if field else f"There are {', '.join(form.model_fields)}."
        sentences.append(f"{'.'.join(map(str, detail['loc']))}={detail['input']}: {detail['msg']}. {description}")
    return sentences
