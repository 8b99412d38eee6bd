"""What a LoRA is made from besides pictures: models and LoRAs that must fit each other, which is known before weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from dev2pro.artifacts import record, store
from dev2pro.errors import ConfigError
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig


@dataclass(frozen=True)
class Origins:
    """Paths: the model that is trained on, an adapter merged into it for that, a LoRA to begin from, the loss's teacher and that one's LoRA."""

    trained_on: str
    training_adapter: str | None = None
    start: str | None = None
    teacher: str | None = None
    teacher_lora: str | None = None

    def parents(self, apply_to: str) -> dict[str, str]:
        """Role -> path of each that there is, and of the model that the LoRA is to be applied to."""
        paths = {"trained_on": self.trained_on, "apply_to": apply_to, "start": self.start, "training_adapter": self.training_adapter}
        paths |= {"teacher": self.teacher, "teacher_lora": self.teacher_lora}
        return {role: path for role, path in paths.items() if path}

    def check(self, adapter: AdapterConfig, guidances: Sequence[float]) -> None:
        """Raises ConfigError for what cannot be read, does not fit, was made for something else or does not know `guidances` (lowest, highest)."""
        lora.check_fit(adapter, flux1.skeleton(self.trained_on), self.trained_on)
        if self.training_adapter:
            self._check_training_adapter(self.training_adapter)
        if self.start:
            skeleton = flux1.skeleton(self.trained_on)
            lora.inject(skeleton, adapter, 0)
            lora.begin_from(skeleton, adapter, store.resolve(self.start))
        if self.teacher and self.teacher_lora:
            self._check_teacher_lora(self.teacher, self.teacher_lora)
        for model in filter(None, (self.trained_on, self.training_adapter)):
            _check_guidance(model, *guidances)

    def _check_training_adapter(self, adapter: str) -> None:
        path = store.resolve(adapter)
        lora.merge(flux1.skeleton(self.trained_on), path)
        contract, base = lora.read(path)[1], record.fingerprint(self.trained_on)
        if contract.get("base", contract.get("trained_on", {}).get("id", base)) != base:  # of extract, and of a LoRA that was trained as an adapter
            raise ConfigError(
                f"training_adapter={adapter} was made for another base than trained_on={self.trained_on}. Give that base, or extract one for this."
            )

    def _check_teacher_lora(self, teacher: str, teacher_lora: str) -> None:
        path = store.resolve(teacher_lora)
        lora.merge(flux1.skeleton(teacher), path)
        trained_on = lora.read(path)[1].get("trained_on")
        if trained_on and trained_on["id"] != record.fingerprint(teacher):
            raise ConfigError(
                f"loss.teacher_lora={teacher_lora} was trained on {trained_on['path']}, not on loss.teacher={teacher}. "
                "Give the LoRA that was trained on the teacher."
            )


def _check_guidance(base: str, low: float, high: float) -> None:
    """Raises ConfigError for training from `low` to `high` on a recovered model that does not know these guidances: its input knows no other.

    A training adapter knows only the guidance of the model that it was extracted from, or those that it was trained at.
    """
    artifact = record.read_if_artifact(store.resolve(base))
    if not artifact or artifact.stage not in ("recover", "extract", "lora"):
        return
    known = artifact.inference.get("training_guidance", artifact.metrics["guidance"])
    first, last = known if isinstance(known, list) else (known, known)
    if not first <= low <= high <= last:
        given = f"guidance={low}" if low == high else f"loss.guidance_range=[{low}, {high}]"
        only, cure = (f"guidance {first}", f"guidance={first}") if first == last else (f"guidances from {first} to {last}", "guidances within these")
        raise ConfigError(
            f"{given}, but {base} was recovered at {only} and knows no other. Set {cure} instead; the guidance people use the LoRA at is "
            "model.usual_guidance, and true CFG is sampling.cfg_scale."
        )
