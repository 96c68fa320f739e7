"""The unit of work: a block of tiles, described by small values, filled tile by tile, then stored.

A task names its input by reference and its journal by input name, so it can be sent to another process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import WorkError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import FieldSpec, ModelSpec, Patch, TileResult
from wsitk.objects import ObjectTable
from wsitk.repair import TilePieces
from wsitk.sources.base import SourceRef
from wsitk.sources.view import View
from wsitk.stitch.fields import FieldStitcher
from wsitk.stitch.labels import LabelStitcher
from wsitk.stitch.layers import Canvas
from wsitk.stitch.objects import select

__all__ = ["BlockError", "BlockReport", "BlockTask", "OpenBlock", "TileStatus"]

STAGES = ("read", "predict", "postprocess")


@dataclass(frozen=True, slots=True)
class BlockTask:
    """One block of one input: what to read, which of its tiles to run, and which journal takes it.

    `band` is how near to a seam (working pixels) objects are compared; `image` the whole image. `view` is how
    the model sees the input, if that had to be found out; `canvas` where labels are painted, if there are any.
    `aside` says why none of its tiles is tried any more, if that is so: only what earlier ones say is computed.
    `repair` holds the pieces of the mask, for a model that paints.
    """

    input: str
    source: SourceRef
    grid: TileGrid
    block: int
    tiles: tuple[int, ...]
    band: int
    image: Region
    view: View | None = None
    canvas: Canvas | None = None
    aside: str = ""
    repair: TilePieces | None = None

    @property
    def tried(self) -> tuple[int, ...]:
        """Return the tiles that are still to be run."""
        return () if self.aside else self.tiles


@dataclass(frozen=True, slots=True)
class TileStatus:
    """What became of a tile: ``ok``, ``absent``, ``unreadable`` or ``model_failed``, and why."""

    tile: int
    status: str
    reason: str = ""


@dataclass(frozen=True)
class BlockReport:
    """What the worker says when a block is in the journal."""

    input: str
    block: int
    statuses: tuple[TileStatus, ...]
    objects: int
    seconds: Mapping[str, float]


class BlockError(WorkError):
    """Raised when a tile failed in a way that is nobody's data: a bug in a model, a full disk, no memory.

    `input` names whose tile it was; `errno` is the system's number for the cause, if it has one.
    """

    def __init__(self, code: str, message: str, name: str = "", errno: int | None = None) -> None:
        super().__init__(code, message)
        self.input = name
        self.errno = errno

    def __reduce__(self) -> tuple[type[BlockError], tuple[Any, ...]]:
        return type(self), (self.code, self.message, self.input, self.errno)


@final
class OpenBlock:
    """A block whose tiles are on their way; takes them in tile order.

    Labels of a volume are joined over blocks, which are its layers: a block that comes right after `before`, and is
    complete before this one's first tile, goes on with what that left. Otherwise `again` names the tiles of earlier
    layers that must come first, but for those that failed, by the commit `records` of their blocks: what killed a
    process is not asked again. `scratch` is the folder for files without a name.
    """

    def __init__(
        self,
        task: BlockTask,
        spec: ModelSpec,
        *,
        before: OpenBlock | None = None,
        scratch: Path | None = None,
        records: Callable[[int], Mapping[str, Any] | None] = lambda block: None,
    ) -> None:
        self.task = task
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._spec = spec
        self._measures: dict[str, float] = {}
        self._patches: list[Patch] = []
        self._objects = [ObjectTable.empty(spec.ndim, spec.object_columns)]
        self._statuses: list[TileStatus] = []
        self._foreground: list[float] = []
        block = task.grid.block_at(task.block)
        self._stitchers = {
            f.name: FieldStitcher(task.grid, block, f, frame=task.image)
            for f in spec.fields
            if f not in spec.labels
        }
        follows = before is not None and before.precedes(task) and not task.aside
        self._labels: dict[str, LabelStitcher] = (
            before._labels if before is not None and follows else self._fresh(scratch)
        )
        self.again: tuple[int, ...] = () if follows else self._earlier(records)
        self._missing = {*self.again}
        self._waiting = len(task.tiles) + len(self.again)
        for index in sorted({*block.tiles} - {*task.tiles}):
            self._skip(task.grid[index])
        for index in task.tiles if task.aside else ():
            self.add(task.grid[index], TileStatus(index, "model_failed", task.aside), None)

    def __str__(self) -> str:
        return f"{self.task.input} block {self.task.block}"

    def precedes(self, task: BlockTask) -> bool:
        """Tell whether a task goes on where this one ends."""
        mine = self.task
        return (mine.input, mine.block + 1, mine.canvas) == (task.input, task.block, task.canvas)

    def _fresh(self, scratch: Path | None) -> dict[str, LabelStitcher]:
        task = self.task
        return {
            f.name: LabelStitcher(
                task.grid, f, _canvas(task, f), first=task.block, frame=task.image, folder=scratch
            )
            for f in self._spec.labels
        }

    def _earlier(self, records: Callable[[int], Mapping[str, Any] | None]) -> tuple[int, ...]:
        """Return the tiles of earlier layers that reach into this one's rows; skip those known to have failed."""
        grid, found = self.task.grid, []
        layers = {k for stitcher in self._labels.values() for k in stitcher.layers.before(self.task.block)}
        # a tile may be said to have failed by a later layer, which its rows had waited for
        said = [records(k) or {"tiles": ()} for k in range(min(layers, default=0), self.task.block)]
        failed = {tile for record in said for tile, status, _ in record["tiles"] if status != "ok"}
        for k in sorted(layers):
            found += [i for i in grid.block_at(k).tiles if i not in failed]
            for index in failed.intersection(grid.block_at(k).tiles):
                for labels in self._labels.values():
                    labels.skip(grid[index])
        return tuple(found)

    @property
    def complete(self) -> bool:
        """Tell whether every tile has come."""
        return self._waiting == 0

    def add(self, tile: Tile, status: TileStatus, result: TileResult | None) -> None:
        """Take a tile: its status, and its result if there is one."""
        self._waiting -= 1
        for name, labels in self._labels.items():
            if result is None:
                labels.skip(tile)
            else:
                labels.add(tile, result.scores[name] if name in result.scores else result.fields[name])
        if tile.index in self.again:
            self._missing.discard(tile.index)
            return
        self._statuses.append(status)
        if result is None:
            self._skip(tile)
            return
        self._measures |= result.measures
        self._patches += result.patches
        if result.objects is not None:
            self._objects.append(result.objects)
        for name, stitcher in self._stitchers.items():
            stitcher.add(tile, result.fields[name])
        for name in itertools.islice(self._stitchers, 1):  # the first field is the one of probabilities
            self._foreground.append(float(result.fields[name][0].mean()))

    def put_forward(self, result: TileResult, tile: Tile) -> TileResult:
        """Return a result with only those objects that the tile may answer for; touches no shared state."""
        if result.objects is None:
            return result
        task = self.task
        band = math.inf if self._spec.exclusive else task.band
        kept = select(result.objects, tile, task.grid, band, image=task.image)
        return replace(result, objects=kept)

    def contents(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return what the journal keeps of a complete block: arrays, and the commit record."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, stitcher in self._stitchers.items():
            arrays |= {f"field:{name}:{k}": v for k, v in stitcher.finalize().to_arrays().items()}
        for name, labels in self._labels.items():
            self._statuses += [self._unpainted(i) for i in sorted(self._missing) if labels.waits(i)]
            part = labels.finish(self.task.block).to_arrays()
            arrays |= {f"labels:{name}:{k}": v for k, v in part.items()}
        for place, patch in enumerate(self._patches):
            arrays |= {f"patch:{place}:{k}": getattr(patch, k) for k in ("pixels", "own", "spread")}
        table = ObjectTable.concat(self._objects)
        if self._spec.objects:
            arrays |= {f"objects:{k}": v for k, v in table.to_arrays().items()}
        record = {
            "tiles": [[s.tile, s.status, s.reason] for s in self._statuses],
            "objects": len(table),
            "foreground": float(np.mean(self._foreground)) if self._foreground else 0.0,
            **({"measures": _json_numbers(self._measures)} if self._measures else {}),
            **({"patches": [_told(p) for p in self._patches]} if self._patches else {}),
        }
        return arrays, record

    def _unpainted(self, tile: int) -> TileStatus:
        """Return what is said of a tile of an earlier layer whose last rows were to be painted with this block."""
        return TileStatus(tile, "model_failed", f"{self.task.aside}; rows of this tile waited for that block")

    def report(self, objects: int) -> BlockReport:
        """Return what is said of the block once it is committed."""
        return BlockReport(self.task.input, self.task.block, tuple(self._statuses), objects, self.seconds)

    def release(self) -> None:
        """Let go of scratch files; the next block can't follow then."""
        for labels in self._labels.values():
            labels.close()

    def _skip(self, tile: Tile) -> None:
        for stitcher in self._stitchers.values():
            stitcher.skip(tile)


def _told(patch: Patch) -> list[Any]:
    """Return what the commit record says of a patch: its number, place and means."""
    return [patch.number, list(patch.start), list(patch.own.shape), patch.change, patch.deviation]


def _json_numbers(measures: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON has them: None for what could not be measured."""
    return {name: float(value) if np.isfinite(value) else None for name, value in measures.items()}


def _canvas(task: BlockTask, spec: FieldSpec) -> Canvas:
    """Return where the labels of a task are painted."""
    if task.canvas is None:
        raise ValueError(f"the task of a model with labels ({spec.name}) has no canvas")
    return task.canvas
