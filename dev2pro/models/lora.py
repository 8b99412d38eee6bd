"""LoRA on a FLUX transformer with peft: target modules, the diffusers file format, loading and unloading."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from dev2pro.errors import ConfigError

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name FluxPipeline.load_lora_weights looks for in a folder
CONTRACT = "dev2pro"  # the key of our metadata in the file's header

BLOCKS = r"(single_)?transformer_blocks\.\d+\."
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
MODULATION = r"(norm|norm1|norm1_context)\.linear"
PRESETS = {
    "attention": f"{BLOCKS}({ATTENTION})",
    "attention+mlp": f"{BLOCKS}({ATTENTION}|{FEED_FORWARD})",
    "all": f"{BLOCKS}({ATTENTION}|{FEED_FORWARD}|{MODULATION})",
}


@dataclass(slots=True, kw_only=True)
class AdapterConfig:
    """Size and target modules of a LoRA; see conf/lora.yaml."""

    rank: int
    alpha: float  # the LoRA's effect is scaled by alpha / rank
    targets: str  # a preset (attention, attention+mlp, all) or a regex over module names


def check(config: AdapterConfig) -> str:
    """The regex of a config's targets. Raises ConfigError for an invalid one, before any model is loaded."""
    if config.rank < 1:
        raise ConfigError(f"adapter.rank={config.rank} is no rank. Choose 1 or more; 8 to 32 are usual.")
    try:
        return re.compile(PRESETS.get(config.targets, config.targets)).pattern
    except re.error as error:
        raise ConfigError(f"adapter.targets={config.targets} is neither a preset ({', '.join(PRESETS)}) nor a regex ({error}).") from error


def check_fit(config: AdapterConfig, transformer: FluxTransformer2DModel, base: str) -> None:
    """Raises ConfigError for a rank beyond a target layer's smaller side, before a LoRA is allocated. The transformer may be on the meta device."""
    targets = re.compile(check(config))
    linear = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear) and targets.fullmatch(name)]
    name, layer = min(linear, key=lambda one: min(one[1].weight.shape), default=("", None))
    if layer is not None and config.rank > (smallest := min(layer.weight.shape)):
        raise ConfigError(
            f"adapter.rank={config.rank} is more than {base} has: its layer {name} is {layer.in_features} x {layer.out_features}, so that a "
            f"rank of {smallest} can do all that a larger one can. Choose 1 to {smallest}; 8 to 32 are usual."
        )


def to_int8(transformer: FluxTransformer2DModel, device: torch.device) -> None:
    """Rounds the linear layers of the blocks to int8 with one scale a row (torchao), moving each to `device`; the rest is unchanged.

    The modulation keeps its precision: its outputs scale and shift everything in the block.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig(), filter_fn=block_linear, device=device)


def block_linear(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of a block, and not of its modulation."""
    return isinstance(module, torch.nn.Linear) and "blocks." in name and not re.fullmatch(BLOCKS + MODULATION, name)


class MasterLinear(torch.nn.Linear):
    """A linear layer with float32 weights that computes in its input's precision."""

    def forward(self, input: Tensor) -> Tensor:
        """As Linear's."""
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


def inject(transformer: FluxTransformer2DModel, config: AdapterConfig, seed: int) -> None:
    """Freezes the transformer and adds a LoRA that has no effect yet; its random half depends on `seed` only."""
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=check(config)))
        except ValueError as error:
            raise ConfigError(
                f"adapter.targets={config.targets} must match linear layers of this transformer, and nothing else. Presets: {', '.join(PRESETS)}."
            ) from error
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # else peft computes in the LoRA's own precision
            for half in (module.lora_A["default"], module.lora_B["default"]):
                half.__class__, half.weight.data = MasterLinear, half.weight.data.float()  # trained in float32, whatever the base's dtype


@contextmanager
def switched_off(transformer: torch.nn.Module) -> Iterator[None]:
    """The transformer as it is without the LoRA in it. peft's own switch also freezes the LoRA's weights, which data parallelism would notice."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save(transformer: FluxTransformer2DModel, config: AdapterConfig, out: str, contract: dict[str, Any]) -> None:
    """Writes `out`/pytorch_lora_weights.safetensors in the diffusers layout, keys `transformer.<module>.lora_A.weight` and `lora_B`.

    alpha / rank is multiplied into lora_B, so that alpha equals the rank in the file: readers that ignore alpha read it correctly.
    """
    state = {}
    for name, value in get_peft_model_state_dict(transformer).items():
        scale = config.alpha / config.rank if "lora_B" in name else 1.0
        state[f"transformer.{name}"] = (value.float() * scale).contiguous().cpu()
    write(state, out, contract)


def write(state: dict[str, Tensor], out: str, contract: dict[str, Any]) -> None:
    """Writes the weights of a LoRA file, with a contract in its header, as `out`/pytorch_lora_weights.safetensors."""
    content = serialized(state, {"format": "pt", CONTRACT: json.dumps(contract, sort_keys=True)})
    partial = Path(out) / f"{WEIGHTS}.partial"
    with partial.open("wb") as file:
        file.write(_in_order(content))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(Path(out) / WEIGHTS)


def _in_order(content: bytes) -> bytes:
    """The file with its metadata in alphabetical order; safetensors itself shuffles it at every call."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, contract) of a LoRA file or folder; the contract is empty for a LoRA that dev2pro did not write."""
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (safe_open is no dict)
            contract = json.loads((opened.metadata() or {}).get(CONTRACT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file} is no readable LoRA ({error}). Give the folder or .safetensors file that a LoRA stage wrote.") from error
    return weights, contract


def _fitting(transformer: FluxTransformer2DModel, path: str) -> dict[str, Tensor]:
    """The weights of a LoRA. Raises ConfigError if any is for a module that the transformer lacks, which diffusers would skip with a warning."""
    weights, _ = read(path)
    modules = {f"transformer.{name}" for name, _ in transformer.named_modules()}
    unknown = [key for key in weights if re.sub(r"(\.lora_[AB])?\.(weight|bias)$", "", key) not in modules]
    if unknown or not weights:
        raise ConfigError(
            f"The LoRA {path} does not fit this transformer ({unknown[0] if unknown else 'it is empty'}). Apply it to the model family it was "
            "trained on."
        )
    return weights


def load_lora(transformer: FluxTransformer2DModel, path: str, strength: float = 1.0) -> None:
    """Loads a LoRA file into the transformer; `unload_lora` restores the transformer exactly."""
    weights = _fitting(transformer, path)
    try:
        transformer.load_lora_adapter(weights, prefix="transformer", adapter_name="style")
        transformer.set_adapters("style", strength)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"The LoRA {path} does not fit this transformer ({str(error).splitlines()[0]}). Apply it to the model family it was trained on."
        ) from error


