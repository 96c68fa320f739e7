"""Labels of volumes from overlapping tiles, in memory that grows with neither the volume nor the classes.

    layer 0 │▓▓▓▓▓▓▓▓│            Tiles come layer by layer along the first axis. What no later layer reaches is
    layer 1 │    ▓▓▓▓▓▓▓▓│        finished: the scores of those rows are brought back to the input's grid, one
    layer 2 │        ▓▓▓▓▓▓▓▓│    class after the other, and only the winner's number is kept. Rows behind are
            └───┴───┴────┘        forgotten, so that a layer of scores (on disk) is all there ever is.
             0   1   2

Each layer is a block of the journal. To begin at a later layer, the tiles of those before it that reach into
its rows are computed again, in the same order: the sums are the same to the last bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import FieldSpec, Scores
from wsitk.sources.resample import apply_taps
from wsitk.stitch.fields import FILL
from wsitk.stitch.layers import Canvas, Layers
from wsitk.stitch.spool import Spool
from wsitk.stitch.windows import outer, window

__all__ = ["LabelMerger", "LabelPart", "LabelStitcher"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

_CHUNK_VALUES = 1 << 24
_ROWS_OUT = 16


@dataclass(frozen=True)
class LabelPart:
    """The labels of a run of the canvas's rows: (rows, ...) from row `start` on."""

    start: int
    labels: Array

    def to_arrays(self) -> dict[str, Array]:
        """Return plain arrays for storage; `from_arrays` is the inverse."""
        return {"start": np.array(self.start, np.int64), "labels": self.labels}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> LabelPart:
        """Return the part whose `to_arrays` gave `arrays`."""
        return cls(int(arrays["start"]), arrays["labels"])


