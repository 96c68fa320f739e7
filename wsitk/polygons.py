"""From packed masks to polygons and shape measures: ragged arrays, no Python object per cell.

The outline of a mask joins the midpoints of its pixel edges, so corners are cut and slanted borders look
slanted. Its area is the number of pixels, less one half for each outer ring, plus one half for each hole.
Vertices are multiples of one half and different rings keep at least 0.7 pixels apart: polygons are valid, and
stay so when scaled and rounded to a hundredth of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.objects import ObjectTable

__all__ = ["RingTable", "rings", "to_shapely", "SHAPE_COLUMNS", "shapes"]

Array = NDArray[Any]

SHAPE_COLUMNS = (
    "area_px",
    "area_um2",
    "perimeter_um",
    "equivalent_diameter_um",
    "circularity",
    "solidity",
    "eccentricity",
    "major_axis_um",
    "minor_axis_um",
    "max_diameter_um",
)
"""What `shapes` measures, in this order."""


@dataclass(frozen=True)
class RingTable:
    """Outlines of N objects: objects hold polygons, polygons hold rings, rings hold points.

    Attributes
    ----------
    xy : float64 (V, 2)
        Points in pixels of the working grid, x to the right, y down; pixel ``i`` covers ``[i, i + 1)``.
        A ring's last point repeats its first. Outer rings have a positive shoelace sum, holes a negative.
    ring_offset : int64 (R + 1,)
        Where each ring begins in `xy`.
    polygon_offset : int64 (P + 1,)
        Where each polygon begins among the rings: the outer ring, then its holes.
    object_offset : int64 (N + 1,)
        Where each object begins among the polygons; one polygon for each 4-connected component.
    """

    xy: NDArray[np.float64]
    ring_offset: NDArray[np.int64]
    polygon_offset: NDArray[np.int64]
    object_offset: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.object_offset) - 1


def rings(table: ObjectTable) -> RingTable:
    """Return the outlines of all objects of a two-dimensional table, row by row.

    Raises UsageError for another number of dimensions.
    """
    if table.ndim != 2:
        raise UsageError("WSI065", f"outlines need two-dimensional objects, got {table.ndim} dimensions")
    from wsitk.outlines import trace

    doubled, ring_end, polygon_end, objects = trace(table.bits, table.offset, table.start, table.shape)
    zero = np.zeros(1, np.int64)
    return RingTable(
        xy=doubled / 2.0,
        ring_offset=np.concatenate([zero, ring_end]),
        polygon_offset=np.concatenate([zero, polygon_end]),
        object_offset=objects,
    )


def to_shapely(
    outlines: RingTable,
    scale_xy: tuple[float, float] = (1.0, 1.0),
    offset_xy: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.object_]:
    """Return a geometry for each object, with coordinates ``xy * scale_xy + offset_xy``.

    An object of one component is a Polygon, of several a MultiPolygon.
    """
    import shapely

    xy = outlines.xy * scale_xy + offset_xy
    polygons = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, xy, (outlines.ring_offset, outlines.polygon_offset)
    )
    each = np.diff(outlines.object_offset)
    if np.all(each == 1):
        return np.asarray(polygons, object)
    owner = np.repeat(np.arange(len(each)), each)
    joined = np.full(len(each), shapely.MultiPolygon(), object)
    shapely.multipolygons(polygons, indices=owner, out=joined)
    single = each == 1
    joined[single] = polygons[outlines.object_offset[:-1][single]]
    return joined


def shapes(
    table: ObjectTable, spacing_um: tuple[float, float], outlines: RingTable | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return `SHAPE_COLUMNS`, each float64 (N,), for pixels of `spacing_um` (y, x) micrometres.

    `area_px` and `area_um2` count pixels. `perimeter_um` is the length of the outer rings as they are
    drawn; a digital outline is longer than the curve it stands for (a disc's by 5 %). `circularity` is
    4 pi area / perimeter^2 of the outer rings, `solidity` the share of the convex hull that the polygons
    fill: both at most 1. Axes and eccentricity are those of the ellipse with the mask's second moments, as in
    scikit-image. `max_diameter_um` is the largest distance between two points of the outline. `outlines`
    spares tracing the table again.
    """
    from wsitk.outlines import hulls, ring_sums, second_moments

    found = rings(table) if outlines is None else outlines
    xy = found.xy * (spacing_um[1], spacing_um[0])
    ring_area, ring_length = ring_sums(xy, found.ring_offset)
    first_ring = found.polygon_offset[found.object_offset]
    outer = ring_area > 0
    outer_area = _sum_rows(np.where(outer, ring_area, 0.0), first_ring)
    net_area = _sum_rows(ring_area, first_ring)
    perimeter = _sum_rows(np.where(outer, ring_length, 0.0), first_ring)
    hull_area, max_diameter = hulls(xy, found.ring_offset[first_ring])
    yy, xx, xy_moment = second_moments(table.bits, table.offset, table.shape).T
    major, minor = _axes(
        yy * spacing_um[0] ** 2, xx * spacing_um[1] ** 2, xy_moment * spacing_um[0] * spacing_um[1]
    )
    area_um2 = table.size * (spacing_um[0] * spacing_um[1])
    values = (
        table.size.astype(np.float64),
        area_um2,
        perimeter,
        np.sqrt(area_um2 * (4 / np.pi)),
        np.minimum(1.0, 4 * np.pi * outer_area / perimeter**2),
        np.minimum(1.0, net_area / hull_area),
        np.sqrt(np.maximum(0.0, 1 - (minor / major) ** 2)),
        major,
        minor,
        max_diameter,
    )
    return dict(zip(SHAPE_COLUMNS, values, strict=True))


def _sum_rows(values: Array, offset: Array) -> Array:
    """Return the sum of `values` between each two offsets, each in its own order."""
    rows = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
    return np.bincount(rows, values, len(offset) - 1)


def _axes(yy: Array, xx: Array, xy: Array) -> tuple[Array, Array]:
    """Return full major and minor axis lengths of the ellipses with these second moments."""
    middle, spread = (yy + xx) / 2, np.sqrt(((yy - xx) / 2) ** 2 + xy**2)
    return 4 * np.sqrt(middle + spread), 4 * np.sqrt(np.maximum(0.0, middle - spread))
