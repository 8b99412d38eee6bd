"""What a finished LoRA was trained on and at which guidance, from its record, and whether that model is here."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import FluxTransformer2DModel

from dev2pro.artifacts import record, store
from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.models import flux1, lora, model_folder
from dev2pro.models.flux1 import ModelConfig


@dataclass(frozen=True)
class TrainedModel:
    """A model as a LoRA's training had it: a transformer, a training adapter merged into it, the guidance input bypassed."""

    path: str
    adapter: str | None = None
    bypass_guidance: bool = False

    def __str__(self) -> str:
        adapter = f" with the training adapter {self.adapter}" if self.adapter else ""
        return f"{self.path}{adapter}{' without its guidance input' if self.bypass_guidance else ''}"

    def apply(self, transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
        """Makes the transformer of `path` what was trained on, and returns it."""
        if self.adapter:
            lora.merge(transformer, store.resolve(self.adapter))
        if self.bypass_guidance:
            flux1.bypass_guidance(transformer)
        return transformer


@dataclass(frozen=True)
class Training:
    """A LoRA's training: its model, and the guidance, the usual one if it was a range. `missing`: in words, why the model is not to be had."""

    model: TrainedModel
    guidance: float
    missing: str = ""


def read(path: str, base: ModelConfig) -> Training:
    """The training of a LoRA's folder or file, which is to be put on `base`. The base itself is known by its contents, wherever it lay.

    Raises ConfigError for a damaged record.
    """
    folder = Path(store.resolve(path))
    artifact = record.read_if_artifact(str(folder.parent if folder.name == lora.WEIGHTS else folder))
    contract = artifact.inference if artifact else {}
    if not artifact or not {"trained_on", "training_guidance"} <= contract.keys():
        return Training(TrainedModel(""), base.usual_guidance, "no record beside it says what it was trained on")
    guidance, model = contract["training_guidance"], contract["trained_on"]
    adapter = next((parent for parent in artifact.parents if parent["role"] == "training_adapter"), None)
    is_base = model["id"] == record.fingerprint(base.path)
    training = Training(
        TrainedModel(
            path=base.path if is_base else str(model["path"]),
            adapter=adapter["uri"] if adapter else None,
            bypass_guidance=bool(artifact.config.get("loss", {}).get("bypass_guidance")),
        ),
        base.usual_guidance if isinstance(guidance, list) else float(guidance),
    )
    return Training(training.model, training.guidance, _missing(training.model, base, model["id"], adapter["id"] if adapter else ""))


def _missing(model: TrainedModel, base: ModelConfig, id: str, adapter_id: str) -> str:
    """Why a model cannot be loaded as it was; empty if it can."""
    try:
        for path, recorded in ((model.path, id), (model.adapter, adapter_id)):
            if path and record.fingerprint(path) != recorded:
                return f"{path}, which it was trained on, is not here or is another one now"
        model_folder.check_models(base.path, base.variant, base=True, trained_on=model.path)
        if model.adapter:
            lora.read(store.resolve(model.adapter))
    except (ConfigError, TryAgainError) as error:
        return f"what it was trained on cannot be loaded ({error})"
    return ""
