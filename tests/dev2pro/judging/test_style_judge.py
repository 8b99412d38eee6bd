"""The DINOv2 judge, and what is refused in its place."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev2pro.errors import ConfigError, TryAgainError
from dev2pro.judging import metrics
from dev2pro.judging.judge import Judge
from dev2pro.judging.style_judge import StyleJudge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge(tiny_dino) -> StyleJudge:
    return StyleJudge(str(tiny_dino), CPU)


def test_embeddings_are_the_class_token_as_unit_vectors(judge):
    pictures = torch.rand(5, 3, 36, 36)
    embeddings = judge.images(pictures)
    assert (embeddings.shape, embeddings.dtype) == ((5, 48), torch.float32)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(5))
    mean, std = (torch.tensor(values)[:, None, None] for values in (judge.processor.image_mean, judge.processor.image_std))
    with torch.no_grad():
        states = judge.dino((pictures[..., 2:34, 2:34] - mean) / std).last_hidden_state
    assert (torch.nn.functional.normalize(states[:, 0], dim=-1) - embeddings).abs().max() < 0.02  # the processor rounds to 8 bits on the way
    assert (torch.nn.functional.normalize(states[:, 1:].mean(1), dim=-1) - embeddings).abs().max() > 0.05


def test_eight_bits_are_judged_as_exact_pictures_to_the_bit(judge):
    pictures = torch.rand(3, 3, 40, 40)
    assert torch.equal(judge.images((pictures * 255).byte()), judge.images(pictures))


def test_only_looks_come_from_the_style_judge():
    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

    features, prompts, meaning = unit(3, 4, 8), unit(3, 8), torch.arange(3)
    (one, kid), (other, other_kid) = (metrics.measure(features, unit(3, 4, 5), prompts, meaning, unit(6, 5), unit(7, 5), None) for _ in range(2))
    changed = {name for name in one if not torch.equal(one[name], other[name])} | ({"kid"} if kid != other_kid else set())
    assert changed == set(metrics.LOOKS)


def test_judges_in_the_wrong_order_are_refused_before_anything_is_loaded(tiny_clip, tiny_dino):
    Judge.check(str(tiny_clip))
    StyleJudge.check(str(tiny_dino))
    with pytest.raises(ConfigError, match=rf"judge={tiny_dino} is no readable CLIP model .*that of a dinov2.*no text tower.*style_judge="):
        Judge.check(str(tiny_dino))
    with pytest.raises(
        ConfigError, match=rf"style_judge={tiny_clip} is no readable DINOv2 model .*: config.json is that of a clip.*Give it as judge="
    ):
        StyleJudge.check(str(tiny_clip))


def damage(folder, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if part == "a layer":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.layer.3.")}
    if part == "a width":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    if part == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if part in ("pickle", "model.safetensors", "preprocessor_config.json"):
        (folder / part.replace("pickle", "model.safetensors")).unlink()


@pytest.mark.parametrize("part", ["a layer", "a width", "pickle", "model.safetensors", "preprocessor_config.json"])
def test_a_judge_that_is_not_whole_is_refused_by_its_headers_and_on_loading(tiny_dino, tmp_path, part):
    folder = shutil.copytree(tiny_dino, tmp_path / "judge")
    damage(folder, part)
    for read in (StyleJudge.check, lambda path: StyleJudge(path, CPU)):
        with pytest.raises(ConfigError, match=rf"style_judge={folder} is no readable DINOv2 model \(.*Give a transformers Dinov2Model folder"):
            read(str(folder))


def test_what_is_not_here(tmp_path):
    with pytest.raises(ConfigError, match=r"style_judge=/nowhere/dino does not exist.*facebook/dinov2-base"):
        StyleJudge.check("/nowhere/dino")
    StyleJudge.check("nobody/nothing")  # a hub id may come yet
    with pytest.raises(TryAgainError, match=r"style_judge=nobody/nothing is no local folder and could not be fetched"):
        StyleJudge("nobody/nothing", CPU)
