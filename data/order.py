"""Which sample fills which slot of which step: arithmetic on (count, seed, step), so that nothing has to be remembered."""

from functools import lru_cache

import numpy as np

ORDER_VERSION = 1  # raised when the arithmetic changes, which a test with a recorded order notices


def samples(count: int, seed: int, step: int, batch: int) -> np.ndarray:
    """The samples (batch,) of a step; over an epoch of `count` slots every sample comes once, epochs follow seamlessly."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch(count, seed, int(p // count))[p % count] for p in positions])


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation from Philox's raw bits, which NumPy keeps the same across versions (its Generator's methods it does not)."""
    raw = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(raw, kind="stable")
