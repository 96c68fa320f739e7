"""Joining the pieces of a nucleus that the watershed cut: do the distance maps speak of one nucleus or of two?

A segment has distance maps of its own: the offset of each of its pixels from its centre, scaled to -1 .. 1.
The network's maps are much like them where the segment is a nucleus, and much unlike where it is half of one.
So two neighbours are joined where the maps of both together fit the network's better than the maps of each,
provided that both together are nearly convex, as nuclei are.

Everything is local and in whole numbers as far as it can be: which neighbours are joined depends on nothing but
the pieces in touch with them, wherever in the image they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = ["join"]

Array = NDArray[Any]

CONTACT = 0.15
"""Least length of contact, as a share of the diameter of a disc as large as the smaller piece."""


@compiled
def join(labels: Array, hv: Array, unit: float, gain_min: float, solidity_min: float) -> None:
    """Join pieces in place; `labels` is int32 (H + 2, W + 2) with 1 .. N, `hv` int16 (2, H, W) in 1 / `unit`.

    Two pieces are joined if that lowers the mean squared misfit of the maps over their pixels by more than
    `gain_min`, and they fill at least `solidity_min` of their convex hull. In each round those pairs are joined
    of which each is the other's best partner; rounds go on until there is none.
    """
    count = labels.max()
    first, pixels = _members(labels, count)
    pairs, contact = _neighbours(labels, count)
    follower = np.zeros(count + 1, np.int32)  # the next piece of the same nucleus
    last = np.arange(count + 1).astype(np.int32)
    head = last.copy()  # the first piece of the nucleus that a piece belongs to
    own = np.zeros(count + 1)
    for piece in range(1, count + 1):
        own[piece] = _misfit(piece, 0, follower, first, pixels, labels.shape[1], hv, unit)[0]
    gains, joint = np.full(len(pairs), -np.inf), np.zeros(len(pairs))
    changed = np.ones(count + 1, np.bool_)
    while changed.any():
        _judge(
            pairs, contact, changed, own, gains, joint, follower, first, pixels, labels.shape[1], hv, unit,
            gain_min, solidity_min,
        )  # fmt: skip
        changed[:] = False
        _join_best(pairs, contact, gains, joint, own, follower, last, head, changed)
    flat = labels.reshape(-1)
    for p in range(flat.size):
        if flat[p] > 0:
            flat[p] = head[flat[p]]


@compiled
def _members(labels: Array, count: int) -> tuple[Array, Array]:
    """Return where each label's pixels begin (N + 2,), and the pixels of all, in raster order."""
    flat = labels.reshape(-1)
    first = np.zeros(count + 2, np.int64)
    for p in range(flat.size):
        if flat[p] > 0:
            first[flat[p] + 1] += 1
    first = np.cumsum(first)
    place, pixels = first.copy(), np.empty(first[-1], np.int64)
    for p in range(flat.size):
        if flat[p] > 0:
            pixels[place[flat[p]]] = p
            place[flat[p]] += 1
    return first, pixels


@compiled
def _neighbours(labels: Array, count: int) -> tuple[Array, Array]:
    """Return the pairs of labels (P, 2) that touch, the smaller first, in order, and along how many pixels."""
    width = labels.shape[1]
    flat = labels.reshape(-1)
    found = np.empty(2 * flat.size, np.int64)
    size = 0
    for p in range(flat.size - width):
        for q in (p + 1, p + width):
            if flat[p] > 0 and flat[q] > 0 and flat[p] != flat[q]:
                low, high = min(flat[p], flat[q]), max(flat[p], flat[q])
                found[size] = np.int64(low) * (count + 1) + high
                size += 1
    keys = np.sort(found[:size])
    pairs, contact = np.empty((size, 2), np.int32), np.zeros(size, np.int64)
    number = 0
    for k in range(size):
        if k == 0 or keys[k] != keys[k - 1]:
            pairs[number, 0], pairs[number, 1] = keys[k] // (count + 1), keys[k] % (count + 1)
            number += 1
        contact[number - 1] += 1
    return pairs[:number], contact[:number]


@compiled
def _misfit(
    one: int, other: int, follower: Array, first: Array, pixels: Array, width: int, hv: Array, unit: float
) -> tuple[float, int]:
    """Return the summed squared misfit of the nucleus made of two (0: of one alone), and its size."""
    size, sum_y, sum_x = 0, 0, 0
    low_y, low_x, high_y, high_x = hv.shape[1], hv.shape[2], 0, 0
    for start in (one, other):
        piece = start
        while piece > 0:
            for k in range(first[piece], first[piece + 1]):
                y, x = pixels[k] // width - 1, pixels[k] % width - 1
                size, sum_y, sum_x = size + 1, sum_y + y, sum_x + x
                low_y, low_x = min(low_y, y), min(low_x, x)
                high_y, high_x = max(high_y, y), max(high_x, x)
            piece = follower[piece]
    # Rounded in whole numbers: a half must round the same way wherever it lies.
    mid_y, mid_x = (2 * sum_y + size) // (2 * size), (2 * sum_x + size) // (2 * size)
    up, down = 1.0 / max(1, mid_y - low_y), 1.0 / max(1, high_y - mid_y)
    left, right = 1.0 / max(1, mid_x - low_x), 1.0 / max(1, high_x - mid_x)
    total = 0.0
    for start in (one, other):
        piece = start
        while piece > 0:
            for k in range(first[piece], first[piece + 1]):
                y, x = pixels[k] // width - 1, pixels[k] % width - 1
                dx = (x - mid_x) * (left if x < mid_x else right) - hv[0, y, x] / unit
                dy = (y - mid_y) * (up if y < mid_y else down) - hv[1, y, x] / unit
                total += dx * dx + dy * dy
            piece = follower[piece]
    return total, size


