"""From outlines to pixels: exact, by the centre of each pixel, with a lattice instead of a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["HUNDREDTHS", "Outlines", "Lattice", "paint"]

Array = NDArray[Any]

HUNDREDTHS = 100
"""Points are stored as whole hundredths of a level-0 pixel: the grid to which QuPath reduces outlines."""


@dataclass(frozen=True, eq=False)
class Outlines:
    """Outlines of N objects, flat: some 150 bytes a nucleus, and no Python object for any.

    Attributes
    ----------
    xy : int32 (V, 2)
        Points (x right, y down), in hundredths of a pixel; a ring's last point repeats its first.
    ring_offset : int64 (R + 1,)
        Where each ring begins in `xy`.
    object_offset : int64 (N + 1,)
        Where each object begins among the rings: parts and holes alike, told apart by even-odd filling.
    """

    xy: Array
    ring_offset: Array
    object_offset: Array

    def __len__(self) -> int:
        return len(self.object_offset) - 1

    def boxes(self) -> tuple[Array, Array]:
        """Return the lowest and highest (x, y) of each object, int32 (N, 2) each."""
        first = self.ring_offset[self.object_offset[:-1]]
        if not len(first):
            return np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int32)
        return np.minimum.reduceat(self.xy, first), np.maximum.reduceat(self.xy, first)

    def take(self, rows: Array) -> Outlines:
        """Return the objects `rows`, in that order."""
        ring, object_offset = _gather(self.object_offset, rows)
        point, ring_offset = _gather(self.ring_offset, ring)
        return Outlines(self.xy[point], ring_offset, object_offset)


def _gather(offset: Array, rows: Array) -> tuple[Array, Array]:
    """Return the positions that make up `rows` of a ragged array, and the new offsets."""
    size = offset[rows + 1] - offset[rows]
    upto = np.concatenate([[0], np.cumsum(size)])
    return np.repeat(offset[rows] - upto[:-1], size) + np.arange(upto[-1]), upto


@final
class Lattice:
    """Finds the boxes that meet a window, without looking at the others.

    Each box is listed in every square of a lattice that it touches; the squares are sorted, so that a window
    is a few slices of one array. `side` is that of a square, in the units of the boxes.
    """

    def __init__(self, low_xy: Array, high_xy: Array, side: int) -> None:
        self._low, self._high, self._side = low_xy, high_xy, side
        first, last = low_xy // side, high_xy // side
        self._origin = first.min(0, initial=0).astype(np.int64)
        self._width = int(last[:, 0].max(initial=0) - self._origin[0] + 1)
        span = (last - first + 1).astype(np.int64)
        each = span.prod(1)
        owner = np.repeat(np.arange(len(each)), each)
        local = np.arange(len(owner)) - np.repeat(np.cumsum(each) - each, each)
        step = np.stack([local % span[owner, 0], local // span[owner, 0]], 1)
        x, y = (first[owner] + step - self._origin).T
        key = y * self._width + x
        order = np.argsort(key, kind="stable")
        self._key, self._owner = key[order], owner[order].astype(np.int32)

    def query(self, low_xy: Array, high_xy: Array) -> Array:
        """Return the boxes that meet the window, ascending, int32."""
        parts = [np.zeros(0, np.int32), *self._rows(low_xy, high_xy)]
        found = np.unique(np.concatenate(parts))
        meets = (self._low[found] <= high_xy) & (self._high[found] >= low_xy)
        return np.asarray(found[meets.all(1)])

    def _rows(self, low_xy: Array, high_xy: Array) -> Iterator[Array]:
        first = np.asarray(low_xy) // self._side - self._origin
        last = np.asarray(high_xy) // self._side - self._origin
        left, right = max(0, int(first[0])), min(self._width - 1, int(last[0]))
        top, bottom = max(0, int(first[1])), min(int(self._key[-1:].sum()) // self._width, int(last[1]))
        for y in range(top, bottom + 1) if left <= right else ():
            a, b = np.searchsorted(self._key, (y * self._width + left, y * self._width + right + 1))
            yield self._owner[a:b]


def paint(
    out: Array,
    outlines: Outlines,
    numbers: Array,
    scale_xy: tuple[float, float],
    start_xy: tuple[float, float],
) -> None:
    """Write ``numbers[k]`` into `out` (H, W), in place, where a pixel's centre lies in object k; in this order.

    Pixel (row, column) of `out` covers one unit from ``start_xy + (column, row)``, and a point of the outlines
    lies at ``xy / 100 / scale_xy`` of these units.
    """
    from wsitk.models.cellvit.training.scanline import fill

    points = outlines.xy / (HUNDREDTHS * np.asarray(scale_xy)) - start_xy
    fill(out, points, outlines.ring_offset, outlines.object_offset, numbers.astype(out.dtype))
