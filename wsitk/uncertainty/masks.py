"""What dropout lets through, as a function of (run seed, sample, layer, channel, place): no state, no order.

A mask of whole maps depends on the channel only, so that all tiles of a run share it. A mask of elements depends
on where the element lies in the layer's own grid over the image, so that overlapping tiles agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsitk.keyed import Words, at_places, each, key_of

__all__ = ["element_mask", "layer_key", "map_mask"]

_BITS = 53


def layer_key(seed: int, sample: int, layer: str) -> Words:
    """Return the key (1,) of a layer's masks in one sample."""
    name = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:8], "little")
    return key_of(seed, sample, name)


def map_mask(key: Words, channels: int, rate: float) -> NDArray[np.bool_]:
    """Return which of a layer's maps pass: (channels,), each dropped with probability `rate`."""
    return _passes(each(key, channels), rate)


def element_mask(
    key: Words, channels: int, start: Sequence[int], shape: Sequence[int], rate: float
) -> NDArray[np.bool_]:
    """Return which elements of a layer pass: (channels, *shape), `start` being the first one's place.

    Places count along the layer's own grid over the image and may be negative.
    """
    out = np.empty((channels, *shape), bool)
    keys = each(key, channels)
    for channel in range(channels):  # one map at a time: the hash takes eight bytes for each element
        out[channel] = _passes(at_places(keys[channel : channel + 1], start, shape), rate)
    return out


def _passes(words: Words, rate: float) -> NDArray[np.bool_]:
    return np.asarray((words >> np.uint64(64 - _BITS)) >= np.uint64(round(rate * 2**_BITS)))