@compiled
def _solidity(one: int, other: int, follower: Array, first: Array, pixels: Array, width: int) -> float:
    """Return the area of two pieces over that of their convex hull, every pixel being a square."""
    top, bottom, size = pixels[first[one]] // width, 0, 0
    for start in (one, other):
        piece = start
        while piece > 0:
            top = min(top, pixels[first[piece]] // width)
            bottom = max(bottom, pixels[first[piece + 1] - 1] // width)
            size += first[piece + 1] - first[piece]
            piece = follower[piece]
    # The leftmost and rightmost corner on each line between rows.
    lines = bottom - top + 2
    left, right = np.full(lines, width), np.zeros(lines, np.int64)
    for start in (one, other):
        piece = start
        while piece > 0:
            for k in range(first[piece], first[piece + 1]):
                y, x = pixels[k] // width - top, pixels[k] % width
                for line in (y, y + 1):
                    left[line], right[line] = min(left[line], x), max(right[line], x + 1)
            piece = follower[piece]
    return size / (_under_hull(right) + _under_hull(-left))


@compiled
def _under_hull(heights: Array) -> float:
    """Return the area under the upper convex hull of points one apart."""
    corner = np.empty(heights.size, np.int64)
    size = 0
    for k in range(heights.size):
        while size > 1:
            i, j = corner[size - 2], corner[size - 1]
            if (heights[j] - heights[i]) * (k - i) > (heights[k] - heights[i]) * (j - i):
                break
            size -= 1
        corner[size] = k
        size += 1
    area = 0.0
    for c in range(1, size):
        i, j = corner[c - 1], corner[c]
        area += 0.5 * (j - i) * (heights[i] + heights[j])
    return area


@compiled
def _judge(
    pairs: Array,
    contact: Array,
    changed: Array,
    own: Array,
    gains: Array,
    joint: Array,
    follower: Array,
    first: Array,
    pixels: Array,
    width: int,
    hv: Array,
    unit: float,
    gain_min: float,
    solidity_min: float,
) -> None:
    """Set the gain of every pair with a changed member, -inf where it must not be joined."""
    for k in range(len(pairs)):
        a, b = pairs[k, 0], pairs[k, 1]
        if a == 0 or not (changed[a] or changed[b]):
            continue
        gains[k] = -np.inf
        smaller = min(_size(a, follower, first), _size(b, follower, first))
        if contact[k] < CONTACT * 2.0 * np.sqrt(smaller / np.pi):
            continue
        misfit, size = _misfit(a, b, follower, first, pixels, width, hv, unit)
        gain = (own[a] + own[b] - misfit) / size
        if gain > gain_min and _solidity(a, b, follower, first, pixels, width) >= solidity_min:
            gains[k], joint[k] = gain, misfit


@compiled
def _size(piece: int, follower: Array, first: Array) -> int:
    size = 0
    while piece > 0:
        size += first[piece + 1] - first[piece]
        piece = follower[piece]
    return size


@compiled
def _join_best(
    pairs: Array,
    contact: Array,
    gains: Array,
    joint: Array,
    own: Array,
    follower: Array,
    last: Array,
    head: Array,
    changed: Array,
) -> None:
    """Join the pairs of mutually best partners and rename the pairs of what was joined."""
    best = np.full(len(own), -1, np.int64)
    for k in range(len(pairs)):
        if pairs[k, 0] == 0 or gains[k] == -np.inf:
            continue
        for piece in pairs[k]:
            # The first of equals stays.
            if best[piece] < 0 or gains[k] > gains[best[piece]]:
                best[piece] = k
    for k in range(len(pairs)):
        a, b = pairs[k, 0], pairs[k, 1]
        if a == 0 or best[a] != k or best[b] != k:
            continue
        follower[last[a]] = b
        last[a] = last[b]
        own[a] = joint[k]
        changed[a] = True
        piece = b
        while piece > 0:
            head[piece] = a
            piece = follower[piece]
    _rename(pairs, contact, gains, head)


@compiled
def _rename(pairs: Array, contact: Array, gains: Array, head: Array) -> None:
    """Let pairs name nuclei instead of pieces; what has become one pair twice is counted once."""
    order = np.empty(len(pairs), np.int64)
    for k in range(len(pairs)):
        a, b = head[pairs[k, 0]], head[pairs[k, 1]]
        if a == b:
            a, b = 0, 0
        pairs[k, 0], pairs[k, 1] = min(a, b), max(a, b)
        order[k] = np.int64(pairs[k, 0]) * len(head) + pairs[k, 1]
    by = np.argsort(order, kind="mergesort")
    for k in range(1, len(by)):
        here, before = by[k], by[k - 1]
        if order[here] == order[before] and pairs[here, 0] > 0:
            # The later one carries the sum; both were touched by a change, or neither is a double.
            contact[here] += contact[before]
            gains[here] = max(gains[here], gains[before])
            pairs[before, 0], pairs[before, 1] = 0, 0