@final
class LabelStitcher:
    """Joins one field of labels over a whole volume: `add()` or `skip()` tiles, `finish()` layer after layer.

    Starts at layer `first`: the tiles of ``layers.before(first)`` must come, too. Within a layer tiles may come in
    any order; sums are taken in tile order, those that are early wait. `frame` is the image that tiles are clipped
    to, if they are; `folder` takes the scratch file, which has no name.
    """

    def __init__(
        self,
        grid: TileGrid,
        spec: FieldSpec,
        canvas: Canvas,
        *,
        first: int = 0,
        frame: Region | None = None,
        folder: Path | None = None,
    ) -> None:
        self.grid, self.spec, self.canvas = grid, spec, canvas
        self.layers = Layers(grid, spec, canvas)
        self._frame = frame or grid.extent
        self._window = outer(window(spec.window, grid.tile, grid.halo))
        self._low = self.layers.needed(first)
        self._spool = Spool(grid.extent, len(spec.channels), self.layers.kept, self._cuts(), folder=folder)
        self._spool.advance(self._low)
        self._total = np.zeros((self.layers.kept, *grid.extent.shape[1:]), np.float32)
        self._lost: list[Region] = []
        self._layer_size = len(grid) // self.layers.count
        self._waiting: list[int] = []
        for layer in reversed([*self.layers.before(first), *range(first, self.layers.count)]):
            self._waiting += range((layer + 1) * self._layer_size - 1, layer * self._layer_size - 1, -1)
        self._awaited = set(self._waiting)
        self._early: dict[int, Floats | Scores | None] = {}
        self._next = first

    @property
    def scratch_bytes(self) -> int:
        """Return the room that the scratch file may take."""
        return self._spool.nbytes

    def _cuts(self) -> list[list[int]]:
        cuts = []
        for axis in range(1, self.grid.extent.ndim):
            line = self.grid.lines[axis]
            low, high = self.grid.extent.start[axis], self.grid.extent.stop[axis]
            places = {*line.read, *(a + self.grid.tile[axis] for a in line.read)}
            if self.spec.window == "crop":
                places = {*line.owned}
            cuts.append(sorted({low, high, *(p for p in places if low < p < high)}))
        return cuts

    def add(self, tile: Tile, values: Floats | Scores) -> None:
        """Take a tile's scores, finite: float32 (C, *tile.read.shape), clipped to the frame, or a function of them.

        Raises ModelError (WSI331) for another shape, and ValueError for a tile that is not to come, or came before.
        """
        if isinstance(values, np.ndarray):
            shapes = {tile.read.shape, tile.read.intersect(self._frame).shape}
            if values.shape not in {(len(self.spec.channels), *shape) for shape in shapes}:
                raise ModelError(
                    "WSI331",
                    f"field {self.spec.name!r} of tile {tile.index} has shape {values.shape}, wanted "
                    f"{(len(self.spec.channels), *tile.read.shape)}; the model's postprocess must return the whole "
                    "read window",
                )
        self._arrive(tile.index, values)

    def waits(self, index: int) -> bool:
        """Tell whether a tile owns rows that are painted when the next layer is finished."""
        box = self.canvas.covered(_from(self.grid[index].owned, self.grid.extent.start))
        start, stop = self.layers.painted(self._next)
        return max(start, box.start[0]) < min(stop, box.stop[0])

    def skip(self, tile: Tile) -> None:
        """Note that a tile gives nothing: what it owns stays `FILL`."""
        self._arrive(tile.index, None)

    def _arrive(self, index: int, values: Floats | Scores | None) -> None:
        if index not in self._awaited:
            raise ValueError(f"tile {index} is not to come, or came before")
        self._awaited.discard(index)
        self._early[index] = values
        self._drain()

    def _drain(self) -> None:
        """Take what has come in order, up to the layer that is finished next: later rows have no room yet."""
        end = (self._next + 1) * self._layer_size
        while self._waiting and self._waiting[-1] < end and self._waiting[-1] in self._early:
            following = self._waiting.pop()
            self._take(following, self._early.pop(following))

    def _take(self, index: int, values: Floats | Scores | None) -> None:
        tile = self.grid[index]
        if values is None:
            self._lost.append(tile.owned)
            return
        live = Region((self._low, *self.grid.extent.start[1:]), self._total.shape).intersect(self.grid.extent)
        seen = (tile.owned if self.spec.window == "crop" else tile.read).intersect(live)
        if not seen.size:
            return
        share = self._weighed(tile, seen)
        channels = len(self.spec.channels)
        step = max(1, _CHUNK_VALUES // tile.read.size)
        for start in range(0, channels, step):
            stop = min(start + step, channels)
            some = values[start:stop] if isinstance(values, np.ndarray) else values(start, stop)
            # under the border rule `clip` the array starts where the image does
            clipped = some.shape[1:] != tile.read.shape
            begin = tile.read.intersect(self._frame).start if clipped else tile.read.start
            part = some[(slice(None), *seen.slices(begin))]
            for kind in range(start, stop):
                self._blend(kind, seen, part[kind - start], share)
        for number, box in self._spool.bricks(seen):
            self._spool.wrote(number, box.start[0], box.stop[0])

    def _weighed(self, tile: Tile, seen: Region) -> Floats:
        """Add the tile's weight to the total over `seen`; return its share of that."""
        share: Floats = np.empty(seen.shape, np.float32)
        weight = self._window[seen.slices(tile.read.start)]
        flat = Region(seen.start[1:], seen.shape[1:]).slices(self.grid.extent.start[1:])
        for k in range(seen.shape[0]):  # the rows lie in a ring
            row = self._total[(seen.start[0] + k) % len(self._total)][flat]
            row += weight[k]
            share[k] = np.divide(weight[k], row, out=np.zeros_like(row), where=row > 0)
        return share

    def _blend(self, kind: int, seen: Region, values: Floats, share: Floats) -> None:
        """Take one class of a tile into its running mean; see `fields`."""
        for number, box in self._spool.bricks(seen):
            here = box.slices(seen.start)
            mean = self._spool.read(number, kind, box.start[0], box.stop[0])
            change = values[here] - mean
            change *= share[here]
            mean += change
            self._spool.write(number, kind, box.start[0], mean)

    # --- what is finished ----------------------------------------------------------------------------

    def finish(self, layer: int) -> LabelPart:
        """Return what is known for good once `layer` is complete; the next one may come then.

        Tiles of the layer that have neither come nor were skipped count as skipped. Raises ValueError for another
        layer than the next.
        """
        if layer != self._next:
            raise ValueError(f"layer {layer} is not the next, {self._next}")
        while self._waiting and self._waiting[-1] < (layer + 1) * self._layer_size:
            following = self._waiting.pop()
            self._awaited.discard(following)
            self._take(following, self._early.pop(following, None))
        start, stop = self.layers.painted(layer)
        labels = np.full((stop - start, *self.canvas.shape[1:]), FILL, self.spec.dtype)
        for low in range(start, stop, _ROWS_OUT):
            high = min(low + _ROWS_OUT, stop)
            self._paint(low, high, labels[low - start : high - start])
        for region in self._lost:
            box = self.canvas.covered(_from(region, self.grid.extent.start))
            box = box.intersect(Region((start, *(0,) * (box.ndim - 1)), labels.shape))
            labels[box.slices((start, *(0,) * (box.ndim - 1)))] = FILL
        self._next += 1
        if self._next < self.layers.count:
            self._forget(self.layers.needed(self._next))
            self._drain()
        else:
            self._spool.close()
        return LabelPart(start, labels)

    def close(self) -> None:
        """Give the scratch file's room back; nothing can be added after that."""
        self._spool.close()

    def _forget(self, row: int) -> None:
        for gone in range(self._low, row):
            self._total[gone % len(self._total)] = 0.0
        self._low = max(self._low, row)
        self._spool.advance(self._low)
        self._lost = [r for r in self._lost if r.stop[0] > self._low]

    def _paint(self, low: int, high: int, out: Array) -> None:
        """Write the labels of rows low .. high - 1 of the canvas."""
        extent, rule = self.grid.extent, self.spec.restore
        spans = [(low, high), *((0, n) for n in self.canvas.shape[1:])]
        taps = tuple(
            self.canvas.taps(axis, a, b, n, rule)
            for axis, ((a, b), n) in enumerate(zip(spans, extent.shape, strict=True))
        )
        same = self.canvas.shape == extent.shape
        best = np.full(out.shape, -np.inf, np.float32)
        for kind in range(len(self.spec.channels)):
            plane = self._rows(kind, extent.start[0] + taps[0].start, extent.start[0] + taps[0].stop)
            if not self.spec.regions and plane.max() < best.min():
                continue  # an interpolated score lies between those it is made of
            if not same:
                used = (slice(None), *(slice(t.start, t.stop) for t in taps[1:]))
                plane = apply_taps(plane[used][..., None], taps, np.dtype(np.float32), wide=False)[..., 0]
            if self.spec.regions:
                out[plane > self.spec.threshold] = self.spec.regions[kind]
            else:
                won = plane > best
                np.copyto(best, plane, where=won)
                out[won] = kind

    def _rows(self, kind: int, low: int, high: int) -> Floats:
        """Return the mean scores of one class on rows of the working grid, 0 where no tile answered."""
        extent = self.grid.extent
        plane = np.zeros((high - low, *extent.shape[1:]), np.float32)
        box = Region((low, *extent.start[1:]), plane.shape)
        for number, brick in self._spool.bricks(box):
            plane[brick.slices(box.start)] = self._spool.read(number, kind, low, high)
        return plane


def _from(region: Region, origin: tuple[int, ...]) -> Region:
    """Return a region as it is counted from `origin`."""
    return Region(tuple(a - o for a, o in zip(region.start, origin, strict=True)), region.shape)


@final
class LabelMerger:
    """Reads any region of finished labels from the stored parts of the layers.

    `load` returns a layer's part, or None; `box` is where the canvas lies in the image of `shape`, which is `FILL`
    around it. The last `cache` parts are kept. Safe to call from several threads.
    """

    def __init__(
        self,
        layers: Layers,
        spec: FieldSpec,
        shape: tuple[int, ...],
        box: Region,
        load: Callable[[int], LabelPart | None],
        *,
        cache: int = 3,
    ) -> None:
        self.layers, self.shape, self.box = layers, shape, box
        self.dtype = np.dtype(spec.dtype)
        self._load, self._cache = load, cache
        self._parts: OrderedDict[int, LabelPart | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, region: Region) -> Array:
        """Return labels (*region.shape) of a region of the image."""
        out = np.full(region.shape, FILL, self.dtype)
        common = region.intersect(self.box)
        if not common.size:
            return out
        inside = _from(common, self.box.start)
        target = out[common.slices(region.start)]
        for layer in range(self.layers.count):
            low, high = self.layers.painted(layer)
            low, high = max(low, inside.start[0]), min(high, inside.stop[0])
            part = self._part(layer) if low < high else None
            if part is not None:
                rows = part.labels[low - part.start : high - part.start]
                target[low - inside.start[0] : high - inside.start[0]] = rows[
                    (slice(None), *inside.slices()[1:])
                ]
        return out

    def rows(self, count: int = _ROWS_OUT) -> Iterator[Array]:
        """Yield the labels of the whole image, a few rows at a time."""
        for low in range(0, self.shape[0], count):
            yield self.read(
                Region(
                    (low, *(0,) * (len(self.shape) - 1)), (min(count, self.shape[0] - low), *self.shape[1:])
                )
            )

    def counts(self, labels: Sequence[int]) -> list[int]:
        """Return how many voxels of the image have each of `labels`."""
        total = np.zeros(int(np.iinfo(self.dtype).max) + 1, np.int64)
        for rows in self.rows():
            total += np.bincount(rows.ravel(), minlength=len(total))
        return [int(total[k]) for k in labels]

    def _part(self, layer: int) -> LabelPart | None:
        with self._lock:
            if layer not in self._parts:
                self._parts[layer] = self._load(layer)
            self._parts.move_to_end(layer)
            part = self._parts[layer]
            while len(self._parts) > self._cache:
                self._parts.popitem(last=False)
            return part
