"""Normal noise that is a function of where it is, for each candidate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsitk.noise import normal_noise as keyed_noise

__all__ = ["normal_noise"]


def normal_noise(
    seed: int, candidate: int, start: Sequence[int], shape: Sequence[int]
) -> NDArray[np.float32]:
    """Return N(0, 1) noise of `shape`, whose first pixel lies at `start` in the image (which may be negative)."""
    return keyed_noise((seed, candidate), start, shape)
