"""Aspect-ratio buckets: the sizes to which pictures are cropped, and which picture goes into which."""

import numpy as np

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(resolution: int, step: int, aspect: float) -> list[Size]:
    """Buckets of about resolution² pixels, sides multiples of `step`, from 1:aspect to aspect:1; widest last. One square for aspect 1."""
    high = [(w, round(resolution * resolution / w / step) * step) for w in range(step, resolution, step)]
    tall = {(resolution, resolution)} | {(w, h) for w, h in high if w < h <= aspect * w}
    return sorted(tall | {(h, w) for w, h in tall}, key=lambda size: size[0] / size[1])


def nearest_bucket(width: np.ndarray, height: np.ndarray, buckets: list[Size]) -> np.ndarray:
    """The bucket (N,) whose form is nearest, by the logarithm of the aspect ratio. No logarithm is taken: its last bit differs among machines."""
    form = np.array([w / h for w, h in buckets])
    square = width.astype(np.float64)
    square /= height
    square *= square
    return np.searchsorted(form[:-1] * form[1:], square, "right")


def merge_small(counts: np.ndarray, buckets: list[Size], batch: int) -> np.ndarray:
    """Bucket to target bucket. Merges each bucket that is too small for one step into the nearest used one, until all are large enough."""
    targets, counts = np.arange(len(buckets), dtype=np.uint16), counts.copy()
    form = np.array([w / h for w, h in buckets])
    while (too_small := np.flatnonzero((counts > 0) & (counts < batch))).size and np.count_nonzero(counts) > 1:
        smallest = too_small[np.argmin(counts[too_small])]
        others = np.flatnonzero((counts > 0) & (np.arange(len(counts)) != smallest))
        target = others[np.argmin(np.maximum(form[others] / form[smallest], form[smallest] / form[others]))]
        targets[targets == smallest] = target
        counts[target] += counts[smallest]
        counts[smallest] = 0
    return targets
