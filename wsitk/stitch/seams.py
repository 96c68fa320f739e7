"""Who sees what at a seam: which objects of different tiles are the same one, and which of them stays.

Two objects of different tiles *conflict* if their masks share more than half of the smaller one. Objects
have a strict order: seen whole before cut, seen by the owner of the anchor before others, then the most
central one, then by coordinates. Down that order an object stays if it conflicts with none that stayed;
one whose anchor its own tile doesn't own stays only if another tile saw it too. All this is a property of
tiles and masks alone: no order of arrival and no arrangement of blocks enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled
from wsitk.grid import TileGrid
from wsitk.objects import ObjectTable

__all__ = ["DROPPED", "KEPT", "UNDECIDED", "Frames", "conflicts", "priority", "settle"]

Array = NDArray[Any]

UNDECIDED, KEPT, DROPPED = 0, 1, -1


@dataclass(frozen=True)
class Frames:
    """Owned regions and read windows of many tiles: int64 arrays (N, d)."""

    owned_start: Array
    owned_stop: Array
    read_start: Array
    read_stop: Array

    @classmethod
    def of(cls, grid: TileGrid, tiles: Array) -> Frames:
        """Return the frames of tile numbers (N,); the same arithmetic as ``grid[i]``, for all at once."""
        places = np.stack(np.unravel_index(tiles, grid.counts), axis=1)
        lines = list(zip(grid.lines, places.T, strict=True))
        owned = np.stack([np.array(line.owned)[[place, place + 1]] for line, place in lines], axis=-1)
        read = np.stack([np.array(line.read)[place] for line, place in lines], axis=-1)
        return cls(owned[0], owned[1], read, read + np.array(grid.tile))

    def own(self, anchor: Array) -> NDArray[np.bool_]:
        """Tell for each point (N, d) whether its tile owns it."""
        return np.asarray(((self.owned_start <= anchor) & (anchor < self.owned_stop)).all(axis=1))


def priority(grid: TileGrid, table: ObjectTable) -> tuple[Array, Array]:
    """Return each object's place in the order (int64 (N,), 0 first), and whether its tile owns its anchor."""
    frames = Frames.of(grid, table.tile)
    owner = frames.own(table.anchor)
    depth = np.minimum(table.anchor - frames.read_start, frames.read_stop - table.anchor).min(axis=1)
    # lexsort takes the last key first.
    order = np.lexsort((table.tile, *table.anchor.T[::-1], -depth, ~owner, table.cut))
    place = np.empty(len(table), np.int64)
    place[order] = np.arange(len(table))
    return place, owner


def conflicts(table: ObjectTable, fresh: NDArray[np.bool_]) -> Array:
    """Return all pairs of rows (M, 2) that conflict and of which at least one is `fresh`; each pair once."""
    pairs = _touching(table, fresh)
    if not len(pairs):
        return pairs
    shared = np.zeros(len(pairs), np.int64)
    _shared_pixels(pairs, table.start, table.shape, table.bits, table.offset, shared)
    smaller = np.minimum(table.size[pairs[:, 0]], table.size[pairs[:, 1]])
    return np.asarray(pairs[2 * shared > smaller])


def settle(state: Array, edges: Array, place: Array, ready: NDArray[np.bool_]) -> Array:
    """Decide all objects that can be decided (`state` in place); return the edges that still matter.

    An object that is not `ready` may yet meet others: it can be dropped, but not kept. A sweep decides all
    objects whose betters are decided, so the number of sweeps is the length of the longest chain of ranks.
    """
    edges = np.where((place[edges[:, 0]] < place[edges[:, 1]])[:, None], edges, edges[:, ::-1])
    while True:
        better, worse = edges.T
        state[worse[(state[better] == KEPT) & (state[worse] == UNDECIDED)]] = DROPPED
        edges = edges[(state[better] == UNDECIDED) & (state[worse] == UNDECIDED)]
        held = ~ready
        held[edges[:, 1]] = True
        keep = (state == UNDECIDED) & ~held
        if not keep.any():
            return edges
        state[keep] = KEPT


