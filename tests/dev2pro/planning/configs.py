"""Composed configurations of stages, and a pipeline folder that holds configurations only."""

import importlib
import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from data.loading.buckets import bucket_sizes
from dev2pro.planning import plan
from dev2pro.planning.account import Account
from stages import frame

ROOT = Path(__file__).resolve().parents[3]
DATA = ("data.train=[a]", "data.heldout=[b]")
REQUIRED = {
    "recover": DATA,
    "lora": (*DATA, "trained_on=black-forest-labs/FLUX.1-dev"),
    "distill": (*DATA, "teacher=black-forest-labs/FLUX.1-dev"),
    "encode": ("to=shards", "shards=[a]"),
    "evaluate": ("loras=[a]", "prompts=data/miniature/prompts.json"),
}
WIDTH = 64  # of an attention head


def composed(stage: str, *overrides: str) -> Any:
    """The configuration of a stage's command, to be planned."""
    schema = getattr(importlib.import_module(f"stages.{stage}"), f"{stage.title()}Config")
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return frame.typed(schema, compose(stage, ["out=runs/x", "plan=true", *REQUIRED[stage], *overrides]))


def planned(stage: str, config: Any) -> Account:
    """What the stage itself would reckon."""
    if stage == "evaluate":
        return plan.estimate(stage, config, [(config.resolution,) * 2], prompts=50)
    shape = config if stage == "encode" else config.data
    return plan.estimate(stage, config, bucket_sizes(shape.resolution, shape.bucket_step, shape.aspect))


def pipeline(folder: Path, heads: int, double: int, single: int) -> Path:
    """Configurations of a FluxPipeline of this many heads and blocks, with small encoders and a judge beside it."""
    parts = {
        "transformer": {
            "_class_name": "FluxTransformer2DModel", "num_layers": double, "num_single_layers": single, "attention_head_dim": WIDTH,
            "num_attention_heads": heads, "joint_attention_dim": 512, "pooled_projection_dim": 256, "in_channels": 64, "guidance_embeds": True,
            "axes_dims_rope": [8, 28, 28],
        },
        "vae": {
            "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [32, 64, 128, 128], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "shift_factor": 0.1,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
        "text_encoder": {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
        "text_encoder_2": {
            "vocab_size": 1000, "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 2, "num_heads": 8, "feed_forward_proj": "gated-gelu",
        },
        "judge": {
            "vision_config": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 16},
            "text_config": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
        },
    }  # fmt: skip
    for name, values in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder
