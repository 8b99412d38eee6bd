import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dev2pro.judging import metrics


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1)


# ---- fidelity to the prompt and to the style ---------------------------------------------------------------------------------------


def test_r_precision_asks_for_the_picture_s_own_prompt():
    prompts = torch.eye(3)
    images = torch.stack([prompts[[0, 0]], prompts[[1, 2]], prompts[[0, 1]]])  # two pictures each
    assert metrics.r_precision(images, prompts, torch.arange(len(prompts))).tolist() == [[1, 1], [1, 0], [0, 0]]


def test_r_precision_by_loop():
    images, prompts = unit(5, 7, 16), unit(5, 16)
    naive = [[float(max(range(5), key=lambda k: float(images[p, r] @ prompts[k])) == p) for r in range(7)] for p in range(5)]
    assert metrics.r_precision(images, prompts, torch.arange(len(prompts))).tolist() == naive


def test_clip_score_is_a_clamped_percentage_with_the_own_prompt():
    prompts = torch.eye(2)
    images = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(metrics.clip_score(images, prompts), torch.tensor([[100.0, 60.0], [0.0, 0.0]]))


def test_style_similarity_is_the_mean_cosine_with_every_picture_of_the_style():
    images, style = unit(3, 4, 8), unit(6, 8)
    naive = torch.tensor([[sum(float(images[p, r] @ s) for s in style) / 6 for r in range(4)] for p in range(3)])
    torch.testing.assert_close(metrics.style_similarity(images, style), naive)
    assert metrics.style_similarity(style[:1, None], style[:1]).item() == pytest.approx(1)


def test_diversity_is_the_mean_distance_to_the_others_of_the_prompt():
    images = unit(3, 4, 8)
    naive = [[1 - sum(float(images[p, r] @ images[p, q]) for q in range(4) if q != r) / 3 for r in range(4)] for p in range(3)]
    torch.testing.assert_close(metrics.diversity(images), torch.tensor(naive))
    torch.testing.assert_close(metrics.diversity(images[:, :1].expand(3, 4, 8)), torch.zeros(3, 4), rtol=0, atol=1e-6)
    assert metrics.diversity(torch.eye(4)[None]).tolist() == [[1, 1, 1, 1]]
    assert metrics.diversity(images[:, :1]).tolist() == [[0], [0], [0]]  # one picture has no others


def test_distance_is_the_mean_square_of_pixels_from_minus_one_to_one():
    black, white, grey = torch.zeros(1, 2, 3, 4, 4), torch.ones(1, 2, 3, 4, 4), torch.full((1, 2, 3, 4, 4), 0.5)
    assert metrics.distance(black, white).tolist() == [[4, 4]]
    assert metrics.distance(grey, white).tolist() == [[1, 1]]
    assert metrics.distance(grey, grey).tolist() == [[0, 0]]
    pictures, ideal = torch.rand(2, 3, 3, 4, 4), torch.rand(2, 3, 3, 4, 4)
    torch.testing.assert_close(metrics.distance(pictures, ideal)[1, 2], ((2 * pictures[1, 2] - 1) - (2 * ideal[1, 2] - 1)).square().mean())


# ---- memorisation ------------------------------------------------------------------------------------------------------------------


def test_a_copied_training_picture_is_told_from_a_fresh_one_of_the_style():
    training, heldout, fresh = (normalize(torch.ones(32) + torch.randn(60, 32), dim=-1) for _ in range(3))
    of_fresh = metrics.memorisation(fresh[:, None], training, heldout)
    of_copies = metrics.memorisation(training[:, None], training, heldout)
    error = (of_fresh.std() / math.sqrt(len(fresh))).item()
    assert abs(of_fresh.mean()) < 4 * error < 0.05
    assert of_copies.min() > 0
    assert of_copies.mean() > of_fresh.mean() + 20 * error
    assert metrics.memorisation_of_heldout(training, heldout) == pytest.approx(0, abs=4 * error)
    torch.testing.assert_close(metrics.memorisation(heldout[:, None], heldout, training), of_copies_of(heldout, training))


def of_copies_of(copied: Tensor, other: Tensor) -> Tensor:
    """By loop, for pictures that are there already: 1 minus the largest cosine with the other set."""
    return torch.tensor([[1 - max(float(a @ b) for b in other)] for a in copied])


def test_memorisation_by_loop_and_that_of_the_held_out_pictures():
    images, training, heldout = unit(3, 4, 8), unit(5, 8), unit(6, 8)
    naive = [[max(float(x @ t) for t in training) - max(float(x @ h) for h in heldout) for x in row] for row in images]
    torch.testing.assert_close(metrics.memorisation(images, training, heldout), torch.tensor(naive))
    others = [max(float(h @ t) for t in training) - max(float(h @ o) for j, o in enumerate(heldout) if j != i) for i, h in enumerate(heldout)]
    assert metrics.memorisation_of_heldout(training, heldout) == pytest.approx(sum(others) / 6, abs=1e-6)
    assert metrics.memorisation_of_heldout(training, heldout[:1]) is None


def test_memorisation_is_measured_where_the_training_pictures_are_known():
    features, looks, prompts, style, training = unit(3, 2, 8), unit(3, 2, 4), unit(3, 8), unit(6, 4), unit(5, 4)
    values, _ = metrics.measure(features, looks, prompts, torch.arange(3), style, training, None)
    torch.testing.assert_close(values["memorisation"], metrics.memorisation(looks, training, style))
    without, _ = metrics.measure(features, looks, prompts, torch.arange(3), style, None, None)
    assert without.keys() == values.keys() - {"memorisation"}


# ---- kernel inception distance ---------------------------------------------------------------------------------------------------------


def test_kid_by_loop():
    x, y = unit(7, 5).double(), unit(9, 5).double()

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) + 1) ** 3

    within = [sum(k(a, b) for a, b in itertools.permutations(some, 2)) / (len(some) * (len(some) - 1)) for some in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    assert metrics.kid(x, y) == pytest.approx(sum(within) - 2 * across, abs=1e-12)
    assert metrics.kid(x, y) == pytest.approx(metrics.kid(y, x), abs=1e-12)


def test_kid_is_unbiased_and_grows_with_the_distance():
    def drawn(shift: float) -> Tensor:
        return normalize(torch.randn(40, 8) + shift, dim=-1)

    same = [metrics.kid(drawn(0), drawn(0)) for _ in range(200)]
    error = np.std(same) / math.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * error < 0.05  # the biased estimate would be off by some 0.3
    assert 10 * error < metrics.kid(drawn(0), drawn(0.5)) < metrics.kid(drawn(0), drawn(1.5))


# ---- intervals -------------------------------------------------------------------------------------------------------------------------
