"""What a fine-tune changed, as a LoRA: the whole of it at full rank, the best of it at others, and what is lost as it is said."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dev2pro.errors import ConfigError
from dev2pro.models import flux1, lora

CPU = torch.device("cpu")


def changed(tiny, scale: float = 0.02) -> FluxTransformer2DModel:
    """The model with every parameter moved a little, matrices mostly in a few directions."""
    model = flux1.load_transformer(str(tiny))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += scale / 10 * torch.randn(value.shape, generator=draw)
            if value.ndim == 2:
                value += scale * torch.randn(len(value), 3, generator=draw) @ torch.randn(3, value.shape[1], generator=draw)
    return model


def written(base: FluxTransformer2DModel, tuned: FluxTransformer2DModel, rank: int, folder) -> dict[str, float]:
    weights, lost = {}, {}
    for name, state, share in lora.extract(base, tuned, rank, CPU):
        weights |= state
        lost |= {} if share is None else {name: share}
    folder.mkdir(exist_ok=True)
    lora.write(weights, str(folder), {})
    return lost


@pytest.mark.parametrize("rank", [2, 8, 10_000])
def test_merged_it_is_the_fine_tune_but_for_what_is_said_to_be_lost(rank, tiny, tmp_path):
    tuned, merged, base = changed(tiny), flux1.load_transformer(str(tiny)), dict(flux1.load_transformer(str(tiny)).named_parameters())
    lost = written(merged, tuned, rank, tmp_path / "adapter")
    lora.merge(merged, str(tmp_path / "adapter"))
    after, exact = dict(merged.named_parameters()), dict(tuned.named_parameters())
    assert set(lost) == {name for name, value in base.items() if value.ndim == 2}
    for name, value in exact.items():
        left = (value - after[name]).square().sum() / (value - base[name]).square().sum()
        assert left.item() == pytest.approx(lost.get(name, 0.0), abs=1e-5), name
    if rank == 10_000:
        assert max(lost.values()) < 1e-5
    else:
        assert max(lost.values()) > 0.001


def test_a_large_matrix_s_largest_values_are_found(tiny):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 30, generator=draw) @ torch.randn(30, 300, generator=draw) + 0.5 * torch.randn(400, 300, generator=draw)
    left, sizes, right = lora._largest(matrix, 16)
    torch.testing.assert_close(sizes, torch.linalg.svdvals(matrix)[:16], rtol=1e-3, atol=0)
    best = torch.linalg.svdvals(matrix)[16:].square().sum()
    assert (matrix - (left * sizes) @ right.T).square().sum() < 1.01 * best


def test_one_of_another_model_is_refused(tiny, tmp_path):
    base = flux1.load_transformer(str(tiny))
    written(base, changed(tiny), 2, tmp_path / "adapter")
    weights, _ = lora.read(str(tmp_path / "adapter"))
    key = next(key for key in weights if key.endswith("lora_B.bias"))
    lora.write(weights | {key: weights[key][:-1]}, str(tmp_path / "adapter"), {})
    with pytest.raises(ConfigError, match="does not fit this transformer"):
        lora.merge(base, str(tmp_path / "adapter"))
