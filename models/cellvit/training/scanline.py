"""The compiled loop that fills polygons, row by row. `rasterise` is the public side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = ["fill"]

Array = NDArray[Any]


@compiled
def fill(out: Array, xy: Array, ring_offset: Array, object_offset: Array, numbers: Array) -> None:
    """Write each object's number where a pixel's centre lies inside it, even-odd over its rings.

    A centre on an outline belongs to what lies right of or below the outline, so that two objects which
    share a border never share a pixel.
    """
    height, width = out.shape
    for k in range(len(object_offset) - 1):
        first, last = object_offset[k], object_offset[k + 1]
        a, b = ring_offset[first], ring_offset[last]
        if a == b:
            continue
        crossing = np.empty(b - a, np.float64)
        low, high = xy[a:b, 1].min(), xy[a:b, 1].max()
        top, bottom = max(0.0, np.ceil(low - 0.5)), min(float(height), np.ceil(high - 0.5))
        for row in range(int(top), int(bottom)):
            centre = row + 0.5
            count = 0
            for ring in range(first, last):
                for v in range(ring_offset[ring], ring_offset[ring + 1] - 1):
                    y0, y1 = xy[v, 1], xy[v + 1, 1]
                    if (y0 <= centre) != (y1 <= centre):
                        crossing[count] = xy[v, 0] + (centre - y0) * (xy[v + 1, 0] - xy[v, 0]) / (y1 - y0)
                        count += 1
            found = np.sort(crossing[:count])
            for pair in range(count // 2):
                left = max(0.0, np.ceil(found[2 * pair] - 0.5))
                right = min(float(width), np.ceil(found[2 * pair + 1] - 0.5))
                for column in range(int(left), int(right)):
                    out[row, column] = numbers[k]