def merge(transformer: FluxTransformer2DModel, path: str) -> None:
    """Adds a LoRA to the weights themselves: computed in float32, then rounded to their type. On the meta device it checks only that it fits.

    Also what `extract` adds to the layers' weights: differences of biases, and the norms' own weights.
    """
    weights = {key: value.to(transformer.device, torch.float32) for key, value in _fitting(transformer, path).items()}
    parameters, change = dict(transformer.named_parameters()), dict[str, Tensor]()
    for key in weights:
        name = key.removeprefix("transformer.")
        if name.endswith(".lora_A.weight"):
            up, down = weights.get(key.replace("lora_A", "lora_B")), weights[key]
            change[name.replace(".lora_A", "")] = down.new_empty(0) if up is None or up.shape[1] != len(down) else up @ down
        elif name.endswith(".lora_B.bias"):
            change[name.replace(".lora_B", "")] = weights[key]
        elif ".lora_" not in name:
            change[name] = weights[key] - parameters[name].data.float() if name in parameters else weights[key]
    for name, difference in change.items():
        if name not in parameters or parameters[name].shape != difference.shape:
            raise ConfigError(f"The LoRA {path} does not fit this transformer ({name}). Apply it to the model family it was trained on.")
        parameters[name].data = (parameters[name].data.float() + difference).to(parameters[name].dtype)


def extract(
    base: FluxTransformer2DModel, tuned: FluxTransformer2DModel, rank: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor], float | None]]:
    """What a fine-tune has changed, as a LoRA file's weights of at most this rank: (parameter, its part of the file, the share that is lost).

    The share of the change's squared size, for a linear layer's weight; 0 for a rank that holds all of it. Biases are kept whole (as `lora_B.bias`,
    which diffusers reads too), and so are norms, as the fine-tune has them. The largest singular values are the best approximation of their
    rank (Eckart and Young 1936); Hu et al. 2021 for the form.
    """
    other = dict(tuned.named_parameters())
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in base.named_parameters():
        (module, _, part), after = name.rpartition("."), other[name].data.to(device, torch.float32)
        difference = after - parameter.data.to(device, torch.float32)
        if module not in linear:
            yield name, {f"transformer.{name}": after.cpu()}, None
        elif part == "bias":
            yield name, {f"transformer.{module}.lora_B.bias": difference.cpu()}, None
        else:
            left, sizes, right = _largest(difference, rank)
            root, whole = sizes.sqrt(), difference.square().sum().item()
            halves = {"A": (right * root).T, "B": left * root}
            state = {f"transformer.{module}.lora_{half}.weight": value.contiguous().cpu() for half, value in halves.items()}
            yield name, state, max(0.0, 1 - sizes.square().sum().item() / whole) if whole else 0.0


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values (R,) with their left (M, R) and right (N, R) vectors; large matrices by random projections."""
    if 4 * rank < min(matrix.shape):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(matrix, q=2 * rank, niter=8)
    else:
        left, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
        right = rows.T
    return left[:, :rank], sizes[:rank], right[:, :rank]


def begin_from(transformer: FluxTransformer2DModel, config: AdapterConfig, path: str) -> None:
    """Sets the weights that `inject` added to those of a LoRA file. Raises ConfigError unless that has the same layers and rank.

    On the meta device it checks only that.
    """
    weights, _ = read(path)
    own = {f"transformer.{name}": name for name in get_peft_model_state_dict(transformer)}
    parameters = dict(transformer.named_parameters())
    shapes = {key: parameters[_parameter(name)].shape for key, name in own.items()}
    if {key: value.shape for key, value in weights.items()} != shapes:
        raise ConfigError(
            f"start={path} has other layers or another rank than adapter.rank={config.rank} adapter.targets={config.targets} make. Set these as it "
            "was trained."
        )
    for key, name in own.items():
        scale = config.rank / config.alpha if "lora_B" in name else 1.0  # in the file alpha equals the rank
        parameters[_parameter(name)].data.copy_(weights[key].float() * scale)


def _parameter(name: str) -> str:
    """The parameter of a name in peft's state."""
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)


def unload_lora(transformer: FluxTransformer2DModel) -> None:
    """Removes the LoRA of `load_lora`."""
    transformer.unload_lora()
