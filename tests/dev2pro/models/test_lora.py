import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from dev2pro.errors import ConfigError
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig

ATTENTION = {"transformer_blocks": 8, "single_transformer_blocks": 3}  # modules a block: q, k, v and out, twice in a double block
MLP = {"transformer_blocks": 4, "single_transformer_blocks": 2}
MODULATION = {"transformer_blocks": 2, "single_transformer_blocks": 1}
PRESETS = {"attention": [ATTENTION], "attention+mlp": [ATTENTION, MLP], "all": [ATTENTION, MLP, MODULATION]}
CONTRACT = {"arm": "recovered@1", "apply_to": {"path": "black-forest-labs/FLUX.1-dev"}}


@pytest.fixture
def transformer(tiny) -> FluxTransformer2DModel:
    return flux1.load_transformer(str(tiny)).eval()


@pytest.fixture(scope="module")
def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer without its weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
            pooled_projection_dim=768, in_channels=64, guidance_embeds=True,
        )  # fmt: skip


def config(rank: int = 4, alpha: float = 4.0, targets: str = "attention") -> AdapterConfig:
    return AdapterConfig(rank=rank, alpha=alpha, targets=targets)


def trained(transformer: FluxTransformer2DModel, adapter: AdapterConfig, seed: int = 0) -> FluxTransformer2DModel:
    """A transformer with a LoRA that has an effect."""
    lora.inject(transformer, adapter, seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return transformer


@torch.no_grad()
def output(transformer: FluxTransformer2DModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    x, prompt, pooled = (torch.randn(2, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
    conditioning = flux1.Conditioning(prompt, pooled, torch.zeros(8, 3), flux1.image_ids(4, 4, torch.device("cpu"), torch.float32))
    return flux1.predict(transformer, x, torch.tensor([0.2, 0.9]), conditioning, 3.5)


def adapted_modules(transformer: FluxTransformer2DModel) -> list[str]:
    """The modules that have a LoRA."""
    return [name.removesuffix(".lora_A.default.weight") for name, _ in transformer.named_parameters() if name.endswith("lora_A.default.weight")]


# ---- target modules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "parts"), PRESETS.items())
def test_a_preset_reaches_every_block_of_the_tiny_model(transformer, preset, parts):
    lora.inject(transformer, config(targets=preset), 0)
    for kind, count in (("transformer_blocks", 2), ("single_transformer_blocks", 2)):
        of_kind = [name for name in adapted_modules(transformer) if name.startswith(f"{kind}.")]
        assert len(of_kind) == count * sum(part[kind] for part in parts)


def test_flux_dev_is_flux_dev(flux_dev):
    assert sum(p.numel() for p in flux_dev.parameters()) == 11_901_408_320


@pytest.mark.parametrize(("preset", "count"), [("attention", 266), ("attention+mlp", 418), ("all", 494)])
def test_a_preset_reaches_every_block_of_flux_dev(flux_dev, preset, count):
    chosen = {name: module for name, module in flux_dev.named_modules() if re.fullmatch(lora.check(config(targets=preset)), name)}
    assert all(isinstance(module, torch.nn.Linear) for module in chosen.values())
    assert (
        len(chosen)
        == count
        == 19 * sum(p["transformer_blocks"] for p in PRESETS[preset]) + 38 * sum(p["single_transformer_blocks"] for p in PRESETS[preset])
    )


def test_a_lora_on_flux_dev_has_the_usual_names_and_shapes(flux_dev):
    lora.inject(flux_dev, config(rank=1, alpha=1, targets="all"), 0)
    shapes = {name: tuple(p.shape) for name, p in flux_dev.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 494
    for name, (inward, outward) in {
        "transformer_blocks.18.attn.to_q": (3072, 3072),
        "transformer_blocks.0.attn.to_out.0": (3072, 3072),
        "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
        "transformer_blocks.7.attn.to_add_out": (3072, 3072),
        "transformer_blocks.7.ff.net.0.proj": (3072, 12288),
        "transformer_blocks.7.ff_context.net.2": (12288, 3072),
        "transformer_blocks.7.norm1_context.linear": (3072, 6 * 3072),
        "single_transformer_blocks.37.attn.to_v": (3072, 3072),
        "single_transformer_blocks.37.proj_mlp": (3072, 12288),
        "single_transformer_blocks.0.proj_out": (3072 + 12288, 3072),
        "single_transformer_blocks.0.norm.linear": (3072, 3 * 3072),
    }.items():
        assert shapes[f"{name}.lora_A.default.weight"] == (1, inward)
        assert shapes[f"{name}.lora_B.default.weight"] == (outward, 1)


def test_a_regex_of_ones_own(transformer):
    lora.inject(transformer, config(targets=r"single_transformer_blocks\.1\.attn\.to_q|x_embedder"), 0)
    assert adapted_modules(transformer) == ["x_embedder", "single_transformer_blocks.1.attn.to_q"]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (config(rank=0), r"adapter\.rank=0 .*Choose 1 or more"),
        (config(rank=-4), r"adapter\.rank=-4"),
        (config(targets="to_q("), r"adapter\.targets=to_q\( .*attention\+mlp.*regex"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_before_a_model_is_loaded(adapter, message):
    with pytest.raises(ConfigError, match=message):
        lora.check(adapter)


def test_a_rank_beyond_a_layer_is_refused_before_anything_is_allocated(tiny):
    skeleton = flux1.skeleton(str(tiny))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    side = skeleton.transformer_blocks[0].attn.to_q.in_features
    lora.check_fit(config(rank=side), skeleton, "a base")
    lora.check_fit(config(rank=100_000, targets="nothing_of_it"), skeleton, "a base")
    with pytest.raises(ConfigError, match=rf"adapter\.rank={side + 1} is more than a base has: its layer .*to_q is {side} x .* Choose 1 to {side};"):
        lora.check_fit(config(rank=side + 1), skeleton, "a base")


@pytest.mark.parametrize("targets", ["attentoin", r"transformer_blocks\.0", ".*", ""])
def test_targets_that_fit_no_linear_layer(transformer, targets):
    with pytest.raises(ConfigError, match=rf"(?s)adapter\.targets={re.escape(targets)} .*Presets: attention") as caught:
        lora.inject(transformer, config(targets=targets), 0)
    assert str(caught.value).count("\n") == 0, "one paragraph"


# ---- before training -------------------------------------------------------------------------------------------------------------


def test_a_new_lora_has_no_effect_and_is_all_that_learns(transformer):
    before = output(transformer)
    lora.inject(transformer, config(rank=3, targets="all"), 0)
    assert torch.equal(output(transformer), before)
    learning = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert learning == {f"{module}.lora_{half}.default.weight" for module in adapted_modules(transformer) for half in "AB"}


def test_a_lora_learns_in_float32_on_a_bfloat16_base(tiny):
    transformer = flux1.load_transformer(str(tiny), torch.bfloat16)
    lora.inject(transformer, config(), 0)
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_beginning_depends_on_the_seed_only(tiny):
    def beginning(seed: int) -> dict[str, torch.Tensor]:
        transformer = flux1.load_transformer(str(tiny))
        lora.inject(transformer, config(), seed)
        return {name: p.detach() for name, p in transformer.named_parameters() if "lora_A" in name}

    first = beginning(7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second, other = beginning(7), beginning(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# ---- the file --------------------------------------------------------------------------------------------------------------------


def test_the_file_is_in_the_diffusers_layout_with_its_contract(transformer, tmp_path):
    adapter = config(rank=2, targets="all")
    lora.save(trained(transformer, adapter), adapter, str(tmp_path), CONTRACT)
    weights, contract = lora.read(str(tmp_path))
    assert contract == CONTRACT
    assert set(weights) == {f"transformer.{module}.lora_{half}.weight" for module in adapted_modules(transformer) for half in "AB"}
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert all(weights[key].shape[0] == 2 for key in weights if "lora_A" in key)
    assert all(weights[key].shape[1] == 2 for key in weights if "lora_B" in key)
    with safe_open(tmp_path / lora.WEIGHTS, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert json.loads(opened.metadata()["dev2pro"]) == CONTRACT
    assert lora.read(str(tmp_path / lora.WEIGHTS))[1] == CONTRACT  # the file itself will do


@pytest.mark.parametrize("alpha", [4.0, 10.0, 1.0])
def test_what_was_trained_is_what_is_loaded(tiny, transformer, tmp_path, alpha):
    adapter = config(rank=4, alpha=alpha, targets="all")
    after_training = output(trained(transformer, adapter))
    lora.save(transformer, adapter, str(tmp_path), CONTRACT)
    fresh = flux1.load_transformer(str(tiny)).eval()
    before = output(fresh)
    lora.load_lora(fresh, str(tmp_path))
    torch.testing.assert_close(output(fresh), after_training, rtol=1e-4, atol=1e-5)
    assert (output(fresh) - before).abs().max() > 0.01
    lora.unload_lora(fresh)
    assert torch.equal(output(fresh), before)
    assert adapted_modules(fresh) == []


def test_a_lora_of_another_tool_has_no_contract(transformer, tmp_path):
    adapter = config()
    lora.save(trained(transformer, adapter), adapter, str(tmp_path), CONTRACT)
    weights, _ = lora.read(str(tmp_path))
    save_file(weights, tmp_path / "plain.safetensors")
    assert lora.read(str(tmp_path / "plain.safetensors"))[1] == {}


def test_files_that_are_no_lora(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    (tmp_path / "empty").mkdir()
    for path, named in (("damaged.safetensors", "damaged"), ("missing.safetensors", "missing"), ("empty", lora.WEIGHTS)):
        with pytest.raises(ConfigError, match=rf"{named}.* is no readable LoRA"):
            lora.read(str(tmp_path / path))


Q = "transformer_blocks.0.attn.to_q"
STRANGERS = {
    "other shapes": {f"transformer.{Q}": (77, 55)},
    "other names": {"transformer.down_blocks.0.attn": (96, 96)},
    "other prefix": {"unet.attn.to_q": (96, 96)},
    "more blocks": {f"transformer.{Q}": (96, 96), "transformer.transformer_blocks.7.attn.to_q": (96, 96)},
    "nothing": {},
}


@pytest.mark.parametrize("modules", STRANGERS.values(), ids=STRANGERS)
def test_a_lora_of_another_model_is_refused_and_leaves_nothing_behind(transformer, tmp_path, modules):
    before = output(transformer)
    weights = {f"{name}.lora_A.weight": torch.ones(4, inward) for name, (inward, _) in modules.items()}
    weights |= {f"{name}.lora_B.weight": torch.ones(outward, 4) for name, (_, outward) in modules.items()}
    save_file(weights, tmp_path / "stranger.safetensors")
    with pytest.raises(ConfigError, match=r"The LoRA .*stranger\.safetensors does not fit"):
        lora.load_lora(transformer, str(tmp_path / "stranger.safetensors"))
    assert torch.equal(output(transformer), before)
    adapter = config()
    lora.save(trained(FluxTransformer2DModel.from_config(transformer.config), adapter), adapter, str(tmp_path), CONTRACT)
    lora.load_lora(transformer, str(tmp_path))  # the failed load leaves nothing behind
    assert not torch.equal(output(transformer), before)
    lora.unload_lora(transformer)
    assert torch.equal(output(transformer), before)
