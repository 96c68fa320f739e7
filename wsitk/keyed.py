"""Whole numbers that look like chance and are a function of a key and a place: no generator with a state, no order.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), taken on the CPU: the same bits on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "at_places", "each", "key_of"]

Words = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def key_of(*parts: int) -> Words:
    """Return a key (1,) of whole numbers, which may be negative; their order counts."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed(key + np.array([part % 2**64], np.uint64))
    return key


def each(key: Words, count: int) -> Words:
    """Return keys (count,) of the things that are counted from 0 under `key`."""
    return _mixed(np.asarray(key + np.arange(count, dtype=np.uint64), np.uint64))


def at_places(key: Words, start: Sequence[int], shape: Sequence[int]) -> Words:
    """Return a number for every place of a window, whose first place is `start` (which may be negative)."""
    words = key
    for axis, (first, count) in enumerate(zip(start, shape, strict=True)):
        place = np.arange(first, first + count, dtype=np.int64).astype(np.uint64)
        along = [1] * len(shape)
        along[axis] = count
        words = _mixed(words + place.reshape(along))
    return words


def _mixed(x: Words) -> Words:
    """Return a bijection of 64-bit numbers that leaves no trace of their order."""
    with np.errstate(over="ignore"):  # whole numbers wrap; that is the hash
        x = x + _STEP
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
