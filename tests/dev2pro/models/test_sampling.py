import pytest
import torch
from diffusers import FluxPipeline

from dev2pro.errors import ConfigError
from dev2pro.models import encodings, flow_matching, flux1, lora, sampling
from dev2pro.models.lora import AdapterConfig
from dev2pro.models.sampling import SamplingConfig

CPU = torch.device("cpu")
SIDE, LENGTH, STEPS = 32, 8, 3
PROMPTS = ["a handwritten one", "the digit two written by hand"]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


class Scene:
    """The same noise and prompts for our sampler and for the stock pipeline."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.stock = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        self.stock.set_progress_bar_config(disable=True)
        model = flux1.ModelConfig(path=folder, usual_guidance=3.5, max_sequence_length=LENGTH)
        self.encoders = flux1.Encoders(model, torch.float32, CPU)
        self.transformer = flux1.load_transformer(folder).eval()
        self.prompt_encoder = encodings.PromptEncoder(model, self.encoders, 1e9)
        shape = self.encoders.token_shape((SIDE, SIDE))
        self.mu = flow_matching.shift_mu(shape[0], flux1.scheduler_settings(folder))
        self.noise = torch.stack([sampling.initial_noise(0, 0, prompt, shape) for prompt in range(len(PROMPTS))])

    def ours(self, guidance: float, cfg_scale: float) -> torch.Tensor:
        given, null = (flux1.build_conditioning(*self.prompt_encoder.encode(prompts), (4, 4)) for prompts in (PROMPTS, ["", ""]))
        return sampling.sample(self.transformer, self.noise, given, null, guidance=guidance, cfg_scale=cfg_scale, steps=STEPS, mu=self.mu)

    def theirs(self, output_type: str, guidance: float, cfg_scale: float) -> torch.Tensor:
        output = self.stock(
            PROMPTS, negative_prompt=["", ""], height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=guidance, true_cfg_scale=cfg_scale,
            latents=self.noise.clone(), max_sequence_length=LENGTH, output_type=output_type,
        )  # fmt: skip
        return output.images

    def agree(self, guidance: float, cfg_scale: float = 1.0) -> None:
        latents = self.ours(guidance, cfg_scale)
        torch.testing.assert_close(latents, self.theirs("latent", guidance, cfg_scale), **TOLERANCE)
        torch.testing.assert_close(self.encoders.decode(latents, SIDE, SIDE), self.theirs("pt", guidance, cfg_scale), **TOLERANCE)


@pytest.fixture(scope="module")
def scene(tiny) -> Scene:
    return Scene(str(tiny))


def adapter(scene: Scene, folder, *, alpha: float) -> str:
    """A LoRA file whose lora_B is not zero, so that it does something."""
    transformer, config = flux1.load_transformer(scene.folder), AdapterConfig(rank=4, alpha=alpha, targets="all")
    lora.inject(transformer, config, 0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    lora.save(transformer, config, str(folder), {})
    return str(folder)


def test_the_start_depends_on_seed_repetition_and_prompt_only():
    first = sampling.initial_noise(0, 1, 2, (16, 16))
    assert first.shape == (16, 16)
    assert torch.equal(first, sampling.initial_noise(0, 1, 2, (16, 16)))
    others = [sampling.initial_noise(*who, (16, 16)) for who in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1))]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("guidance", "cfg_scale"), [(1.0, 1.0), (3.5, 1.0), (1.0, 3.5), (2.0, 6.0)])
def test_ours_is_the_stock_pipeline(scene, guidance, cfg_scale):
    scene.agree(guidance, cfg_scale)


def test_guidance_and_true_cfg_are_two_things(scene):
    plain, guided, free = scene.ours(1.0, 1.0), scene.ours(3.5, 1.0), scene.ours(1.0, 3.5)
    assert min((a - b).abs().max().item() for a, b in [(plain, guided), (plain, free), (guided, free)]) > 100 * TOLERANCE["atol"]


def test_cfg_scale_zero_is_the_empty_prompt(scene):
    null = flux1.build_conditioning(*scene.prompt_encoder.encode(["", ""]), (4, 4))
    empty = sampling.sample(scene.transformer, scene.noise, null, null, guidance=1.0, cfg_scale=1.0, steps=STEPS, mu=scene.mu)
    torch.testing.assert_close(scene.ours(1.0, 0.0), empty, **TOLERANCE)


def test_sampling_leaves_the_noise_alone(scene):
    before = scene.noise.clone()
    scene.ours(1.0, 1.0)
    assert torch.equal(scene.noise, before)


@pytest.mark.parametrize("alpha", [4.0, 10.0], ids=["alpha is the rank", "alpha is not the rank"])
def test_a_lora_of_ours_is_the_same_in_the_stock_pipeline(scene, tmp_path, alpha):
    before = scene.ours(3.5, 1.0)
    folder = adapter(scene, tmp_path, alpha=alpha)
    lora.load_lora(scene.transformer, folder)
    scene.stock.load_lora_weights(folder)
    try:
        scene.agree(3.5)
        assert (scene.ours(3.5, 1.0) - before).abs().max() > 100 * TOLERANCE["atol"]
    finally:
        lora.unload_lora(scene.transformer)
        scene.stock.unload_lora_weights()
    assert torch.equal(scene.ours(3.5, 1.0), before)


def test_a_lora_can_be_loaded_again_and_at_another_strength(scene, tmp_path):
    folder, samples = adapter(scene, tmp_path, alpha=4.0), []
    before = scene.ours(1.0, 1.0)
    for strength in (1.0, 0.0, 0.5, 1.0):
        lora.load_lora(scene.transformer, folder, strength)
        samples.append(scene.ours(1.0, 1.0))
        lora.unload_lora(scene.transformer)
    full, none, half, again = samples
    assert torch.equal(full, again)
    torch.testing.assert_close(none, before, **TOLERANCE)
    assert 0.1 < (half - before).norm() / (full - before).norm() < 0.9


@pytest.mark.parametrize("values", [{"steps": 0, "batch": 1}, {"steps": 1, "batch": 0}, {"steps": -3, "batch": 1}])
def test_values_that_make_no_pictures(values):
    with pytest.raises(ConfigError, match=r"sampling\.steps=.*sampling\.batch=.* 1 or more"):
        SamplingConfig(**values, cfg_scale=1.0).check()