def _touching(table: ObjectTable, fresh: NDArray[np.bool_]) -> Array:
    """Return pairs of rows of different tiles whose boxes overlap, at least one of them `fresh`.

    A spatial hash: every box is listed in the bins it covers, and a pair counts in the bin that holds the
    low corner of the boxes' overlap, which is one bin exactly.
    """
    start = table.start.astype(np.int64)
    stop = start + table.shape
    if not len(start):
        return np.zeros((0, 2), np.int64)
    width = np.maximum(8, np.ceil(1.5 * table.shape.mean(axis=0)).astype(np.int64))
    origin = start.min(axis=0)
    row, bins = _bins((start - origin) // width, (stop - 1 - origin) // width)
    order = np.argsort(bins, kind="stable")
    row, bins = row[order], bins[order]
    # Every entry is paired with those after it in its bin.
    end = np.searchsorted(bins, bins, side="right")
    later = end - np.arange(len(bins)) - 1
    left = np.repeat(np.arange(len(bins)), later)
    right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(later) - later, later)
    a, b, here = row[left], row[right], bins[left]
    apart = (table.tile[a] != table.tile[b]) & (fresh[a] | fresh[b])
    a, b, here = a[apart], b[apart], here[apart]
    low = np.maximum(start[a], start[b])
    meet = (low < np.minimum(stop[a], stop[b])).all(axis=1)
    a, b, here, low = a[meet], b[meet], here[meet], low[meet]
    home = _key((low - origin) // width, ((stop.max(axis=0) - 1 - origin) // width) + 1)
    return np.asarray(np.stack([a, b], axis=1)[home == here])


def _bins(first: Array, last: Array) -> tuple[Array, Array]:
    """Return (row, bin key) of every bin that the boxes ``first .. last`` (N, d, inclusive) cover."""
    counts = last - first + 1
    total = counts.prod(axis=1)
    row = np.repeat(np.arange(len(first)), total)
    rest = np.arange(len(row)) - np.repeat(np.cumsum(total) - total, total)
    place = np.empty((len(row), first.shape[1]), np.int64)
    for axis in reversed(range(first.shape[1])):
        rest, step = np.divmod(rest, counts[row, axis])
        place[:, axis] = first[row, axis] + step
    return row, _key(place, last.max(axis=0) + 1)


def _key(place: Array, counts: Array) -> Array:
    """Return one number for each bin (N, d)."""
    key = np.zeros(len(place), np.int64)
    for axis, count in enumerate(counts):
        key = key * count + place[:, axis]
    return key


@compiled
def _shared_pixels(pairs: Array, start: Array, shape: Array, bits: Array, offset: Array, out: Array) -> None:
    """Count the pixels that both masks of each pair hold, on the packed bits; any number of axes."""
    ndim = start.shape[1]
    low = np.zeros(ndim, np.int64)
    size = np.zeros(ndim, np.int64)
    for p in range(pairs.shape[0]):
        a, b = pairs[p, 0], pairs[p, 1]
        rows = 1
        for k in range(ndim):
            low[k] = max(start[a, k], start[b, k])
            size[k] = min(start[a, k] + shape[a, k], start[b, k] + shape[b, k]) - low[k]
            if k < ndim - 1:
                rows *= size[k]
        count = 0
        for row in range(rows):
            # The row's place along all axes but the last gives where it begins in each packed mask.
            at_a, at_b, step_a, step_b, rest = 0, 0, shape[a, ndim - 1], shape[b, ndim - 1], row
            for k in range(ndim - 2, -1, -1):
                place = low[k] + rest % size[k]
                rest //= size[k]
                at_a += (place - start[a, k]) * step_a
                at_b += (place - start[b, k]) * step_b
                step_a *= shape[a, k]
                step_b *= shape[b, k]
            at_a += low[ndim - 1] - start[a, ndim - 1]
            at_b += low[ndim - 1] - start[b, ndim - 1]
            for i in range(size[ndim - 1]):
                bit_a = bits[offset[a] + (at_a + i) // 8] >> (7 - (at_a + i) % 8)
                bit_b = bits[offset[b] + (at_b + i) // 8] >> (7 - (at_b + i) % 8)
                count += bit_a & bit_b & 1
        out[p] = count
