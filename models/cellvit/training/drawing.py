"""What is drawn on a slide, on the grid that the network sees: which crops to take, and their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import shapely
from numpy.typing import NDArray

from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Labels, Types
from wsitk.models.cellvit.training.rasterise import HUNDREDTHS, Lattice, Outlines, paint

__all__ = ["Drawing", "rectangle"]

SMALLEST_SHARE = 0.02
"""Crops with a smaller labelled part are left out."""

Array = NDArray[Any]
Corner = tuple[int, int]


@final
@dataclass(frozen=True, eq=False)
class Drawing:
    """Nuclei and areas of one slide. A point of the file lies at ``(xy + bounds_xy) / scale_xy`` working pixels.

    Attributes
    ----------
    shape
        Of the slide, in working pixels (y, x).
    types : uint8 (N,)
        Of each nucleus; `IGNORE` if unknown.
    index
        Finds nuclei by place, in the file's hundredths.
    regions, ignored
        Areas in which every nucleus is drawn; areas of which nothing is known.
    """

    scale_xy: tuple[float, float]
    bounds_xy: tuple[float, float]
    shape: tuple[int, ...]
    nuclei: Outlines
    types: Types
    index: Lattice
    regions: Outlines
    ignored: Outlines

    def labels(self, corner: Corner, side: int) -> tuple[Labels, Types]:
        """Return instances and types of a crop. A nucleus that lies mostly outside the areas is not known."""
        rows = self.index.query(*self._window(corner, side))
        # ascending, so that where two overlap the later one of the file has the pixel
        inst = np.zeros((side, side), np.int32)
        self._paint(inst, self.nuclei.take(rows), np.arange(1, len(rows) + 1), corner)
        known = self._known(corner, side)
        total = np.bincount(inst.ravel(), minlength=len(rows) + 1)
        inside = np.bincount(inst[known], minlength=len(rows) + 1)
        kept = 2 * inside >= total
        kept[0] = False
        inst[~kept[inst] & (~known | (inst > 0))] = UNLABELLED
        if len(self.ignored):
            self._paint(inst, self.ignored, np.full(len(self.ignored), UNLABELLED), corner)
        types = np.append(0, self.types[rows]).astype(np.uint8)[np.maximum(inst, 0)]
        types[inst == UNLABELLED] = IGNORE
        return inst, types

    def corners(self, side: int) -> list[Corner]:
        """Return corners (y, x) of crops, in working pixels, that cover the labelled areas."""
        if not len(self.regions):
            return []
        low, high = self.regions.boxes()
        boxes = (np.stack([low, high], 1) / HUNDREDTHS + self.bounds_xy) / self.scale_xy
        # areas that overlap or touch share their crops
        merged = shapely.get_parts(shapely.union_all(shapely.box(*boxes.reshape(-1, 4).T)))
        corners: dict[Corner, None] = {}
        for x0, y0, x1, y1 in shapely.bounds(merged):
            for y in _starts(y0, y1, side, self.shape[0]):
                for x in _starts(x0, x1, side, self.shape[1]):
                    if self._known((y, x), side).mean() >= SMALLEST_SHARE:
                        corners[y, x] = None
        return list(corners)

    def _window(self, corner: Corner, side: int) -> tuple[Array, Array]:
        """Return the lowest and highest (x, y) of a crop in the hundredths of the file."""
        start = np.array(corner[::-1], np.float64)
        ends = (np.stack([start, start + side]) * self.scale_xy - self.bounds_xy) * HUNDREDTHS
        return np.floor(ends[0]).astype(np.int64), np.ceil(ends[1]).astype(np.int64)

    def _paint(self, out: Array, outlines: Outlines, numbers: Array, corner: Corner) -> None:
        shift_x, shift_y = (b / s for b, s in zip(self.bounds_xy, self.scale_xy, strict=True))
        paint(out, outlines, numbers, self.scale_xy, (corner[1] - shift_x, corner[0] - shift_y))

    def _known(self, corner: Corner, side: int) -> NDArray[np.bool_]:
        """Return which pixels of a crop are labelled completely and lie in the image, bool (side, side)."""
        known = np.zeros((side, side), np.uint8)
        self._paint(known, self.regions, np.ones(len(self.regions), np.int64), corner)
        inside = [
            (n >= 0) & (n < end)
            for n, end in zip(np.add.outer(corner, np.arange(side)), self.shape, strict=True)
        ]
        return np.asarray(known.astype(bool) & np.outer(*inside))


def rectangle(low_xy: Array, high_xy: Array) -> Outlines:
    """Return one rectangle, in the hundredths of the file."""
    (x0, y0), (x1, y1) = low_xy, high_xy
    xy = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], np.int32)
    return Outlines(xy, np.array([0, 5]), np.array([0, 1]))


def _starts(low: float, high: float, side: int, length: int) -> list[int]:
    """Return the fewest evenly spread starts of windows that cover [low, high), inside the image if they fit."""
    low, high = max(0.0, low), min(float(length), high)
    if high <= low:
        return []
    count = int(np.ceil((high - low) / side - 1e-6))
    if count == 1:
        only = round((low + high - side) / 2)
        return [max(0, min(only, length - side))]
    return [round(v) for v in np.linspace(low, high - side, count)]
