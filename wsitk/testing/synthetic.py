"""Images in the colours of H&E whose every nucleus is known, and can be read back from its colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.objects import ObjectTable

__all__ = ["SyntheticSlide", "decode_labels", "seam_points"]

Array = NDArray[Any]

_NUCLEUS = (64, 32, 128)
"""Colour of nucleus 0; the number of a nucleus is spread over the low bits of the three channels."""

_BITS = (6, 5, 6)

_TRIES = 8


def _encode(labels: Array) -> NDArray[np.uint8]:
    """Return the colours (*shape, 3) of instances: purples that differ in their low bits."""
    out = np.empty((*labels.shape, 3), np.uint8)
    rest = labels
    for channel, (base, bits) in enumerate(zip(_NUCLEUS, _BITS, strict=True)):
        out[..., channel] = base + (rest & (2**bits - 1))
        rest = rest >> bits
    return out


def decode_labels(pixels: Array) -> NDArray[np.int32]:
    """Return the instance numbers (*shape) that a synthetic image's pixels (*shape, 3) stand for."""
    labels, shift = np.zeros(pixels.shape[:-1], np.int32), 0
    for channel, (base, bits) in enumerate(zip(_NUCLEUS, _BITS, strict=True)):
        labels |= (pixels[..., channel].astype(np.int32) - base) % 2**bits << shift
        shift += bits
    # Tissue and glass are brighter in red than any nucleus.
    return np.where(pixels[..., 0] < _NUCLEUS[0] + 2 ** _BITS[0], labels, 0).astype(np.int32)


def seam_points(*grids: TileGrid) -> Iterator[tuple[int, ...]]:
    """Yield the corners of all owned regions, then the middles of edges and faces, then the centres."""
    for choice in product((0, 1), repeat=grids[0].extent.ndim if grids else 0):
        for tile in (tile for grid in grids for tile in grid):
            sides = zip(choice, tile.owned.start, tile.owned.stop, strict=True)
            yield tuple((a + b) // 2 if middle else a for middle, a, b in sides)


@final
@dataclass(frozen=True)
class SyntheticSlide:
    """An image in the colours of H&E with known nuclei.

    Attributes
    ----------
    pixels : uint8 (*shape, 3)
        Each nucleus has one colour, which encodes its number; tissue is pink, with noise and fibres.
    labels : int32 (*shape)
        Instance numbers, 1 to N; 0 is background.
    truth : ObjectTable
        The instances, in label order; `truth.anchor` are their centroids.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]
    truth: ObjectTable

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        *,
        grids: Iterable[TileGrid] = (),
        count: int = 0,
        radius: tuple[float, float] = (3.0, 8.0),
        seed: int = 0,
    ) -> SyntheticSlide:
        """Return an image with nuclei on every seam and corner of `grids`, and up to `count` elsewhere.

        Nuclei are ellipses (ellipsoids) with half-axes within `radius` pixels, turned at random; they may
        touch but don't overlap, and the image's border may cut them. A place already taken stays as it is.
        """
        rng = np.random.default_rng(seed)
        labels, number = np.zeros(shape, np.int32), 0
        for point in seam_points(*grids):
            # Beside an earlier nucleus there may be room for a smaller one.
            tries = (np.add(point, rng.uniform(-2, 2, len(shape))) for _ in range(_TRIES))
            number += any(_draw(labels, place, number + 1, radius, rng) for place in tries)
        for place in [rng.uniform(0, shape) for _ in range(count)]:
            number += _draw(labels, place, number + 1, radius, rng)
        if number >= 2 ** sum(_BITS):
            raise ValueError(f"{number} nuclei; the colours encode fewer than {2 ** sum(_BITS)}")
        pixels = _tissue(shape, rng)
        inside = labels > 0
        pixels[inside] = _encode(labels[inside])
        return cls(pixels, labels, ObjectTable.from_labels(labels))


def _draw(
    labels: Array, place: Array, number: int, radius: tuple[float, float], rng: np.random.Generator
) -> bool:
    """Draw one ellipsoid around `place` if nothing is there; tell whether it was drawn."""
    ndim = labels.ndim
    turn, _ = np.linalg.qr(rng.normal(size=(ndim, ndim)))
    stretch = turn / rng.uniform(*radius, ndim)
    reach = int(np.ceil(radius[1])) + 1
    centre = np.floor(place).astype(int)
    box = Region.between(centre - reach, centre + reach + 1).intersect(Region((0,) * ndim, labels.shape))
    if not box.size:
        return False
    grid = np.stack(np.meshgrid(*map(np.arange, box.start, box.stop), indexing="ij"), axis=-1)
    mask = (((grid + 0.5 - place) @ stretch) ** 2).sum(axis=-1) <= 1
    there = labels[box.slices()]
    if not mask.any() or there[mask].any():
        return False
    there[mask] = number
    return True


def _tissue(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return eosin pink with fibres and noise (*shape, 3); red never below 192."""
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij")
    phase = sum((a / (17.0 + 6 * k) for k, a in enumerate(axes)), np.zeros(shape, np.float32))
    fibres = 12 * np.sin(phase)[..., None] * np.array([0.3, 1.0, 0.6], np.float32)
    noise = rng.integers(-10, 11, (*shape, 3))
    colour = np.array([225, 170, 205]) + fibres + noise
    return np.asarray(np.clip(colour, (192, 0, 0), 255), np.uint8)
