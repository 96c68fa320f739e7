"""Compiled kernels of the HoVer post-processing: preparing, flooding, filling, numbering, summing.

Label images are padded by one pixel on each side, so that no loop asks where the border is. Every order is
raster order, and raster order within a queue level: what happens in one connected piece of the mask depends
neither on the other pieces nor on where in the array it lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = [
    "LEVELS",
    "HV_STEPS",
    "quantise",
    "prepare",
    "seed",
    "flood",
    "fill_holes",
    "number",
    "sum_by_label",
]

Array = NDArray[Any]

LEVELS = 256
"""Number of heights that the flooding tells apart."""

HV_STEPS = 256
"""Steps per unit of the HV maps; they are cut at -2 and 2 (the network is trained on -1 to 1)."""


@compiled
def quantise(hv: Array, steps: int) -> Array:
    """Return float (2, H, W) as int16 in `steps` per unit, cut at -2 and 2; not-a-number becomes -2."""
    out = np.empty(hv.shape, np.int16)
    source, target = hv.reshape(-1), out.reshape(-1)
    for i in range(source.size):
        value = source[i]
        if not value > -2.0:
            value = -2.0
        if value > 2.0:
            value = 2.0
        target[i] = np.int16(np.floor(value * steps + 0.5))
    return out


@compiled
def prepare(
    prob: Array, slope_x: Array, slope_y: Array, threshold: float, edge: float, scale: float
) -> tuple[Array, Array, Array]:
    """Return the mask, the mask without edges (uint8) and the height (uint8) of (H, W) maps.

    The energy of an edge is the steeper fall of the two maps; heights are ``128 + energy * scale``.
    """
    mask, inside = np.empty(prob.shape, np.uint8), np.empty(prob.shape, np.uint8)
    height = np.zeros((prob.shape[0] + 2, prob.shape[1] + 2), np.uint8)
    for y in range(prob.shape[0]):
        for x in range(prob.shape[1]):
            energy = max(-slope_x[y, x], -slope_y[y, x])
            mask[y, x] = prob[y, x] >= threshold
            inside[y, x] = mask[y, x] and energy < edge
            height[y + 1, x + 1] = min(255.0, max(0.0, 128.0 + energy * scale))
    return mask, inside, height


@compiled
def seed(mask: Array, pieces: Array, markers: Array, size_min: int) -> Array:
    """Return the label image (H + 2, W + 2) that `flood` starts from.

    `pieces` and `markers` number the connected components of the mask and of the markers (0 = none).
    Markers of fewer than `size_min` pixels do not count. A piece that no marker speaks for is one object.
    """
    rows, columns = mask.shape
    size = np.zeros(markers.max() + 1, np.int64)
    for y in range(rows):
        for x in range(columns):
            size[markers[y, x]] += 1
    size[0] = 0
    spoken = np.zeros(pieces.max() + 1, np.bool_)
    for y in range(rows):
        for x in range(columns):
            if markers[y, x] and size[markers[y, x]] >= size_min:
                spoken[pieces[y, x]] = True
    out = np.full((rows + 2, columns + 2), -1, np.int32)
    for y in range(rows):
        for x in range(columns):
            if mask[y, x]:
                marker, piece = markers[y, x], pieces[y, x]
                if not spoken[piece]:
                    out[y + 1, x + 1] = len(size) + piece
                else:
                    out[y + 1, x + 1] = marker if marker and size[marker] >= size_min else 0
    return out


@compiled
def flood(labels: Array, height: Array) -> None:
    """Grow the seeds over the unlabelled mask, lowest height first, in place.

    `labels` is int32 (H + 2, W + 2): positive = seed, 0 = to be flooded, negative = outside (the frame must
    be). `height` is uint8 of the same shape. Pixels of one height are taken first come, first served, as in
    Meyer's algorithm (Beucher & Meyer 1993), neighbours being the four adjacent ones; a seed's region is
    therefore connected if the seed is.
    """
    width = labels.shape[1]
    flat, level = labels.reshape(-1), height.reshape(-1)
    following = np.empty(flat.size, np.int32)
    first, last = np.full(LEVELS, -1, np.int32), np.full(LEVELS, -1, np.int32)
    steps = (-width, -1, 1, width)
    for p in range(width, flat.size - width):
        if flat[p] > 0 and (
            flat[p - width] == 0 or flat[p - 1] == 0 or flat[p + 1] == 0 or flat[p + width] == 0
        ):
            _push(p, level[p], first, last, following)
    current = 0
    while current < LEVELS:
        p = first[current]
        if p < 0:
            current += 1
            continue
        first[current] = following[p]
        for step in steps:
            q = p + step
            if flat[q] == 0:
                flat[q] = flat[p]
                _push(q, level[q], first, last, following)
                if level[q] < current:
                    current = int(level[q])


@compiled
def _push(p: int, level: int, first: Array, last: Array, following: Array) -> None:
    following[p] = -1
    if first[level] < 0:
        first[level] = p
    else:
        following[last[level]] = p
    last[level] = p


@compiled
def number(labels: Array, size_min: int) -> int:
    """Renumber a padded label image 1, 2, ... by first pixel in place, small labels and outside becoming 0.

    Returns the number of labels that are left.
    """
    flat = labels.reshape(-1)
    size = np.zeros(max(0, flat.max()) + 1, np.int64)
    for p in range(flat.size):
        if flat[p] > 0:
            size[flat[p]] += 1
    fresh = np.zeros(size.size, np.int32)
    count = 0
    for p in range(flat.size):
        label = flat[p]
        if label <= 0 or size[label] < size_min:
            flat[p] = 0
            continue
        if fresh[label] == 0:
            count += 1
            fresh[label] = count
        flat[p] = fresh[label]
    return count


@compiled
def fill_holes(labels: Array, gaps: Array) -> None:
    """Give each gap (a component of the background) that one label alone surrounds to that label, in place.

    `gaps` numbers the components of ``labels == 0`` in the padded image, diagonal neighbours included; the
    frame belongs to a gap that touches it.
    """
    rows, columns = labels.shape
    owner = np.zeros(gaps.max() + 1, np.int32)
    for y in range(rows):
        for x in range(columns):
            gap = gaps[y, x]
            if gap == 0:
                continue
            if y == 0 or x == 0 or y == rows - 1 or x == columns - 1:
                owner[gap] = -1
                continue
            for label in (labels[y - 1, x], labels[y, x - 1], labels[y, x + 1], labels[y + 1, x]):
                if label and owner[gap] != label:
                    owner[gap] = label if owner[gap] == 0 else -1
    for y in range(rows):
        for x in range(columns):
            if gaps[y, x] and owner[gaps[y, x]] > 0:
                labels[y, x] = owner[gaps[y, x]]


@compiled
def sum_by_label(labels: Array, values: Array, count: int) -> Array:
    """Return float64 (count, C): the sums of `values` (C, H, W) over the labels 1 .. count of (H, W)."""
    sums = np.zeros((count, values.shape[0]))
    for c in range(values.shape[0]):
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                if labels[y, x] > 0:
                    sums[labels[y, x] - 1, c] += values[c, y, x]
    return sums
