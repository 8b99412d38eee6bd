"""Numbers from judged pictures: fidelity to prompt and style, diversity, and memorisation.

Everything is laid out as (P, R): prompt x repetition (seed), so that cells can be compared picture by picture.
"""

import torch
from torch import Tensor


def r_precision(images: Tensor, prompts: Tensor, meaning: Tensor) -> Tensor:
    """1 where a picture's nearest prompt means what its own does, else 0: (P, R) from unit vectors images (P, R, D), prompts (P, D).

    `meaning` (P,) numbers the meanings: prompts that say the same in other words have the same number.
    CLIP R-precision, Park et al. 2021 (https://openreview.net/forum?id=bKBhQhPeKaF), over the prompt set itself.
    """
    nearest = (images @ prompts.T).argmax(-1)
    return (meaning[nearest] == meaning[:, None]).float()


def clip_score(images: Tensor, prompts: Tensor) -> Tensor:
    """100 max(cos, 0) between a picture and its prompt (P, R); Hessel et al. 2021 (https://arxiv.org/abs/2104.08718)."""
    return 100 * (images * prompts[:, None]).sum(-1).clamp(min=0)


def style_similarity(images: Tensor, style: Tensor) -> Tensor:
    """Mean cosine between a picture and the held-out pictures of the style: (P, R) from (P, R, D) and (N, D)."""
    return (images @ style.T).mean(-1)


def diversity(images: Tensor) -> Tensor:
    """1 - mean cosine between a picture and the others of its prompt: (P, R). 0: all the same."""
    others = images.shape[1] - 1
    if others == 0:
        return torch.zeros(images.shape[:2])
    cosine = images @ images.transpose(1, 2)
    return 1 - (cosine.sum(-1) - cosine.diagonal(dim1=1, dim2=2)) / others


def memorisation(images: Tensor, training: Tensor, style: Tensor) -> Tensor:
    """Cosine with the nearest training picture minus that with the nearest held-out one: (P, R) from (P, R, D), (N, D) and (M, D).

    More than `memorisation_of_heldout`: nearer to the training pictures than a fresh picture of the style is. Meehan et al. 2020
    (https://arxiv.org/abs/2004.05675) test for copies by the distances of generated and of held-out samples to the training set.
    """
    return (images @ training.T).amax(-1) - (images @ style.T).amax(-1)


def memorisation_of_heldout(training: Tensor, style: Tensor) -> float | None:
    """The mean `memorisation` of the M held-out pictures themselves, each among the others: what copies nothing. None for a single one.

    It is not 0 where one set is larger: among more pictures the nearest is nearer.
    """
    if len(style) < 2:
        return None
    others = (style @ style.T).fill_diagonal_(float("-inf"))
    return ((style @ training.T).amax(-1) - others.amax(-1)).mean().item()


def kid(images: Tensor, reference: Tensor) -> float:
    """Kernel inception distance, unbiased, cubic kernel, on the judge's features: (N, D) and (M, D); lower is nearer.

    Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401).
    """
    x, y = images.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T + 1) ** 3  # without the usual 1/D: the features are unit vectors

    def off_diagonal_mean(k: Tensor) -> Tensor:
        n = len(k)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return (off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


LOOKS = ("style_similarity", "diversity", "memorisation", "kid")  # what is measured on the embeddings of the style judge, if there is one


def measure(
    features: Tensor, looks: Tensor, prompts: Tensor, meaning: Tensor, style: Tensor, training: Tensor | None, distance_to_ideal: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """Every metric of a cell picture by picture, name -> (P, R), and the KID of them all.

    `features` (P, R, D) and `prompts` (P, D) are the judge's unit vectors; `looks` (P, R, E), `style` (M, E) and, if they are known, `training`
    (N, E) those of the style judge, or the judge's too; `distance_to_ideal` (P, R), if there is one, is as from `distance`.
    """
    values = {
        "prompt_fidelity": r_precision(features, prompts, meaning),
        "clip_score": clip_score(features, prompts),
        "style_similarity": style_similarity(looks, style),
        "diversity": diversity(looks),
    }
    if training is not None:
        values["memorisation"] = memorisation(looks, training, style)
    if distance_to_ideal is not None:
        values["distance_to_ideal"] = distance_to_ideal
    return values, kid(looks.flatten(0, 1), style)


def distance(images: Tensor, ideal: Tensor) -> Tensor:
    """Mean squared difference of pixels in [-1, 1]: (...) from images (..., 3, H, W) in [0, 1], same noise in both."""
    return (2 * (images - ideal)).square().mean((-3, -2, -1))
