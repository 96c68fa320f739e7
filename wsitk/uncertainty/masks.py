"""What dropout lets through, as a function of (run seed, sample, layer, channel, place): no state, no order.

A mask of whole maps depends on the channel only, so that all tiles of a run share it. A mask of elements depends
on where the element lies in the layer's own grid over the image, so that overlapping tiles agree. The hash is the
finaliser of SplitMix64 (Steele, Lea, Flood 2014), taken on the CPU: the same bits on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["element_mask", "layer_key", "map_mask"]

Words = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_BITS = 53


def layer_key(seed: int, sample: int, layer: str) -> Words:
    """Return the key (1,) of a layer's masks in one sample."""
    name = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):  # whole numbers wrap; that is the hash
        return _mixed(_mixed(_mixed(_whole(seed)) + _whole(sample)) + _whole(name))


def map_mask(key: Words, channels: int, rate: float) -> NDArray[np.bool_]:
    """Return which of a layer's maps pass: (channels,), each dropped with probability `rate`."""
    with np.errstate(over="ignore"):
        return _passes(_mixed(_each(key, channels)), rate)


def element_mask(
    key: Words, channels: int, start: Sequence[int], shape: Sequence[int], rate: float
) -> NDArray[np.bool_]:
    """Return which elements of a layer pass: (channels, *shape), `start` being the first one's place.

    Places count along the layer's own grid over the image and may be negative.
    """
    out = np.empty((channels, *shape), bool)
    with np.errstate(over="ignore"):
        each = _mixed(_each(key, channels))
        for channel in range(channels):  # one map at a time: the hash takes eight bytes for each element
            mixed = each[channel : channel + 1]
            for axis, (first, count) in enumerate(zip(start, shape, strict=True)):
                place = np.arange(first, first + count, dtype=np.int64).astype(np.uint64)
                along = [1] * len(shape)
                along[axis] = count
                mixed = _mixed(mixed + place.reshape(along))
            out[channel] = _passes(mixed, rate)
    return out


def _each(key: Words, channels: int) -> Words:
    return np.asarray(key + np.arange(channels, dtype=np.uint64), np.uint64)


def _passes(words: Words, rate: float) -> NDArray[np.bool_]:
    return np.asarray((words >> np.uint64(64 - _BITS)) >= np.uint64(round(rate * 2**_BITS)))


def _whole(value: int) -> Words:
    return np.array([value % 2**64], np.uint64)


def _mixed(x: Words) -> Words:
    """Return a bijection of 64-bit numbers that leaves no trace of their order."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
