"""Separable weights over a tile, for joining dense predictions where tiles overlap."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from wsitk.volumes.nnunet_rules import gaussian_axis

__all__ = ["WINDOWS", "outer", "window"]

Weights = NDArray[np.float32]

# A weight near zero carries no information but would lose bits in a product over three axes.
_FLOOR = 1e-3


def _ramp(tile: int, halo: int) -> NDArray[np.float64]:
    """Return 1 inside, and a line across the `halo` pixels on both sides of the owned border.

    With a cell of at least ``2 * halo`` pixels the weights of neighbouring tiles sum to 1.
    """
    if halo == 0:
        return np.ones(tile)
    place = np.arange(tile)
    depth: NDArray[np.float64] = np.minimum(place + 0.5, tile - place - 0.5)
    return (depth / (2 * halo)).clip(max=1.0)


def _hann(tile: int, halo: int) -> NDArray[np.float64]:
    """Return a Hann bell over the whole tile, sampled at pixel centres, not below a floor."""
    bell: NDArray[np.float64] = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    return bell.clip(min=_FLOOR)


def _flat(tile: int, halo: int) -> NDArray[np.float64]:
    """Return 1 everywhere."""
    return np.ones(tile)


def _crop(tile: int, halo: int) -> NDArray[np.float64]:
    """Return 1 on the lattice cell and 0 on the halo."""
    weights = np.zeros(tile)
    weights[halo : tile - halo] = 1.0
    return weights


def _gaussian(tile: int, halo: int) -> NDArray[np.float64]:
    """Return nnU-Net's bell: a Gaussian of an eighth of the tile around pixel ``tile // 2``."""
    return gaussian_axis(tile)


WINDOWS: dict[str, Callable[[int, int], NDArray[np.float64]]] = {
    "ramp": _ramp,
    "hann": _hann,
    "flat": _flat,
    "crop": _crop,
    "gaussian": _gaussian,
}


def window(name: str, tile: tuple[int, ...], halo: tuple[int, ...]) -> tuple[Weights, ...]:
    """Return the weights along each axis of a tile; their outer product is the window.

    All are positive on the lattice cell, so that a tile always answers for what it owns. Raises KeyError
    for a name that is not in `WINDOWS`.
    """
    make = WINDOWS[name]
    return tuple(make(t, h).astype(np.float32) for t, h in zip(tile, halo, strict=True))


def outer(axes: tuple[Weights, ...]) -> Weights:
    """Return the outer product of weights along each axis."""
    return reduce(np.multiply.outer, axes)
