"""Outlines against outlines, and outlines on the grid of a label map. No whole slide is ever drawn.

Shared areas come from the polygons themselves. Truth is taken block by block, in an order that keeps neighbours
together, so that memory follows a block and not the slide. Areas are counted in 1/256 of a pixel, so that the
table holds whole numbers, as that of label maps does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.evaluation.labels import Labels, Outlines
from wsitk.metrics.contingency import Contingency

__all__ = ["outline_table", "draw", "AREA_UNIT"]

Array = NDArray[Any]

AREA_UNIT = 256
"""Parts of a pixel in which the areas of `outline_table` are counted."""

_BLOCK = 4_096  # true objects at a time: some ten MB of shapes


def outline_table(truth: Outlines, predicted: Outlines) -> Contingency:
    """Return the table of all pairs of polygons that overlap; objects are numbered 1, 2, ... in their order.

    Areas are in `AREA_UNIT` parts of a pixel. Raises UsageError (WSI830) for outlines that are mere points.
    """
    for side in (truth, predicted):
        if not side.has_areas:
            raise UsageError(
                "WSI830", f"{side.source}: points have no area; take --task detection, or give polygons"
            )
    truth_area, predicted_area = _areas(truth), _areas(predicted)
    parts = list(_shared(truth, predicted))
    t, p, shared = (
        np.concatenate([part[k] for part in parts]) if parts else np.zeros(0, np.int64) for k in range(3)
    )
    order = np.lexsort((p, t))
    return Contingency(
        np.arange(1, len(truth) + 1),
        np.arange(1, len(predicted) + 1),
        truth_area,
        predicted_area,
        t[order],
        p[order],
        shared[order],
    )


def _shared(truth: Outlines, predicted: Outlines) -> Iterator[tuple[Array, Array, Array]]:
    """Yield pairs and their common area, block by block of the truth."""
    import shapely

    left, top, right, bottom = predicted.bounds.T
    for rows in _blocks(truth):
        (x0, y0), (x1, y1) = truth.bounds[rows, :2].min(axis=0), truth.bounds[rows, 2:].max(axis=0)
        near = np.flatnonzero((left <= x1) & (right >= x0) & (top <= y1) & (bottom >= y0))
        theirs, mine = predicted.polygons(near), truth.polygons(rows)
        t, p = shapely.STRtree(theirs).query(mine)
        common = shapely.area(shapely.intersection(mine[t], theirs[p]))
        area = np.rint(common * AREA_UNIT).astype(np.int64)
        hit = area > 0
        yield rows[t[hit]], near[p[hit]], area[hit]


def _blocks(outlines: Outlines) -> Iterator[Array]:
    """Yield rows (ascending) of neighbouring objects: strips of the plane, each cut into pieces."""
    if not len(outlines):
        return
    centre = outlines.bounds[:, :2]
    strips = max(1, round(np.sqrt(len(centre) / _BLOCK)))
    by_y = np.argsort(centre[:, 1], kind="stable")
    for strip in np.array_split(by_y, strips):
        by_x = strip[np.argsort(centre[strip, 0], kind="stable")]
        for piece in np.array_split(by_x, max(1, round(len(strip) / _BLOCK))):
            yield np.sort(piece)


def _areas(outlines: Outlines) -> Array:
    import shapely

    area = np.zeros(len(outlines), np.int64)
    for start in range(0, len(area), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(area)))
        area[rows] = np.maximum(1, np.rint(shapely.area(outlines.polygons(rows)) * AREA_UNIT))
    return area


def draw(outlines: Outlines, shape: tuple[int, ...]) -> tuple[Labels, int]:
    """Return `outlines` on a pixel grid of `shape` (H, W), and the pixels that more than one object claims.

    A pixel belongs to the object that its centre lies in, to the later one of several. Outlines that wsitk made from
    masks give exactly these masks back. Object ``k`` becomes label ``k + 1``.
    """
    if not outlines.has_areas or len(shape) != 2:
        raise UsageError(
            "WSI830", f"{outlines.source}: only polygons can be drawn, and only onto plane images"
        )
    layer = np.zeros(shape, np.int32)
    twice = 0
    for start in range(0, len(outlines), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(outlines)))
        for row, polygon in zip(rows, outlines.polygons(rows), strict=True):
            y, x = _inside(polygon, shape)
            twice += int((layer[y, x] > 0).sum())
            layer[y, x] = row + 1
    kinds = np.concatenate([[-1], outlines.kinds])
    um = outlines.spacing_um
    drawn = Labels(
        layer[None],
        outlines.names,
        kinds,
        typed=outlines.typed,
        declared=outlines.declared,
        spacing=None if um is None else (um, um),
        unit="" if um is None else "um",
        source=f"{outlines.source}, drawn on {shape[1]} × {shape[0]} px",
    )
    return drawn, twice


def _inside(polygon: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return rows and columns of the pixels whose centres lie inside."""
    import shapely
    from skimage.draw import polygon as fill

    low = np.maximum(np.floor(polygon.bounds[:2]).astype(int), 0)
    high = np.minimum(np.ceil(polygon.bounds[2:]).astype(int), shape[::-1])
    if (high <= low).any():
        none = np.zeros(0, np.int64)
        return none, none
    mask = np.zeros((high - low)[::-1], bool)
    for part in shapely.get_parts(polygon):
        piece = np.zeros_like(mask)
        for ring, inner in zip(shapely.get_rings(part), [False] + [True] * len(part.interiors), strict=True):
            x, y = (shapely.get_coordinates(ring) - low - 0.5).T  # pixel i has its centre at i + 0.5
            piece[fill(y, x, mask.shape)] = not inner
        mask |= piece
    y, x = np.nonzero(mask)
    return y + low[1], x + low[0]
