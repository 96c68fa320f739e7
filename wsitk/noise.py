"""Normal noise that is a function of where it is: no generator with a state, no order.

A pixel's value depends on a key of whole numbers (seed, sample, step and so on) and its place in the image, so that
overlapping tiles see the same noise under every grid. Two 32-bit halves of a hash (the finaliser of SplitMix64;
Steele, Lea, Flood 2014) become a normal number by Box and Muller's transform.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["normal_noise"]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def normal_noise(key: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
    """Return N(0, 1) noise of `shape`, whose first pixel lies at `start` in the image (which may be negative)."""
    with np.errstate(over="ignore"):  # whole numbers wrap; that is the hash
        mixed = _mixed(_whole(key[0]))
        for part in key[1:]:
            mixed = _mixed(mixed + _whole(part))
        for axis, (first, count) in enumerate(zip(start, shape, strict=True)):
            place = np.arange(first, first + count, dtype=np.int64).astype(np.uint64)
            along = [1] * len(shape)
            along[axis] = count
            mixed = _mixed(mixed + place.reshape(along))
    high, low = mixed >> np.uint64(32), mixed & np.uint64(0xFFFFFFFF)
    # a half is added: the logarithm of zero is none
    radius = np.sqrt(-2.0 * np.log((high + 0.5) / 2.0**32))
    return np.asarray(radius * np.cos(2.0 * np.pi * (low / 2.0**32)), np.float32)


def _whole(value: int) -> NDArray[np.uint64]:
    return np.array([value % 2**64], np.uint64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a bijection of 64-bit numbers that leaves no trace of their order."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
