"""Headers of safetensors files: what the tensors are called, their shapes and types, without their values; and whose format a file is in."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dev2pro.escape import printable

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
LONGEST = 60  # characters of a name or value from a file that a message quotes
POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Header:
    """A file's tensors, name -> shape and name -> type such as "BF16", and its text metadata."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def any(self, pattern: str) -> bool:
        """Whether a regex is found in a tensor's name."""
        return any(re.search(pattern, name) for name in self.shapes)


def read(file: Path) -> Header:
    """The header of a safetensors file. Raises ValueError with the reason for a file that is missing, cut off or something else."""
    if reason := unreadable(file):
        raise ValueError(reason)
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (safe_open is no dict)
            shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            return Header(shapes, {name: str(piece.get_dtype()) for name, piece in slices.items()}, dict(opened.metadata() or {}))
    except (OSError, SafetensorError) as error:
        raise ValueError(_damage(file) or f"cannot be read ({error})") from error


def unreadable(file: Path) -> str:
    """Why any file of a model is not what its name says: it is missing, empty, a pointer or a web page. Empty for others."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except FileNotFoundError:
        return f"is a link to nothing ({file.readlink()})" if file.is_symlink() else "is missing"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if start.startswith(POINTER):
        return "is a pointer of git-lfs and not the file itself: run `git lfs pull` in its repository"
    if start.lstrip()[:1] == b"<":
        return "is a web page that was saved in its place"
    return "" if start else "is empty"


def _damage(file: Path) -> str:
    """How a file that is no whole safetensors file is damaged; empty if its sizes do not say."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        text = opened.read(min(header, 1 << 27))
    if text[:1] != b"{":
        return "is no safetensors file"
    try:
        tensors = json.loads(text)
        expected = 8 + header + max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is cut off within its header" if header + 8 > size else "has a damaged header"
    return f"has {size:,} bytes where its header describes {expected:,}: it is cut off or damaged" if size != expected else ""


# ---- whose format ------------------------------------------------------------------------------------------------------------------

QUANTISED = {  # what quantises -> a regex that finds its tensors
    "bitsandbytes": r"quant_state\.bitsandbytes|\.absmax$|\.SCB$",
    "GPTQ or AWQ": r"\.qweight$|\.qzeros$",
    "nunchaku (SVDQuant)": r"\.smooth_factor$|\.wscales$",
    "scaled fp8": r"(^|\.)scaled_fp8$|\.scale_weight$|\.weight_scale(_inv)?$",
    "optimum-quanto or torchao": r"\.weight\._(data|scale)$|\.weight_qdata$|\.weight:_data$",
}


def quantisation(header: Header) -> str:
    """How the weights are quantised, such as "bitsandbytes, F8_E4M3 weights"; empty for floating-point weights."""
    for method, pattern in QUANTISED.items():
        if header.any(pattern):
            return method
    odd = {kind for name, kind in header.types.items() if kind not in FLOATS and name.endswith((".weight", ".bias"))}
    return f"{min(odd)} weights" if odd else ""


ADAPTERS = {  # type -> a regex that finds its tensors
    "LoKr": r"lokr_w[12]",
    "LoHa": r"hada_w[12]_",
    "OFT": r"\.oft_(blocks|diag|R)",
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoRA": r"lora_(down|up|A|B)\b|\.lora\.(down|up)\.|_lora\d?\.(down|up)\.|lora_(down|up|A|B)\.",
    "full difference": r"\.diff(_b)?$",
}
LAYOUTS = {  # whose names -> a regex that finds them
    "XLabs' format": r"\.processor\..*lora",
    "LyCORIS' format": r"^lycoris_",
    "OneTrainer's legacy format": r"^lora_transformer_",
    "kohya's format": r"^lora_(unet|te\d?)_",
    "the ComfyUI format (names of Black Forest Labs)": r"^diffusion_model\.",
    "PEFT's format": r"^base_model\.model\.",
    "the diffusers format": r"^(transformer|unet|text_encoder(_2)?)\.",
    "the format of Black Forest Labs": r"^(double_blocks|single_blocks)\.",
}
FAMILIES = {  # a model family -> a regex that finds its layers; the first that is found
    "FLUX.2": r"double_stream_modulation|to_qkv_mlp_proj",
    "FLUX.1": r"double_blocks|single_blocks|single_transformer_blocks",
    "Stable Diffusion 3": r"joint_blocks|joint_transformer_blocks|attn2\.to_q.*transformer_blocks_\d+_attn2",
    "Stable Diffusion XL": r"lora_te2_|add_embedding|label_emb|input_blocks_[78]_1_transformer_blocks_[1-9]|conditioner\.embedders\.1",
    "Stable Diffusion": r"down_blocks|up_blocks|input_blocks|output_blocks",
}
TOOLS = {  # a tool -> the metadata key that it writes, and a regex within its value
    "ai-toolkit": ("software", "ai-toolkit"),
    "LyCORIS": ("ss_network_module", "lycoris"),
    "OneTrainer": ("ot_config", ""),
    "musubi-tuner": ("modelspec.implementation", "musubi"),
    "SimpleTuner": ("modelspec.implementation", "(?i)simpletuner"),
    "sd-scripts": ("ss_network_module", r"^networks\."),
}
BASES = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")


def identify(header: Header) -> str:
    """What a file is: "a LoRA in kohya's format for FLUX.1 (ss_base_model_version=flux1), rank 16, made by sd-scripts"."""
    adapter = next((kind for kind, pattern in ADAPTERS.items() if header.any(pattern)), "")
    family = next((f" for {family}" if adapter else f" of {family}" for family, pattern in FAMILIES.items() if header.any(pattern)), "")
    named = next((f" ({key}={_short(header.metadata[key])})" for key in BASES if key in header.metadata), "")
    layout = next((layout for layout, pattern in LAYOUTS.items() if header.any(pattern)), "")
    if not adapter:
        how = f", quantised by {method}" if (method := quantisation(header)) else ""
        whole = {"the ComfyUI format (names of Black Forest Labs)": "the ComfyUI format"}.get(layout, layout)
        return f"a whole model{family}{named}{f' in {whole}' if whole else ''}{how}" if family else f"a file of {len(header.shapes)} tensors{named}"
    rank, tool = _rank(header), next((f", made by {tool}" for tool, (key, value) in TOOLS.items() if _says(header, key, value)), "")
    article = "an" if adapter == "OFT" else "a"
    return f"{article} {adapter}{f' in {layout}' if layout else ''}{family}{named}{f', rank {rank}' if rank else ''}{tool}"


def _says(header: Header, key: str, value: str) -> bool:
    return key in header.metadata and bool(re.search(value, header.metadata[key][:10_000]))


def _rank(header: Header) -> str:
    """The rank, or lowest and highest; from the shapes, or from what kohya's metadata says."""
    halves = r"(lora_down|lora_A|lora\.down|lora\d?\.down)\.?(default\.)?(weight)?$"
    ranks = {shape[0] for name, shape in header.shapes.items() if shape and re.search(halves, name)}
    ranks |= {shape[0] for name, shape in header.shapes.items() if shape and re.search(r"hada_w1_b$|lokr_w[12]_b$", name)}
    if ranks:
        return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    return _short(header.metadata.get("ss_network_dim", ""))


def _short(text: str) -> str:
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")
