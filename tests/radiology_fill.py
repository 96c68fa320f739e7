"""The weights of the radiology golden vectors: each value a function of its entry's name and place.

Integers only (crc32 of the name, the finaliser of MurmurHash3), so that every machine gets the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_MASK = np.uint64(0xFFFFFFFF)


def uniform(name: str, count: int) -> NDArray[np.float64]:
    """Return `count` values in [-1, 1), multiples of 2**-23, that depend on the name alone."""
    seed = np.uint64(zlib.crc32(name.encode("utf-8")))
    place = np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B9)
    bits = _mixed(_mixed(place) ^ _mixed(np.array([seed + np.uint64(1)])))
    return (bits >> np.uint64(8)).astype(np.float64) / 2**23 - 1.0


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x & _MASK
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x85EBCA6B)) & _MASK
    x = x ^ (x >> np.uint64(13))
    x = (x * np.uint64(0xC2B2AE35)) & _MASK
    return x ^ (x >> np.uint64(16))


def fill(name: str, shape: Sequence[int], scale: float = 1.0) -> NDArray[np.generic]:
    """Return the value of a state's entry, float32 (a batch counter: int64 zeros)."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    values = uniform(name, prod(shape))
    if last == "running_mean":
        values = 0.1 * values
    elif last == "running_var":
        values = 1.0 + 0.25 * values
    elif len(shape) >= 2:
        values = values * (scale * np.sqrt(3.0 / prod(shape[1:])))
    elif name.endswith("A.weight"):
        values = 0.25 + 0.1 * values
    elif last in ("weight", "gamma"):
        values = 1.0 + 0.1 * values
    else:
        values = 0.05 * values
    return values.reshape(shape).astype(np.float32)


def load_filled(network: nn.Module, scale: float = 1.0) -> None:
    """Give every entry of the network's state its value, and put it in evaluation mode."""
    state = {
        name: torch.from_numpy(fill(name, tuple(old.shape), scale)).to(old.dtype)
        for name, old in network.state_dict().items()
    }
    network.load_state_dict(state)
    network.eval()
