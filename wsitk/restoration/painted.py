"""What was painted of an input, read back from its blocks: any region, on the model's grid or at level 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.journal import Journal
from wsitk.region_worker import MARGIN
from wsitk.repair import Repair
from wsitk.writers.restored import KIND_COLORS

__all__ = ["Painted"]

_VALUES = {kind: value for value, kind in enumerate(KIND_COLORS, 1)}


@dataclass(frozen=True, slots=True)
class _Place:
    """A patch: its piece, where it lies (working pixels), and where it is stored."""

    number: int
    box: Region
    block: int
    place: int
    change: float
    deviation: float


@final
class Painted:
    """The patches of all committed blocks; `samples` tells whether they know how much samples differ."""

    def __init__(self, repair: Repair, journal: Journal, committed: Mapping[int, Mapping[str, Any]]) -> None:
        self._repair = repair
        self._patches = [
            _Place(number, Region(tuple(start), tuple(shape)), block, place, change, deviation)
            for block, record in sorted(committed.items())
            for place, (number, start, shape, change, deviation) in enumerate(record.get("patches", ()))
        ]
        self._by_number = {p.number: p for p in self._patches}
        self._boxes = {p.number: repair.box_level0(p.number) for p in self._patches}
        # blocks come back in the order of the image's rows: a few at hand are enough
        self._load = lru_cache(maxsize=4)(lambda block: journal.load(block, "patch:"))

    def __contains__(self, number: int) -> bool:
        """Tell whether a piece was painted."""
        return number in self._by_number

    def means(self, number: int) -> tuple[float, float]:
        """Return a painted piece's mean change, and its mean standard deviation."""
        patch = self._by_number[number]
        return patch.change, patch.deviation

    def read(self, region: Region, *, spread: bool) -> NDArray[np.uint8]:
        """Return (3 or 4, *shape): colours, and with `spread` the standard deviation; 0 where nothing was painted.

        Around what was painted lie a few pixels of what surrounds it, for whoever enlarges it.
        """
        channels = 4 if spread else 3
        out = np.zeros((channels, *region.shape), np.uint8)
        met = [p for p in self._patches if p.box.intersect(region).size]
        for patch in met:
            common = patch.box.intersect(region)
            near = self._near(patch)[common.slices(patch.box.start)]
            into = out[:3][(slice(None), *common.slices(region.start))]
            pixels = self._array(patch, "pixels")[common.slices(patch.box.start)]
            into[:, near] = np.moveaxis(pixels, -1, 0)[:, near]
        if met:
            self._blend(out, region, met, spread)
        return out

    def _blend(self, out: NDArray[np.uint8], region: Region, met: list[_Place], spread: bool) -> None:
        """Put the painted pixels into `out`; where parts of a cut artifact overlap, their weighted mean."""
        total = np.zeros(region.shape, np.float32)
        sums = np.zeros(out.shape, np.float32)
        for patch in met:
            common = patch.box.intersect(region)
            inside, into = common.slices(patch.box.start), common.slices(region.start)
            own = self._array(patch, "own")[inside]
            weight = self._repair.weight(patch.number, common) * own
            values = np.moveaxis(self._array(patch, "pixels")[inside], -1, 0)
            if spread:
                values = np.concatenate([values, self._array(patch, "spread")[inside][None]])
            sums[(slice(None), *into)] += weight * values
            total[into] += weight
        done = total > 0
        out[:, done] = np.floor(sums[:, done] / total[done] + np.float32(0.5)).astype(np.uint8)

    def kinds(self, region: Region) -> NDArray[np.uint8]:
        """Return which level-0 pixels of `region` were painted: the value of their artifact's kind, else 0."""
        out = np.zeros(region.shape, np.uint8)
        for patch in self._patches:
            common = self._boxes[patch.number].intersect(region)
            if not common.size:
                continue
            own = self._own_level0(patch, common)
            out[common.slices(region.start)][own] = self._values(common)[own]
        return out

    def _own_level0(self, patch: _Place, region: Region) -> NDArray[np.bool_]:
        """Return which level-0 pixels a painted piece changed."""
        own = self._repair.own_level0(patch.number, region)
        axes = []
        for axis, scale in enumerate(self._repair.scale):
            place = np.floor((np.arange(region.start[axis], region.stop[axis]) + 0.5) / scale).astype(
                np.int64
            )
            axes.append((place - patch.box.start[axis]).clip(0, patch.box.shape[axis] - 1))
        # the mask may hold pixels that the file does not
        painted: NDArray[np.bool_] = self._array(patch, "own")[np.ix_(*axes)]
        return own & painted

    def _values(self, region: Region) -> NDArray[np.uint8]:
        """Return the value of the first kind of artifact at each level-0 pixel."""
        codes = self._repair.mask.codes_over(region)
        table = np.zeros(256, np.uint8)
        for code in range(1, 256):
            first = (code & -code).bit_length() - 1
            known = self._repair.mask.kinds
            table[code] = _VALUES[known[first]] if first < len(known) else 0
        return np.asarray(table[codes], np.uint8)

    def _near(self, patch: _Place) -> NDArray[np.bool_]:
        """Return what was painted, and a margin around it."""
        import cv2

        own = self._array(patch, "own").astype(np.uint8)
        square = np.ones((2 * MARGIN + 1,) * 2, np.uint8)
        return np.asarray(cv2.dilate(own, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)).astype(bool)

    def _array(self, patch: _Place, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._load(patch.block)[f"{patch.place}:{name}"]
        return array
