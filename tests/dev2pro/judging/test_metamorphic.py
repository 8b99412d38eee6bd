"""What must hold whatever the numbers are, on the bundled world's own pictures: the right prompts, the ideal, a LoRA at no strength."""

from pathlib import Path

import pytest
import torch

from dev2pro.judging import metrics
from dev2pro.judging.cells import Inference
from dev2pro.judging.judge import Judge
from dev2pro.judging.prompts import read_prompts
from dev2pro.judging.sampler import Sampler
from dev2pro.models import flux1, lora
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.lora import AdapterConfig
from dev2pro.models.sampling import SamplingConfig

BUNDLE = Path(__file__).parents[3] / "data" / "miniature"
BASE = Inference("base", str(BUNDLE / "pipeline"), 3.5, 1.0)
TEACHER = Inference("teacher", str(BUNDLE / "teacher"), 1.0, 3.5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    """Five phrasings of every digit."""
    prompts = [prompt for group in read_prompts(str(BUNDLE / "prompts.json")) for prompt in group]
    model = ModelConfig(path=BASE.path, usual_guidance=3.5, max_sequence_length=8)
    config = SamplingConfig(steps=12, cfg_scale=3.5, batch=25)
    return Sampler(
        model, config, prompts, seeds=1, seed=0, resolution=32, dtype=torch.float32, encoder_dtype=torch.float32, device=CPU
    )  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(str(BUNDLE / "judge"), CPU)


def pictures(sampler: Sampler, inference: Inference, path: str | None = None) -> torch.Tensor:
    sampler.apply(inference, path)
    return sampler.sample(range(sampler.count))


def test_other_prompts_than_the_pictures_own_destroy_fidelity(sampler, judge):
    features = judge.images(pictures(sampler, TEACHER))[:, None]
    prompts, meaning = judge.prompts(sampler.prompts), torch.arange(50) // 5
    assert metrics.r_precision(features, prompts, meaning).mean() > 0.9
    for shift in (5, 20):  # to the prompts of the next digit, of the fourth
        assert metrics.r_precision(features, prompts.roll(shift, 0), meaning).mean() < 0.1
        assert metrics.clip_score(features, prompts.roll(shift, 0)).mean() < metrics.clip_score(features, prompts).mean() - 10


def test_nothing_is_nearer_to_the_ideal_than_itself(sampler):
    ideal, base = pictures(sampler, TEACHER), pictures(sampler, BASE)
    assert metrics.distance(ideal, pictures(sampler, TEACHER)).max() == 0
    assert metrics.distance(base, ideal).min() > 0
    assert metrics.distance(base.roll(5, 0), ideal).mean() > 3 * metrics.distance(base, ideal).mean(), "another digit's pictures are farther"


def test_a_lora_at_no_strength_has_no_effect_and_a_whole_one_has(tmp_path):
    transformer, adapter = flux1.load_transformer(BASE.path).eval(), AdapterConfig(rank=2, alpha=2, targets="attention")
    other = flux1.load_transformer(BASE.path)
    lora.inject(other, adapter, seed=0)
    for name, value in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    lora.save(other, adapter, str(tmp_path), {})
    draw = torch.Generator().manual_seed(0)
    x, prompt, pooled = (torch.randn(1, *shape, generator=draw) for shape in ((16, 16), (32, 64), (64,)))
    at = x, torch.tensor([0.5]), flux1.build_conditioning(prompt, pooled, (4, 4)), 3.5
    with torch.no_grad():
        before = flux1.predict(transformer, *at)
        changes = []
        for strength in (0.0, 0.5, 1.0):
            lora.load_lora(transformer, str(tmp_path), strength)
            changes.append((flux1.predict(transformer, *at) - before).square().mean().item())
            lora.unload_lora(transformer)
        assert torch.equal(flux1.predict(transformer, *at), before)
    assert changes[0] < 1e-12 < changes[1] < changes[2]
