"""Which rows of a volume its layers of tiles reach and finish, and the canvas that its labels are painted on."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import final

import numpy as np

from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.model import FieldSpec
from wsitk.sources.resample import Rule, Taps, interpolate

__all__ = ["Canvas", "Layers"]


@dataclass(frozen=True)
class Canvas:
    """Where labels are painted: `shape` voxels, of which ``scale`` make a pixel of the working grid.

    Pixel k covers ``[k * scale, (k + 1) * scale)`` of the canvas. `apart` is an axis along which nothing is
    interpolated.
    """

    shape: tuple[int, ...]
    scale: tuple[float, ...]
    apart: int | None = None

    def taps(self, axis: int, low: int, high: int, length: int, rule: Rule) -> Taps:
        """Return how voxels low .. high - 1 come from the working grid's `length` pixels."""
        kind: Rule = "nearest" if axis == self.apart else rule
        whole, scale = self.shape[axis], self.scale[axis]
        # where outer edges coincide, the ratio of the lengths decides ties as it does for everyone else
        factor = length / whole if abs(length * scale - whole) < 1e-6 else 1.0 / scale
        return interpolate(low, high, factor, length, kind)

    def covered(self, region: Region) -> Region:
        """Return the voxels whose centres lie in a region of the working grid."""
        return Region.between(
            (max(0, ceil(a * s - 0.5)) for a, s in zip(region.start, self.scale, strict=True)),
            (min(n, ceil(b * s - 0.5)) for b, s, n in zip(region.stop, self.scale, self.shape, strict=True)),
        )


@final
class Layers:
    """Which rows each layer of tiles (along the first axis) reaches, finishes, and paints."""

    def __init__(self, grid: TileGrid, spec: FieldSpec, canvas: Canvas) -> None:
        line, low, high = grid.lines[0], grid.extent.start[0], grid.extent.stop[0]
        self.count = grid.counts[0]
        crop = spec.window == "crop"
        begins = line.owned[:-1] if crop else line.read
        ends = line.owned[1:] if crop else tuple(a + grid.tile[0] for a in line.read)
        self._low = [min(max(a, low), high) for a in begins]
        self._high = [min(max(b, low), high) for b in ends]
        # what no later layer reaches; the ends bound what lies before the first and behind the last
        finished = [low, *self._low[1:], high]
        taps = canvas.taps(0, 0, canvas.shape[0], high - low, spec.restore)
        used = (taps.weights != 0).cumsum(axis=1).argmax(axis=1)
        last = low + taps.first + used
        bounds = [int(np.searchsorted(last, row)) for row in finished[1:-1]]
        self._painted = [0, *bounds, canvas.shape[0]]
        first = low + taps.first
        self._need = []
        for k in range(self.count):
            rows = first[self._painted[k] : self._painted[k + 1]]
            self._need.append(min(int(rows[0]), finished[k]) if len(rows) else finished[k])
        # later layers may look back further than this one's own rows do
        for k in range(self.count - 2, -1, -1):
            self._need[k] = min(self._need[k], self._need[k + 1])

    def reached(self, layer: int) -> tuple[int, int]:
        """Return the rows that the layer's tiles weigh in."""
        return self._low[layer], self._high[layer]

    def needed(self, layer: int) -> int:
        """Return the first row that matters to this layer and those behind it."""
        return self._need[layer]

    def painted(self, layer: int) -> tuple[int, int]:
        """Return the canvas's rows that are painted when the layer is complete."""
        return self._painted[layer], self._painted[layer + 1]

    def before(self, layer: int) -> list[int]:
        """Return the earlier layers whose tiles matter to this one, in order."""
        return [k for k in range(layer) if self._high[k] > self._need[layer]]

    @property
    def kept(self) -> int:
        """Return the most rows that are ever kept."""
        return max(h - n for h, n in zip(self._high, self._need, strict=True))
