"""Dense outputs: the weighted mean of overlapping tiles, block by block, exact for constants.

    region ┌────────────────────┐   rim: other blocks' tiles may reach these pixels; kept as mean and
           │  rim               │        weight until they are merged.
           │   ┌────────────┐   │
           │   │ inner      │   │   inner: nobody else reaches these pixels; kept finished, in the
           │   └────────────┘   │          storage dtype.
           └────────────────────┘

The mean is a running one, ``mean += (value - mean) * weight / total``: where all tiles say the same, or
only one speaks, nothing is added and nothing is rounded. It is taken in tile order within a block and in
block order between blocks, whatever the order of arrival; another layout of blocks changes the last bits
of float32 and no more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Block, Tile, TileGrid
from wsitk.model import FieldSpec
from wsitk.stitch.windows import outer, window

__all__ = ["FILL", "FieldMerger", "FieldPart", "FieldStitcher", "field_shape", "finish"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

FILL = 0
"""What a field holds where no tile answers: the owned regions of tiles that are not ok."""


def _extent_of(block: Block, grid: TileGrid, spec: FieldSpec) -> tuple[Region, Region]:
    """Return the region of pixels that a block's tiles weigh in, and the inner part that is theirs alone."""
    if spec.window == "crop":
        return block.owned, block.owned
    region = block.read.intersect(grid.extent)
    low, high = list(region.start), list(region.stop)
    first, last = grid.position(block.tiles[0]), grid.position(block.tiles[-1])
    for axis, line in enumerate(grid.lines):
        # windows may overlap more than their neighbours: the nearest is not always the farthest reaching
        before, after = line.read[: first[axis]], line.read[last[axis] + 1 :]
        low[axis] = max(low[axis], *(a + grid.tile[axis] for a in before)) if before else low[axis]
        high[axis] = min(high[axis], *after) if after else high[axis]
    inner = all(a < b for a, b in zip(low, high, strict=True))
    # An empty inner box must still lie inside, for the rim to be cut around it.
    return region, Region.between(low, high) if inner else Region(region.start, (0,) * region.ndim)


def _slabs(region: Region, inner: Region) -> Iterator[Region]:
    """Yield disjoint boxes that fill `region` around `inner`: two for each axis, some of them empty."""
    start, stop = list(region.start), list(region.stop)
    for axis in range(region.ndim):
        for low, high in ((start[axis], inner.start[axis]), (inner.stop[axis], stop[axis])):
            yield Region.between(
                (*start[:axis], low, *start[axis + 1 :]), (*stop[:axis], high, *stop[axis + 1 :])
            )
        start[axis], stop[axis] = inner.start[axis], inner.stop[axis]


def _pieces(region: Region, parts: Sequence[FieldPart]) -> Iterator[Region]:
    """Yield the boxes of `region` cut along all inner borders: each lies inside a part's inner box, or in none."""
    edges = []
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True)):
        cuts = {e for p in parts for e in (p.inner.start[axis], p.inner.stop[axis]) if a < e < b}
        edges.append(list(pairwise(sorted({a, b} | cuts))))
    for sides in product(*edges):
        yield Region.between(*zip(*sides, strict=True))


def _blend(mean: Floats, total: Floats, values: Floats, weight: Floats) -> None:
    """Take `values` (C, *shape) of `weight` (*shape) into a running mean and its total weight, in place."""
    total += weight
    share = np.divide(weight, total, out=np.zeros_like(total), where=total > 0)
    change = np.empty_like(share)
    for old, new in zip(mean, values, strict=True):
        np.subtract(new, old, out=change)
        change *= share
        old += change


def finish(mean: Floats, spec: FieldSpec) -> Array:
    """Return means (C, *shape) as they are stored: quantised, or the winning channel (1, *shape).

    ``uint8`` and ``uint16`` stand for 0 to 1 in steps of 1/255 and 1/65535, rounded to nearest, clipped.
    Between equal channels the first wins.
    """
    dtype = np.dtype(spec.dtype)
    if spec.reduction == "argmax":
        return np.asarray(mean.argmax(axis=0)[None], dtype)
    if dtype.kind == "f":
        return mean.astype(dtype)
    out = np.empty(mean.shape, dtype)
    top = np.iinfo(dtype).max
    for plane, target in zip(mean, out, strict=True):
        target[...] = np.rint(np.clip(plane, 0, 1) * np.float32(top))
    return out


