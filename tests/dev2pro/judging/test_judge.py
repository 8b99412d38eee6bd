import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.judging import judge
from dev2pro.judging.cell_store import CellFiles
from dev2pro.judging.judge import Judge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge_model(tiny_clip) -> Judge:
    return Judge(str(tiny_clip), CPU)


def test_embeddings_are_unit_vectors_one_for_each(judge_model):
    images = judge_model.images(torch.rand(5, 3, 32, 32))
    prompts = judge_model.prompts(["a handwritten one", "a handwritten two"])
    assert (images.shape, prompts.shape) == ((5, 64), (2, 64))
    for embeddings in (images, prompts):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
        assert embeddings.dtype == torch.float32


def test_pictures_and_prompts_are_told_apart(judge_model):
    pictures = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.rand(3, 32, 32)])
    images, prompts = judge_model.images(pictures), judge_model.prompts(["a handwritten one", "a handwritten two", "one handwritten a"])
    for embeddings in (images, prompts):
        assert (embeddings @ embeddings.T - torch.eye(3)).max() < 0.9999


def test_a_picture_is_judged_the_same_in_any_batch(judge_model, monkeypatch):
    pictures = torch.rand(5, 3, 32, 32)
    whole = judge_model.images(pictures)
    monkeypatch.setattr(judge, "BATCH", 2)
    torch.testing.assert_close(judge_model.images(pictures), whole)
    torch.testing.assert_close(judge_model.images(pictures[3:4]), whole[3:4])


@pytest.mark.parametrize("side", [32, 48])
def test_pictures_kept_in_eight_bits_are_judged_as_exact_ones_to_the_bit(judge_model, tmp_path, side):
    pictures = torch.rand(5, 3, side, side)
    files = CellFiles(tmp_path, {"resolution": side}, count=5, batch=5, exact=False, out="run")
    files.create()
    files.write(0, pictures)
    assert files.read(0).dtype == torch.uint8
    assert torch.equal(judge_model.images(files.read(0)), judge_model.images(pictures))


def test_ranks_judge_every_picture_in_the_batches_of_one(judge_model, monkeypatch):
    monkeypatch.setattr(judge, "BATCH", 2)
    pictures, read = torch.rand(5, 3, 32, 32), []
    shared = judge_model.shared(Accelerator(cpu=True), 5, lambda rows: read.append(rows) or pictures[rows.start : rows.stop])
    assert read == [range(2), range(2, 4), range(4, 5)]
    assert torch.equal(shared, judge_model.images(pictures))


def test_a_prompt_is_judged_the_same_beside_any_other(judge_model):
    beside = judge_model.prompts(["a one", "a handwritten two in white chalk on a blackboard lying on its side"])
    torch.testing.assert_close(judge_model.prompts(["a one"]), beside[:1])


def test_pixels_are_taken_from_zero_to_one_as_the_model_s_processor_says(judge_model):
    pixels = torch.rand(3, 3, 32, 32)

    def seen(ready: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = judge_model.clip.get_image_features(ready)
        return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)

    error, other = ((judge_model.images(pixels) - seen(ready)).abs().max() for ready in ((pixels - 0.5) / 0.5, pixels))
    assert error < 0.005  # the processor rounds to 8 bits on the way
    assert other > 0.05


def test_larger_pictures_are_scaled_to_the_model(judge_model):
    small = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), 32, mode="nearest")
    large = torch.nn.functional.interpolate(small, 64, mode="nearest")
    assert (judge_model.images(small) @ judge_model.images(large).T).item() > 0.99


def test_long_prompts_are_cut(judge_model):
    assert judge_model.prompts(["one " * 500]).shape == (1, 64)


def test_a_folder_that_is_no_clip(tmp_path):
    with pytest.raises(ConfigError, match=rf"judge={tmp_path} is no readable CLIP model.*CLIPModel folder"):
        Judge(str(tmp_path), CPU)


@pytest.mark.parametrize("part", ["tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_judge_with_a_part_missing(tiny_clip, tmp_path, part):
    folder = shutil.copytree(tiny_clip, tmp_path / "judge")
    (folder / part).unlink()
    with pytest.raises(ConfigError, match=rf"judge={folder} is no readable CLIP model"):
        Judge(str(folder), CPU)


def test_a_judge_whose_weights_are_not_all_there(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "judge")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("visual_projection")}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"judge={folder} is no readable CLIP model"):
        Judge(str(folder), CPU)


@pytest.mark.parametrize("path", ["/nowhere/judge", "runs/judge/clip/large"])
def test_a_folder_that_does_not_exist_cannot_be_tried_again(path):
    with pytest.raises(ConfigError, match=f"judge={path}"):
        Judge(path, CPU)


def test_a_hub_id_without_a_network_can_be_tried_again():
    with pytest.raises(TryAgainError, match=r"judge=nobody/nothing is no local folder and could not be fetched"):
        Judge("nobody/nothing", CPU)
