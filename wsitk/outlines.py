"""Compiled kernels that walk packed masks: outlines, hulls, moments. `wsitk.polygons` is the public side.

An outline joins the midpoints of the pixel edges between inside and outside (marching squares at one half).
Edges are walked with the inside on the right hand (y down), which makes an outer ring's shoelace sum positive
and a hole's negative. Where two pixels meet at a corner only, the walk turns right: they are apart. So each
edge midpoint belongs to one ring, once, and rings neither cross nor touch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = ["trace", "second_moments", "ring_sums", "hulls"]

Array = NDArray[Any]


@compiled
def _unpack(bits: Array, height: int, width: int) -> Array:
    """Return packed bits as int32 (height + 2, width + 2) with a frame of zeros."""
    out = np.zeros((height + 2, width + 2), np.int32)
    i = 0
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            out[y, x] = (bits[i >> 3] >> (7 - (i & 7))) & 1
            i += 1
    return out


@compiled
def _edges(mask: Array) -> int:
    """Count the pixel edges between inside and outside of a framed mask."""
    count = 0
    for y in range(mask.shape[0] - 1):
        for x in range(mask.shape[1] - 1):
            count += (mask[y, x] != mask[y + 1, x]) + (mask[y, x] != mask[y, x + 1])
    return count


@compiled
def _components(mask: Array) -> tuple[Array, int]:
    """Return the 4-connected components of a framed mask, numbered from 1 in raster order, and how many."""
    width = mask.shape[1]
    flat, out = mask.reshape(-1), np.zeros(mask.size, np.int32)
    stack = np.empty(mask.size, np.int64)
    count = 0
    for first in range(mask.size):
        if not flat[first] or out[first]:
            continue
        count += 1
        out[first] = count
        stack[0], depth = first, 1
        while depth:
            depth -= 1
            p = stack[depth]
            for q in (p - width, p - 1, p + 1, p + width):
                if flat[q] and not out[q]:
                    out[q] = count
                    stack[depth] = q
                    depth += 1
    return out.reshape(mask.shape), count


@compiled
def _ring(parts: Array, part: int, seen: Array, y: int, x: int, xy: Array, used: int) -> tuple[int, int]:
    """Write the closed ring that runs along the upper edge of pixel (y, x).

    Returns where it ends in `xy`, and its right turns less its left ones: 4 for an outer ring, -4 for a hole.
    Coordinates are twice those of the framed array. Upper edges passed are noted in `seen`.
    """
    step_y, step_x = (0, 1, 0, -1), (1, 0, -1, 0)  # right, down, left, up
    begin, turns = used, 0
    corner_y, corner_x, heading = y, x, 0  # the edge starts at this corner and goes along `heading`
    before = -1
    while True:
        end_y, end_x = corner_y + step_y[heading], corner_x + step_x[heading]
        # The two pixels beyond the edge's end: on the right hand, and on the left.
        if heading == 0:
            right, left = parts[end_y, end_x], parts[end_y - 1, end_x]
        elif heading == 1:
            right, left = parts[end_y, end_x - 1], parts[end_y, end_x]
        elif heading == 2:
            right, left = parts[end_y - 1, end_x - 1], parts[end_y, end_x - 1]
        else:
            right, left = parts[end_y - 1, end_x], parts[end_y - 1, end_x - 1]
        after, turn = heading, 0
        if right != part:
            after, turn = (heading + 1) & 3, 1
        elif left == part:
            after, turn = (heading + 3) & 3, -1
        if before >= 0:  # the first edge is written when the walk comes back to it
            turns += turn
            if before != after:  # otherwise the outline goes straight on through this midpoint
                xy[used, 0], xy[used, 1] = corner_x + end_x, corner_y + end_y
                used += 1
            if heading == 0:
                seen[corner_y, corner_x] = True
                if corner_y == y and corner_x == x:
                    break
        before, heading, corner_y, corner_x = heading, after, end_y, end_x
    xy[used] = xy[begin]
    return used + 1, turns


@compiled
def _rings(
    parts: Array, part: int, low_y: int, low_x: int, xy: Array, points: int, ring_end: Array, rings: int
) -> tuple[int, int, int]:
    """Write all rings around the pixels of value `part`, in raster order of their first pixel.

    `low_y`, `low_x` is twice the place of the framed array. Returns the counts of points and rings, and how
    many of the new rings are outer ones.
    """
    seen = np.zeros(parts.shape, np.bool_)
    begin, outer = points, 0
    for y in range(1, parts.shape[0] - 1):
        for x in range(1, parts.shape[1] - 1):
            if parts[y, x] == part and parts[y - 1, x] != part and not seen[y, x]:
                points, turns = _ring(parts, part, seen, y, x, xy, points)
                ring_end[rings] = points
                rings += 1
                outer += turns > 0
    for k in range(begin, points):
        xy[k, 0] += low_x
        xy[k, 1] += low_y
    return points, rings, outer


@compiled
def trace(bits: Array, offset: Array, start: Array, shape: Array) -> tuple[Array, Array, Array, Array]:
    """Return twice the coordinates int32 (V, 2) as (x, y), and the ends of rings and polygons, and objects.

    The arguments are the columns of a two-dimensional ObjectTable. Rings are closed; a polygon's outer ring
    comes first; an object has one polygon for each of its components, in raster order. Ends are offsets
    without the leading zero, which the offsets of the objects (N + 1) have.
    """
    count = len(shape)
    xy = np.empty((64 * count + 64, 2), np.int32)
    ring_end, polygon_end = np.zeros(count + 64, np.int64), np.zeros(count + 64, np.int64)
    objects = np.zeros(count + 1, np.int64)
    points, rings, polygons = 0, 0, 0
    for i in range(count):
        mask = _unpack(bits[offset[i] : offset[i + 1]], shape[i, 0], shape[i, 1])
        low_y, low_x = 2 * (start[i, 0] - 1), 2 * (start[i, 1] - 1)
        edges = _edges(mask)  # a ring has four at least, and one closing point
        xy = _reserve2(xy, points, edges + edges // 4)
        ring_end = _reserve1(ring_end, rings, edges // 4)
        polygon_end = _reserve1(polygon_end, polygons, edges // 4)
        first_point, first_ring = points, rings
        points, rings, outer = _rings(mask, 1, low_y, low_x, xy, points, ring_end, rings)
        if outer == 1:
            polygon_end[polygons] = rings
            polygons += 1
        elif outer > 1:  # rare: say which hole belongs to which component
            points, rings = first_point, first_ring
            parts, number = _components(mask)
            for part in range(1, number + 1):
                points, rings, outer = _rings(parts, part, low_y, low_x, xy, points, ring_end, rings)
                polygon_end[polygons] = rings
                polygons += 1
        objects[i + 1] = polygons
    return xy[:points], ring_end[:rings], polygon_end[:polygons], objects


@compiled
def _reserve1(values: Array, used: int, room: int) -> Array:
    """Return `values`, moved to a larger array if fewer than `room` places are left."""
    if used + room <= len(values):
        return values
    larger = np.empty(max(2 * len(values), used + room), values.dtype)
    larger[:used] = values[:used]
    return larger


@compiled
def _reserve2(values: Array, used: int, room: int) -> Array:
    """Do the same for pairs."""
    if used + room <= len(values):
        return values
    larger = np.empty((max(2 * len(values), used + room), 2), values.dtype)
    larger[:used] = values[:used]
    return larger


@compiled
def second_moments(bits: Array, offset: Array, shape: Array) -> Array:
    """Return float64 (N, 3): the central second moments yy, xx, xy of each mask, in square pixels.

    A pixel counts as a square of uniform mass, which adds 1/12 to yy and xx.
    """
    out = np.zeros((len(shape), 3))
    for i in range(len(shape)):
        n, sy, sx, syy, sxx, sxy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        k = 0
        for y in range(shape[i, 0]):
            for x in range(shape[i, 1]):
                if bits[offset[i] + (k >> 3)] & (128 >> (k & 7)):
                    n += 1.0
                    sy += y
                    sx += x
                    syy += y * y
                    sxx += x * x
                    sxy += x * y
                k += 1
        if n > 0:
            out[i, 0] = (syy - sy * sy / n) / n + 1.0 / 12.0
            out[i, 1] = (sxx - sx * sx / n) / n + 1.0 / 12.0
            out[i, 2] = (sxy - sx * sy / n) / n
    return out


@compiled
def ring_sums(xy: Array, ring_offset: Array) -> tuple[Array, Array]:
    """Return the signed area (outer rings positive) and the length of each closed ring."""
    count = len(ring_offset) - 1
    area, length = np.zeros(count), np.zeros(count)
    for r in range(count):
        x0, y0 = xy[ring_offset[r], 0], xy[ring_offset[r], 1]
        for k in range(ring_offset[r], ring_offset[r + 1] - 1):
            ax, ay = xy[k, 0] - x0, xy[k, 1] - y0
            bx, by = xy[k + 1, 0] - x0, xy[k + 1, 1] - y0
            area[r] += 0.5 * (ax * by - bx * ay)
            length[r] += np.sqrt((bx - ax) ** 2 + (by - ay) ** 2)
    return area, length


@compiled
def hulls(xy: Array, object_points: Array) -> tuple[Array, Array]:
    """Return the area and the largest diameter of the convex hull of each object's points.

    `object_points` are offsets into `xy`. Andrew's monotone chain; the diameter compares all pairs of hull
    points, of which a nucleus has some twenty.
    """
    count = len(object_points) - 1
    area, diameter = np.zeros(count), np.zeros(count)
    for i in range(count):
        points = xy[object_points[i] : object_points[i + 1]]
        if len(points) < 3:
            continue
        hull = _hull(points)
        for a in range(len(hull)):
            b = (a + 1) % len(hull)
            area[i] += 0.5 * (
                (hull[a, 0] - hull[0, 0]) * (hull[b, 1] - hull[0, 1])
                - (hull[b, 0] - hull[0, 0]) * (hull[a, 1] - hull[0, 1])
            )
            for c in range(a):
                reach = (hull[a, 0] - hull[c, 0]) ** 2 + (hull[a, 1] - hull[c, 1]) ** 2
                diameter[i] = max(diameter[i], reach)
        diameter[i] = np.sqrt(diameter[i])
    return area, diameter


@compiled
def _hull(points: Array) -> Array:
    # Two stable sorts, by y and then by x, order the points by (x, y).
    order = np.argsort(points[:, 1], kind="mergesort")
    order = order[np.argsort(points[order, 0], kind="mergesort")]
    hull = np.empty((2 * len(order) + 1, 2))
    size, floor = 0, 2
    for turn in range(2):
        for k in range(len(order)):
            p = points[order[k]] if turn == 0 else points[order[len(order) - 1 - k]]
            while size >= floor and _cross(hull[size - 2], hull[size - 1], p) <= 0:
                size -= 1
            hull[size] = p
            size += 1
        size -= 1  # the chain's last point begins the other one
        floor = size + 2
    return hull[:size]


@compiled
def _cross(a: Array, b: Array, c: Array) -> float:
    product: float = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    return product
