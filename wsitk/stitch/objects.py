"""Objects of overlapping tiles: what each tile puts forward, and the merge of all, once each.

tile ──> select ──> its own objects + those just beyond its seams ──> merge_objects ──> each object once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.objects import ObjectTable
from wsitk.stitch.seams import DROPPED, KEPT, UNDECIDED, Frames, conflicts, priority, settle

__all__ = ["each_block", "merge_objects", "select"]

Array = NDArray[Any]


def select(
    table: ObjectTable,
    tile: Tile,
    grid: TileGrid,
    band: float | tuple[float, ...],
    *,
    image: Region | None = None,
) -> ObjectTable:
    """Return what a tile puts forward: the objects it owns, and those up to `band` pixels beyond its seams.

    `band` is one number or one for each axis. `image` is the whole image on the working grid (default: the
    grid's extent). Masks are cut to it first, so that neither padding nor its mirror image moves an
    anchor; then `tile` and `cut` are set. Anchors outside the extent are dropped. Raises ModelError
    (WSI333) for an object outside the read window.
    """
    frame = image or grid.extent
    low, high = np.array(tile.read.start), np.array(tile.read.stop)
    if ((table.start < low) | (table.start + table.shape > high)).any():
        raise ModelError(
            "WSI333",
            f"tile {tile.index} returned objects outside its read window {tile.read}; the model's "
            "postprocess must give working-grid coordinates (add tile.read.start)",
        )
    table = _clip(table, frame)
    stop = table.start + table.shape
    # Boxes are tight: a mask touches a border if and only if its box does.
    cut = ((table.start == low) & (low > frame.start)) | ((stop == high) & (high < frame.stop))
    table = replace(table, cut=cut.any(axis=1), tile=np.full(len(table), tile.index, np.int32))
    margin = np.broadcast_to(np.asarray(band, np.float64), (table.ndim,))
    first = np.maximum(np.array(tile.owned.start) - margin, grid.extent.start)
    last = np.minimum(np.array(tile.owned.stop) + margin, grid.extent.stop)
    near = (table.anchor >= first) & (table.anchor < last)
    return table.take(np.flatnonzero(near.all(axis=1)))


def _clip(table: ObjectTable, frame: Region) -> ObjectTable:
    """Return the table with all masks cut to `frame`; what lies outside altogether is gone."""
    low, high = np.array(frame.start), np.array(frame.stop)
    crossing = ((table.start < low) | (table.start + table.shape > high)).any(axis=1)
    if not crossing.any():
        return table
    inner = np.flatnonzero(~crossing)
    rows, pieces = inner.tolist(), [table.take(inner)]
    for row in np.flatnonzero(crossing).tolist():
        box = table.region(row)
        inside = box.intersect(frame)
        mask = table.mask(row)[inside.slices(box.start)]
        if mask.any():
            piece = ObjectTable.from_labels(mask.astype(np.uint8), origin=inside.start)
            said = {n: getattr(table, n)[[row]] for n in ("class_id", "probability", "tile", "cut")}
            columns = {name: values[[row]] for name, values in table.columns.items()}
            pieces.append(replace(piece, columns=columns, **said))
            rows.append(row)
    return ObjectTable.concat(pieces).take(np.argsort(rows))


def merge_objects(grid: TileGrid, load_block: Callable[[int], ObjectTable | None]) -> Iterator[ObjectTable]:
    """Yield the final objects, a table for each block that has any, in block order.

    `load_block` returns what `select` left of a block's tiles, in any order, or None for a block without;
    it is called once for each block, in order. Within a block objects are ordered by anchor (first axis
    first), then tile, then size. Which objects come is independent of the arrangement of blocks.

    Only neighbouring rows of blocks (along the first axis) are held; an object whose fate hangs on later
    rows is held until they have come.
    """
    front = _Front(grid)
    for row in range(grid.block_counts[0]):
        front.enter(row, load_block)
        yield from front.leave()


def each_block(grid: TileGrid, load_block: Callable[[int], ObjectTable | None]) -> Iterator[ObjectTable]:
    """Yield the objects of each block that has any, as they are: for models of which no two tiles tell the same.

    Ordered as `merge_objects` orders them.
    """
    for block in range(prod(grid.block_counts)):
        table = load_block(block)
        if table is not None and len(table):
            yield table.take(_order(table))


def _order(table: ObjectTable) -> NDArray[np.intp]:
    """Return the order of a block's objects: by anchor, then tile, then size."""
    return np.lexsort((table.size, table.tile, *table.anchor.T[::-1]))


class _Front:
    """The rows of blocks in memory: their objects, what is decided of them, and the open conflicts.

    `rows` holds the number of objects of each row, `alone` whether an object has met no conflict so far.
    """

    def __init__(self, grid: TileGrid) -> None:
        self.grid = grid
        self.table = ObjectTable.empty(grid.extent.ndim)
        self.block = np.zeros(0, np.int64)
        self.state = np.zeros(0, np.int8)
        self.alone = np.zeros(0, bool)
        self.edges = np.zeros((0, 2), np.int64)
        self.rows: list[int] = []

    def enter(self, row: int, load_block: Callable[[int], ObjectTable | None]) -> None:
        """Load a row of blocks, find its conflicts with itself and the rows before, decide what can be."""
        width = prod(self.grid.block_counts[1:])
        found = [(i, load_block(i)) for i in range(row * width, (row + 1) * width)]
        tables = [(i, table) for i, table in found if table is not None and len(table)]
        old, new = len(self.table), sum(len(table) for _, table in tables)
        self.rows.append(new)
        if new:
            kept = [self.table] if old else []
            self.table = ObjectTable.concat([*kept, *(table for _, table in tables)])
            self.block = np.concatenate([self.block, *(np.full(len(t), i, np.int64) for i, t in tables)])
            self.state = np.concatenate([self.state, np.full(new, UNDECIDED, np.int8)])
            self.alone = np.concatenate([self.alone, np.ones(new, bool)])
            self._meet(np.arange(old + new) >= old)
        self._decide(row)

    def leave(self) -> Iterator[ObjectTable]:
        """Yield the blocks of the rows that are decided to the last object, and forget them."""
        count = done = 0
        for held in self.rows:
            if (self.state[count : count + held] == UNDECIDED).any():
                break
            count, done = count + held, done + 1
        for block in np.unique(self.block[:count]):
            rows = np.flatnonzero((self.block[:count] == block) & (self.state[:count] == KEPT))
            if len(rows):
                kept = self.table.take(rows)
                yield kept.take(_order(kept))
        if count:
            self.table = self.table.take(np.arange(count, len(self.table)))
            self.block, self.state, self.alone = self.block[count:], self.state[count:], self.alone[count:]
            self.edges = self.edges - count
        del self.rows[:done]

    def _meet(self, fresh: NDArray[np.bool_]) -> None:
        """Add the conflicts of the fresh rows; only what reaches into another tile's window can have any."""
        frames = Frames.of(self.grid, self.table.tile)
        halo, extent = np.array(self.grid.halo), self.grid.extent
        low = np.where(frames.owned_start > extent.start, frames.owned_start + halo, frames.owned_start)
        high = np.where(frames.owned_stop < extent.stop, frames.owned_stop - halo, frames.owned_stop)
        stop = self.table.start + self.table.shape
        exposed = np.flatnonzero(((self.table.start < low) | (stop > high)).any(axis=1))
        pairs = exposed[conflicts(self.table.take(exposed), fresh[exposed])]
        self.alone[pairs.ravel()] = False
        self.edges = np.concatenate([self.edges, pairs])

    def _decide(self, last: int) -> None:
        """Settle all objects, given that the rows of blocks up to `last` have entered."""
        place, owner = priority(self.grid, self.table)
        ready = self.table.start[:, 0] + self.table.shape[:, 0] <= self._unread(last + 1)
        self.state[ready & ~owner & self.alone] = DROPPED
        self.edges = settle(self.state, self.edges, place, ready)

    def _unread(self, row: int) -> float:
        """Return where a row of blocks begins to read, on the first axis: all that lies before is known."""
        grid = self.grid
        if row >= grid.block_counts[0]:
            return np.inf
        return grid.lines[0].read[row * grid.block[0]]
