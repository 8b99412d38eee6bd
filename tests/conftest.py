"""A whole FLUX pipeline, a judge and a data set, so small and so untrained that making them takes a second; one thread, no network."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # read when torch and transformers are imported

signal.signal(signal.SIGINT, signal.default_int_handler)  # started with & by a script, all of its children would ignore it

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")

MINUTES = ("tests/flows/test_pipeline.py", "tests/stages/")  # what takes longest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(MINUTES))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked gpu where torch finds none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [f"a handwritten {name}" for name in ("zero", "one", "two", "three", "four", "five")]


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run_stage(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `python -m stages.<name> args...` in this process, which spares the seconds of a new one: (exit code, stderr)."""
    from stages import frame

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def started(name: str, *args: str) -> tuple[int, str]:
        module = importlib.import_module(f"stages.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            frame.main(name, getattr(module, f"{name.title()}Config"), module.run)
        return end.value.code, capfd.readouterr().err

    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[float], Path]]:
    """Makes a file system of so many MiB."""
    mounts: list[Path] = []

    def mounted(mib: float) -> Path:
        mounts.append(tmp_path / f"disk-{len(mounts)}")
        mounts[-1].mkdir()
        size = f"size={int(mib * 1024)}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mounts[-1]], capture_output=True, check=False).returncode:
            pytest.skip("no file systems may be mounted here")
        return mounts[-1]

    yield mounted
    for mount in mounts:
        subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def _clip(seed: int):
    import torch
    from transformers import CLIPConfig, CLIPModel

    from stages import miniature

    tokens, _ = miniature.tokenizers()
    shared = {"hidden_size": miniature.WIDTH, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": miniature.WIDTH}
    text = {"vocab_size": len(tokens), "num_hidden_layers": 2, "max_position_embeddings": miniature.TOKENS, "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=miniature.WIDTH)).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder with random weights, made as stages.miniature makes its own; read it, and copy it before changing it."""
    import torch
    from diffusers import AutoencoderKL

    from stages import miniature

    config = miniature.MiniatureConfig(out="", part="pipeline", seed=0, vae_steps=0, clip_steps=0, judge_steps=0, vae_batch=0, clip_batch=0, lr=0)
    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=miniature.LATENT_CHANNELS, block_out_channels=(8, 24, 48), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, sample_size=32, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    miniature.save_pipeline(config, vae, _clip(2), *miniature.tokenizers(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with random weights."""
    from stages import miniature

    folder = tmp_path_factory.mktemp("tiny_clip") / "judge"
    miniature.save_judge(_clip(3), miniature.tokenizers()[0], folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2Model folder with random weights and embeddings of 48 numbers, larger than its processor's pictures as facebook/dinov2-base is."""
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("tiny_dino") / "judge"
    torch.manual_seed(4)
    Dinov2Model(Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=48)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures of 32x32, as `folder/` and as `shard.tar`; two others with the last two captions as `heldout.tar`. Indexed."""
    import io

    import numpy as np
    import webdataset
    from PIL import Image

    from data.index import index
    from data.storage.transport import ReadConfig, Transport

    folder = tmp_path_factory.mktemp("tiny_data")
    (folder / "folder").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS) + 2, 8, 8, 3), dtype=np.uint8)
    samples = []
    for i, (pixels, caption) in enumerate(zip(noise, CAPTIONS + CAPTIONS[-2:], strict=True)):
        encoded = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(encoded, "PNG")
        samples.append({"__key__": f"{i:04d}", "png": encoded.getvalue(), "txt": caption})
        if i < len(CAPTIONS):
            (folder / "folder" / f"{i:04d}.png").write_bytes(encoded.getvalue())
            (folder / "folder" / f"{i:04d}.txt").write_text(caption + "\n")
    for name, members in (("shard.tar", samples[: len(CAPTIONS)]), ("heldout.tar", samples[len(CAPTIONS) :])):
        with webdataset.TarWriter(str(folder / name)) as shard:
            for sample in members:
                shard.write(sample)
        assert not index(str(folder / name), Transport(ReadConfig())).error
    return folder