def field_shape(spec: FieldSpec, region: Region) -> tuple[int, ...]:
    """Return the shape of a finished field over `region`: channels first, one channel for ``argmax``."""
    return (1 if spec.reduction == "argmax" else len(spec.channels), *region.shape)


@dataclass(frozen=True)
class FieldPart:
    """What one block knows of one field.

    Attributes
    ----------
    region, inner
        The pixels its tiles weigh in, and those that no other block reaches (may be empty).
    tiles : int64 (T,)
        The tiles that answered.
    done : storage dtype (C, *inner.shape)
        Finished values.
    mean : float32 (C, M), weight : float32 (M,)
        The weighted mean so far, and its weight, on the rim: slab after slab in C order.
    """

    region: Region
    inner: Region
    tiles: Array
    done: Array
    mean: Floats
    weight: Floats

    def rim(self) -> Iterator[tuple[Region, Floats, Floats]]:
        """Yield each box of the rim with its means (C, *shape) and weights (*shape), as views."""
        begin = 0
        for box in _slabs(self.region, self.inner):
            end = begin + box.size
            mean = self.mean[:, begin:end].reshape(len(self.mean), *box.shape)
            yield box, mean, self.weight[begin:end].reshape(box.shape)
            begin = end

    def to_arrays(self) -> dict[str, Array]:
        """Return plain arrays for storage; `from_arrays` is the inverse."""
        boxes = [(*self.region.start, *self.region.shape), (*self.inner.start, *self.inner.shape)]
        return {
            "boxes": np.array(boxes, np.int64),
            "tiles": self.tiles,
            "done": self.done,
            "mean": self.mean,
            "weight": self.weight,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> FieldPart:
        """Return the part whose `to_arrays` gave `arrays`."""
        ndim = arrays["boxes"].shape[1] // 2
        region, inner = (Region(tuple(b[:ndim]), tuple(b[ndim:])) for b in arrays["boxes"].tolist())
        return cls(region, inner, arrays["tiles"], arrays["done"], arrays["mean"], arrays["weight"])


class FieldStitcher:
    """Joins one field of one block: `add()` its tiles in any order, `skip()` those that give nothing.

    Early tiles are held back until those before them have come or were skipped, so that sums are taken in
    tile order; an ordered loader holds back none. `tiles` names the block's tiles that are to come
    (default: all of them); `frame` is the image that tiles are clipped to, if they are (default: the extent).
    """

    def __init__(
        self,
        grid: TileGrid,
        block: Block,
        spec: FieldSpec,
        *,
        tiles: Sequence[int] | None = None,
        frame: Region | None = None,
    ) -> None:
        self.grid = grid
        self.spec = spec
        self._frame = frame or grid.extent
        self.region, self.inner = _extent_of(block, grid, spec)
        self._window = outer(window(spec.window, grid.tile, grid.halo))
        self._mean = np.zeros((len(spec.channels), *self.region.shape), np.float32)
        self._weight = np.zeros(self.region.shape, np.float32)
        self._waiting = sorted(block.tiles if tiles is None else tiles, reverse=True)
        self._early: dict[int, Floats | None] = {}
        self._answered: list[int] = []

    def add(self, tile: Tile, values: Floats) -> None:
        """Take a tile's prediction: float32 (C, *tile.read.shape), or clipped to the frame.

        Values must be finite. Raises ModelError (WSI331) for another shape, and ValueError for a tile that
        is not in the block or came before.
        """
        shapes = {tile.read.shape, tile.read.intersect(self._frame).shape}
        if values.shape not in {(len(self.spec.channels), *shape) for shape in shapes}:
            wanted = (len(self.spec.channels), *tile.read.shape)
            raise ModelError(
                "WSI331",
                f"field {self.spec.name!r} of tile {tile.index} has shape {values.shape}, wanted {wanted}; "
                "the model's postprocess must return the whole read window",
            )
        self._arrive(tile.index, values)

    def skip(self, tile: Tile) -> None:
        """Note that a tile gives nothing (background, unreadable, failed): nobody need wait for it."""
        self._arrive(tile.index, None)

    def finalize(self) -> FieldPart:
        """Return the block's part; a tile that neither came nor was skipped counts as skipped."""
        for index in sorted(self._early):
            self._take(index, self._early[index])
        self._early.clear()
        self._waiting.clear()
        slabs = [box.slices(self.region.start) for box in _slabs(self.region, self.inner)]
        channels = len(self._mean)
        return FieldPart(
            region=self.region,
            inner=self.inner,
            tiles=np.array(self._answered, np.int64),
            done=finish(self._mean[(slice(None), *self.inner.slices(self.region.start))], self.spec),
            mean=np.concatenate([self._mean[(slice(None), *s)].reshape(channels, -1) for s in slabs], axis=1),
            weight=np.concatenate([self._weight[s].ravel() for s in slabs]),
        )

    def _arrive(self, index: int, values: Floats | None) -> None:
        if index not in self._waiting or index in self._early:
            raise ValueError(f"tile {index} is not in this block, or came before")
        self._early[index] = values
        while self._waiting and self._waiting[-1] in self._early:
            following = self._waiting.pop()
            self._take(following, self._early.pop(following))

    def _take(self, index: int, values: Floats | None) -> None:
        if values is None:
            return
        read = self.grid[index].read
        seen = read.intersect(self.region)
        # Under the border rule `clip` the array starts where the image does.
        begin = read.start if values.shape[1:] == read.shape else read.intersect(self._frame).start
        there = seen.slices(self.region.start)
        part = values[(slice(None), *seen.slices(begin))].astype(np.float32, copy=False)
        _blend(
            self._mean[(slice(None), *there)],
            self._weight[there],
            part,
            self._window[seen.slices(read.start)],
        )
        self._answered.append(index)


class FieldMerger:
    """Reads any region of a finished field from the stored parts of its blocks.

    `load` returns a block's part, or None for a block without one. The last `cache` parts are kept. What
    a pixel holds does not depend on the region it is read with. Safe to call from several threads.
    """

    def __init__(
        self, grid: TileGrid, spec: FieldSpec, load: Callable[[int], FieldPart | None], *, cache: int = 0
    ) -> None:
        self.grid = grid
        self.spec = spec
        self._load = load
        self._cache = cache or 2 ** (grid.extent.ndim + 1)
        self._parts: OrderedDict[int, FieldPart | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, region: Region) -> Array:
        """Return `region` (inside the extent) in the storage dtype: (C, *region.shape), `FILL` if unknown.

        Raises ValueError if the region leaves the extent.
        """
        if not self.grid.extent.contains(region):
            raise ValueError(f"{region} is not inside the extent {self.grid.extent}")
        out = np.full(field_shape(self.spec, region), FILL, self.spec.dtype)
        tiles = list(self.grid.overlapping(region))
        blocks = sorted({self.grid.block_of(t.index) for t in tiles})
        known = [part for part in map(self._part, blocks) if part is not None]
        for box in _pieces(region, known):
            target = out[(slice(None), *box.slices(region.start))]
            sole = next((part for part in known if part.inner.contains(box)), None)
            if sole is not None:
                target[...] = sole.done[(slice(None), *box.slices(sole.inner.start))]
            else:
                self._merge_rims(known, box, target)
        answered = {index for part in known for index in part.tiles.tolist()}
        for tile in tiles:
            common = tile.owned.intersect(region)
            # A neighbour's halo is no answer: what the ledger calls not ok stays empty to the pixel.
            if tile.index not in answered and common.size:
                out[(slice(None), *common.slices(region.start))] = FILL
        return out

    def _merge_rims(self, parts: list[FieldPart], region: Region, out: Array) -> None:
        """Write the means of all rims within `region` to `out`, blocks in index order."""
        mean = np.zeros((len(self.spec.channels), *region.shape), np.float32)
        total = np.zeros(region.shape, np.float32)
        for part in parts:
            for box, values, weight in part.rim():
                common = box.intersect(region)
                if common.size:
                    here, there = common.slices(region.start), common.slices(box.start)
                    _blend(
                        mean[(slice(None), *here)], total[here], values[(slice(None), *there)], weight[there]
                    )
        np.copyto(out, finish(mean, self.spec), where=total > 0)

    def _part(self, index: int) -> FieldPart | None:
        with self._lock:
            if index not in self._parts:
                self._parts[index] = self._load(index)
            self._parts.move_to_end(index)
            part = self._parts[index]
            while len(self._parts) > self._cache:
                self._parts.popitem(last=False)
            return part
