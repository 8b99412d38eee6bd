import io
import random

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from dev2pro.models import encodings, flow_matching, flux1, sampling
from dev2pro.models.encodings import EncodedBatch, PromptEncoder
from dev2pro.training import distributed, preview
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.preview import Preview, PreviewConfig

CAPTIONS = [f"a handwritten {name}" for name in ("zero", "one", "two", "three", "four", "five", "six")]
CONFIG = PreviewConfig(pictures=3, steps=2, cfg_scale=3.5)
USUAL = 3.5
SHAPE = (16, 16)


class Scene:
    """A model whose guidance and prompts matter, and seven held-out captions."""

    def __init__(self, folder: str) -> None:
        self.model = flux1.ModelConfig(path=folder, usual_guidance=USUAL, max_sequence_length=8)
        self.encoders = flux1.Encoders(self.model, torch.float32, torch.device("cpu"))
        self.prompt_encoder = PromptEncoder(self.model, self.encoders, 1e9)
        self.scheduler = flux1.scheduler_settings(folder)
        mean = torch.zeros(len(CAPTIONS), *SHAPE)
        self.data = EncodedBatch(mean, mean, *self.prompt_encoder.encode(CAPTIONS), (4, 4), tuple(CAPTIONS))
        self.transformer = flux1.load_transformer(folder).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in self.transformer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def preview(self, out, config: PreviewConfig = CONFIG, *, batch: int = 64, seed: int = 0) -> Preview:
        hardware = HardwareConfig(device="cpu", micro_batch=batch)
        accelerator = distributed.accelerator(hardware)
        return Preview(config, self.model, hardware, self.data, self.prompt_encoder, self.scheduler, accelerator, seed=seed, out=str(out))

    def drawn(self, out, guidance: float = 1.0, step: int = 0, **more) -> bytes:
        self.preview(out, **more).draw(self.transformer, step, guidance)
        return (out / f"previews/{step:06d}.jpg").read_bytes()


@pytest.fixture(scope="module")
def scene(tiny) -> Scene:
    return Scene(str(tiny))


def difference(one: bytes, other: bytes) -> float:
    """The largest mean difference of a colour, of 255."""
    return max(ImageStat.Stat(ImageChops.difference(*(Image.open(io.BytesIO(data)) for data in (one, other)))).mean)


@torch.no_grad()
def test_it_shows_what_the_sampler_draws_for_captions_that_are_spread(scene, tmp_path):
    captions = [CAPTIONS[row] for row in (0, 2, 4)]
    conditioning, null_conditioning = (flux1.build_conditioning(*scene.prompt_encoder.encode(some), (4, 4)) for some in (captions, [""] * 3))
    noise = torch.stack([sampling.initial_noise(0, 0, i, SHAPE) for i in range(3)])
    mu = flow_matching.shift_mu(16, scene.scheduler)
    for step, guidance, cfg_scale, how in ((0, 1.0, 3.5, "guidance 1, true CFG 3.5"), (500, USUAL, 1.0, "guidance 3.5")):
        latents = sampling.sample(scene.transformer, noise, conditioning, null_conditioning, guidance=guidance, cfg_scale=cfg_scale, steps=2, mu=mu)
        pixels = (scene.encoders.decode(latents, 32, 32) * 255).round().byte()
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
        assert max(ImageStat.Stat(pictures[0]).stddev) > 5  # it shows something
        wanted = preview.sheet(f"step {step}, {how}", captions, pictures)
        assert difference(scene.drawn(tmp_path, guidance, step), wanted) < 0.1
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["000000.jpg", "000500.jpg", "previews"]


def test_the_same_bytes_again_from_no_random_numbers_but_its_own(scene, tmp_path):
    before = torch.get_rng_state()
    first = scene.drawn(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert scene.drawn(tmp_path) == first
    assert scene.drawn(tmp_path, seed=1) != first


def test_the_pictures_do_not_depend_on_the_micro_batch(scene, tmp_path):
    whole, two, one = (scene.drawn(tmp_path, batch=batch) for batch in (64, 2, 1))
    assert max(difference(whole, two), difference(whole, one)) < 0.1
    assert difference(whole, scene.drawn(tmp_path, seed=1)) > 1


def test_more_pictures_than_captions_are_as_many_as_there_are(scene, tmp_path):
    assert scene.preview(tmp_path, PreviewConfig(pictures=16, steps=1, cfg_scale=1)).captions == CAPTIONS


def test_no_pictures_write_nothing_and_load_no_vae(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(flux1, "load_vae", lambda *_: pytest.fail("it was loaded"))
    scene.preview(tmp_path, PreviewConfig(pictures=0, steps=1, cfg_scale=1)).draw(scene.transformer, 0, 1.0)
    assert not list(tmp_path.iterdir())


def test_a_new_beginning_removes_the_sheets_of_another_run_and_nothing_else(scene, tmp_path):
    scene.drawn(tmp_path, step=500)
    (tmp_path / "previews/mine.jpg").touch()
    (tmp_path / "preview.partial").write_bytes(b"half")
    scene.drawn(tmp_path, step=250)
    assert sorted(file.name for file in (tmp_path / "previews").iterdir()) == ["000250.jpg", "000500.jpg", "mine.jpg"]
    scene.drawn(tmp_path, step=0)
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["000000.jpg", "mine.jpg"]


@pytest.mark.parametrize(("count", "side"), [(1, 1024), (4, 32), (4, 1024), (16, 1024)])
def test_a_sheet_is_small_whatever_is_on_it(count, side):
    dice = random.Random(count)
    pictures = [Image.frombytes("RGB", (side, 3 * side // 4), dice.randbytes(side * (3 * side // 4) * 3)) for _ in range(count)]
    data = preview.sheet("step 500", ["many words of a long caption " * 20] * count, pictures)
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    assert len(data) <= preview.BYTES
    assert image.width >= min(count, 4) * 128
    assert image.width <= 4 * (256 + 16) + 100


def test_captions_go_with_their_prompts():
    def batch(*captions: str) -> EncodedBatch:
        some = torch.zeros(len(captions), *SHAPE)
        return EncodedBatch(some, some, some, some, (4, 4), captions)

    assert encodings.concatenate([batch("a", "b"), batch("c")]).captions == ("a", "b", "c")
