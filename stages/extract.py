"""extract: what a recovery changed as a training adapter, a LoRA that makes about the recovered model of the base while another LoRA is trained."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dev2pro.artifacts import record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.log import Log
from dev2pro.models import flux1, lora, model_folder
from dev2pro.models.flux1 import ModelConfig
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from stages import frame


@dataclass(slots=True, kw_only=True)
class ExtractConfig:
    """See conf/extract.yaml for what each value is and why."""

    out: str
    seed: int
    model: ModelConfig
    hardware: HardwareConfig
    recovered: str
    rank: int
    publish: str | None = field(default=None, metadata={"identity": False})
    check: bool = field(default=False, metadata={"identity": False})


def run(config: ExtractConfig) -> Artifact | None:
    """Writes the training adapter in the diffusers layout, and artifact.json with the share of the change that each layer lost, into `config.out`."""
    model_folder.check_models(config.model.path, config.model.variant, base=True, recovered=config.recovered)
    parents: record.Parents = {"base": config.model.path, "recovered": config.recovered}
    finished = run_folder.acquire(config.out, "extract", config, parents, look=config.check)
    if finished or config.check:
        return finished or frame.checked("extract", config)
    accelerator = distributed.accelerator(config.hardware)
    base, recovered = (flux1.load_transformer(path, config.hardware.weights, config.model.variant) for path in (config.model.path, config.recovered))
    weights, lost = dict[str, Tensor](), dict[str, float]()
    with Log(config.out, "extract", len(list(base.parameters())), accelerator.is_main_process) as log:
        for number, (name, state, share) in enumerate(lora.extract(base, recovered, config.rank, accelerator.device), 1):
            weights |= state
            if share is not None:
                lost[name] = share
            log.step(number)
    mean, (worst, most) = sum(lost.values()) / len(lost), max(lost.items(), key=lambda one: one[1])
    print(f"extract: rank {config.rank} loses {mean:.1%} of a layer's change in the mean, most, {most:.1%}, in {worst}", flush=True)
    made = record.read_if_artifact(store.resolve(config.recovered))
    guidance = made.metrics["guidance"] if made and made.stage == "recover" else 1.0
    metrics: dict[str, Any] = {"guidance": guidance, "lost": lost, "lost_mean": mean}
    if accelerator.is_main_process:
        lora.write(weights, config.out, {"training_adapter": True, "guidance": guidance, "base": record.fingerprint(config.model.path)})
    return record.publish(accelerator, config.out, "extract", "adapter", config, parents, step=len(weights), metrics=metrics)


if __name__ == "__main__":
    frame.main("extract", ExtractConfig, run)
