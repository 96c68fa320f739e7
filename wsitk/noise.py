"""Normal noise that is a function of where it is: no generator with a state, no order.

A pixel's value depends on a key of whole numbers (seed, sample, step and so on) and its place in the image, so that
overlapping tiles see the same noise under every grid. Two 32-bit halves of a hash become a normal number by Box and
Muller's transform.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsitk.keyed import at_places, key_of

__all__ = ["normal_noise"]


def normal_noise(key: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
    """Return N(0, 1) noise of `shape`, whose first pixel lies at `start` in the image (which may be negative)."""
    mixed = at_places(key_of(*key), start, shape)
    high, low = mixed >> np.uint64(32), mixed & np.uint64(0xFFFFFFFF)
    # a half is added: the logarithm of zero is none
    radius = np.sqrt(-2.0 * np.log((high + 0.5) / 2.0**32))
    return np.asarray(radius * np.cos(2.0 * np.pi * (low / 2.0**32)), np.float32)
