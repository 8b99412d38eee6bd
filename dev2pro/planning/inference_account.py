"""What evaluate and encode need, from their configuration and the real modules."""

from collections.abc import Sequence
from typing import Any

from dev2pro.planning import fake_models, fake_runs
from dev2pro.planning.account import (
    JUDGED,
    PROCESS,
    Account,
    Layout,
    Size,
    batch_shape,
    encoding_flops,
    encoding_parts,
    load_encoders,
    offloaded_bytes,
    text_encoder_bytes,
)  # fmt: skip
from dev2pro.planning.fake_runs import nbytes


def evaluation(stage: str, config: Any, sizes: Sequence[Size], prompts: int) -> Account:
    """Of evaluate's or tune's configuration, for pictures of one size: one transformer at a time; the text encoders are gone when it comes."""
    hardware, layout, sampling = config.hardware, Layout.of(config), config.sampling
    encoders, judge = load_encoders(config), fake_models.judge(config.judge)
    style_judge = fake_models.style_judge(path) if (path := getattr(config, "style_judge", None)) else None
    judges = {"judge": nbytes(judge)} | ({"style judge": nbytes(style_judge)} if style_judge else {})
    judging = max(fake_runs.judging(one, JUDGED).peak for one in (judge, style_judge) if one)
    shape = batch_shape(encoders, sizes[0], sampling.batch)
    transformer = fake_models.transformer(config.model.path, hardware.inference, int8=hardware.int8_base, offloaded=hardware.offloaded_blocks)
    forward, decoding = fake_runs.prediction(transformer, shape), fake_runs.picture_decoding(encoders, sampling.batch, sizes[0])
    texts = fake_runs.text_encoding(encoders)
    vae, encoded = nbytes(encoders.pipeline.vae), prompts * encoders.text_bytes()
    weights = nbytes(transformer) - offloaded_bytes(transformer)
    staying: dict[str, float] = {**layout.overhead, **judges, "VAE": vae, "weights": weights, "encodings": encoded}
    pictures = prompts * config.seeds * 3 * sizes[0][0] * sizes[0][1]
    always = {"processes": PROCESS * layout.local, "encodings": encoded * layout.local, "pictures of a cell": 4 * pictures}
    passes = sampling.steps * (2 if sampling.cfg_scale != 1 else 1)
    return Account(
        stage=stage, ranks=layout.ranks, machines=layout.machines,
        gpu={
            "encode": layout.overhead | judges | {"T5 and CLIP": text_encoder_bytes(encoders), "activations": texts.peak},
            "load": staying,
            "sample": staying | {"activations": forward.peak},
            "decode": staying | {"activations": decoding.peak},
            "judge": staying | {"activations": judging},
        },
        host={"load": always | {"weights": nbytes(transformer) * layout.local}, "sample": always},
        disk={"a cell's pictures": pictures},
        flops={"a picture": passes * forward.flops / sampling.batch + decoding.flops / sampling.batch},
    )  # fmt: skip


def encoding(stage: str, config: Any, sizes: Sequence[Size]) -> Account:
    """Of encode's configuration; `sizes` are its buckets, of which the largest counts."""
    hardware, layout = config.hardware, Layout.of(config)
    encoders, size = load_encoders(config), max(sizes, key=lambda size: size[0] * size[1])
    tokens, channels = encoders.token_shape(size)
    sample = {"latents": 2 * tokens * channels * hardware.encoders.itemsize, "text": encoders.text_bytes()}
    always = {"processes": PROCESS * layout.local, "pictures read ahead": config.read.prefetch_mb * 1e6 * layout.local}
    encoding = encoding_parts(encoders, size)
    used = {name: bytes for part in config.parts for name, bytes in encoding[part].items() if name != "activations"}
    return Account(
        stage=stage, ranks=layout.ranks, machines=layout.machines,
        gpu={f"encode {part}": layout.overhead | used | {"activations": encoding[part]["activations"]} for part in config.parts},
        host={"load": always | {"encoders": (nbytes(encoders.pipeline.vae) + text_encoder_bytes(encoders)) * layout.local}},
        disk={f"{part} of a sample": sample[part] for part in config.parts},
        flops={"a picture": encoding_flops(encoders, size, config.parts)},
    )  # fmt: skip
