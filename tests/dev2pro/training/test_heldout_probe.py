from pathlib import Path

import pytest
import torch
import yaml

from dev2pro.models import flow_matching, flux1
from dev2pro.models.encodings import EncodedBatch
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig

COUNT, BINS = 5, 4
SCHEDULER = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 4096}
MU = 0.5  # of 16 tokens
CONFIG = ProbeConfig(every=1, samples=COUNT, bins=BINS)


@pytest.fixture(scope="module")
def data() -> EncodedBatch:
    draw = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(COUNT + 2, 8, 64, generator=draw), torch.randn(COUNT + 2, 64, generator=draw)
    mean = torch.randn(COUNT + 2, 16, 16, generator=draw)
    return EncodedBatch(mean, torch.full_like(mean, 9.0), prompt, pooled, (4, 4))


@pytest.fixture(scope="module")
def transformer(tiny):
    return flux1.load_transformer(str(tiny)).eval()


@pytest.fixture(scope="module")
def teacher(tiny):
    model = flux1.load_transformer(str(tiny)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.proj_out.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def probe(data: EncodedBatch, *, batch: int = 64, seed: int = 0, config: ProbeConfig = CONFIG) -> HeldoutProbe:
    accelerator = distributed.accelerator(HardwareConfig(device="cpu"))
    return HeldoutProbe(data, config, accelerator, scheduler=SCHEDULER, seed=seed, batch=batch)


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a)


def test_times_are_the_quantiles_of_the_training_distribution(data):
    times = probe(data, config=ProbeConfig(every=1, samples=1, bins=8)).times
    drawn = flow_matching.training_timesteps(torch.randn(100_000), MU)
    quantiles = torch.quantile(drawn, (torch.arange(8) + 0.5) / 8)
    torch.testing.assert_close(times, quantiles, rtol=0, atol=0.01)
    assert (times.diff() > 0).all()


@torch.no_grad()
def test_the_numbers_by_loop(data, transformer, teacher):
    heldout_probe = probe(data)
    heldout_probe.set_teacher(teacher)
    losses, usual, gap, distance = [], 0.0, 0.0, 0.0
    for t in heldout_probe.times:
        of_time = 0.0
        for i in range(COUNT):
            x0, noise = data.mean[i, None], heldout_probe.noise[i, None]  # the mean: no draw from the posterior
            x_t = (1 - t) * x0 + t * noise
            conditioning = flux1.build_conditioning(data.prompt[i, None], data.pooled[i, None], (4, 4))
            models = ((transformer, 1.0), (transformer, 3.5), (teacher, 1.0))
            v, w, ideal = (flux1.predict(model, x_t, t[None], conditioning, g) for model, g in models)
            of_time += (v - (noise - x0)).square().mean().item() / COUNT
            usual += (w - (noise - x0)).square().mean().item() / COUNT / BINS
            gap += (v - w).square().mean().item() / COUNT / BINS
            distance += (v - ideal).square().mean().item() / COUNT / BINS
        losses.append(of_time)
    expected = {"loss": sum(losses) / BINS, "loss_by_time": losses, "loss_usual": usual, "guidance_gap": gap, "teacher_distance": distance}
    assert close(heldout_probe.measure(transformer, 1.0, 3.5), expected)
    assert min(gap, distance) > 1e-4  # so that the comparisons are not trivial
    assert max(losses) - min(losses) > 1e-2


def test_the_numbers_do_not_depend_on_the_batch(data, transformer, teacher):
    metrics = []
    for batch in (1, 2, COUNT, 64):
        heldout_probe = probe(data, batch=batch)
        heldout_probe.set_teacher(teacher)
        metrics.append(heldout_probe.measure(transformer, 1.0, 3.5))
    assert all(close(metrics[0], other) for other in metrics[1:])


def test_looking_twice_sees_the_same(data, transformer):
    first = probe(data).measure(transformer, 1.0, 3.5)
    torch.manual_seed(8)
    assert probe(data).measure(transformer, 1.0, 3.5) == first
    assert probe(data, seed=1).measure(transformer, 1.0, 3.5) != first


def test_the_teacher_is_no_distance_from_itself(data, transformer, teacher):
    heldout_probe = probe(data)
    assert "teacher_distance" not in heldout_probe.measure(transformer, 1.0, 3.5)
    heldout_probe.set_teacher(teacher)
    assert heldout_probe.measure(teacher, 1.0, 3.5)["teacher_distance"] == 0
    assert heldout_probe.measure(transformer, 1.0, 3.5)["teacher_distance"] > 0


def test_equal_guidances_have_no_gap(data, transformer):
    metrics = probe(data).measure(transformer, 3.5, 3.5)
    assert metrics["guidance_gap"] == 0
    assert metrics["loss"] == pytest.approx(metrics["loss_usual"])


def test_more_samples_than_there_are(data, transformer):
    many = probe(data, config=ProbeConfig(every=1, samples=1000, bins=2))
    assert many.count == len(data)
    assert len(many.measure(transformer, 1.0, 3.5)["loss_by_time"]) == 2


def test_measuring_leaves_no_gradient(data, transformer):
    probe(data).measure(transformer, 1.0, 3.5)
    assert all(p.grad is None for p in transformer.parameters())


@pytest.mark.parametrize(("stage", "a_sample"), [("lora", 66.2), ("recover", 86.0)])
def test_at_full_size_measuring_costs_little_beside_the_training(stage, a_sample):
    """In forward passes of one picture, of 21.5 TFLOP at 512 px; training on a sample, with gradient checkpointing, is `a_sample`."""
    config = yaml.safe_load((Path(__file__).resolve().parents[3] / f"conf/{stage}.yaml").read_text())
    forwards = 2 * config["probe"]["samples"] * config["probe"]["bins"]  # at two guidances
    assert forwards / (config["probe"]["every"] * config["batch"] * a_sample / 21.5) < 0.05
