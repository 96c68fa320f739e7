"""A small driver in memory, and slow references that are easy to believe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import ModelSpec, TileModel, TileResult
from wsitk.objects import ObjectTable
from wsitk.stitch.fields import FILL, FieldMerger, FieldPart, FieldStitcher, finish
from wsitk.stitch.objects import merge_objects, select
from wsitk.stitch.windows import outer, window

__all__ = ["Joined", "naive_fields", "naive_merge", "naive_objects", "read_tile", "run_tiles"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Joined:
    """Final objects (None if the model finds none) and finished fields (C, *extent.shape)."""

    objects: ObjectTable | None
    fields: Mapping[str, Array] = field(default_factory=dict)


def read_tile(pixels: Array, region: Region, spec: ModelSpec) -> Array:
    """Return `region` of an image (*shape, C), padded beyond it as the spec's border says."""
    index = []
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True)):
        place, n = np.arange(a, b), pixels.shape[axis]
        if spec.border == "reflect" and n > 1:
            place = (n - 1) - np.abs((place % (2 * n - 2)) - (n - 1))
        index.append(place)
    known = reduce(
        np.logical_and.outer, [(i >= 0) & (i < n) for i, n in zip(index, pixels.shape, strict=False)]
    )
    there = np.ix_(*[np.clip(i, 0, n - 1) for i, n in zip(index, pixels.shape, strict=False)])
    return np.where(known[..., None], pixels[there], np.array(spec.fill, pixels.dtype))


def _apply(model: TileModel, pixels: Array, tile: Tile) -> TileResult:
    """Return the result of one tile, read from the image (*shape, C)."""
    import torch

    batch = torch.from_numpy(np.moveaxis(read_tile(pixels, tile.read, model.spec), -1, 0)[None].copy())
    outputs = {name: value[0].numpy() for name, value in model.predict_at(batch, [tile.read.start]).items()}
    return model.postprocess(outputs, tile)


def run_tiles(
    pixels: Array,
    model: TileModel,
    grid: TileGrid,
    *,
    band: float = 8.0,
    skip: Iterable[int] = (),
    order: Sequence[int] | None = None,
) -> Joined:
    """Run `model` over an image (*shape, C) in memory, tile by tile, through the real stitchers.

    `skip` are tiles that give nothing (as if unreadable), `order` the order in which tiles are computed.
    """
    left_out = set(skip)
    stitchers = {
        (b.index, f.name): FieldStitcher(grid, b, f) for b in grid.blocks() for f in model.spec.fields
    }
    tables: dict[int, list[ObjectTable]] = {}
    image = Region((0,) * grid.extent.ndim, pixels.shape[:-1])
    for index in range(len(grid)) if order is None else order:
        tile, block = grid[index], grid.block_of(index)
        result = None if index in left_out else _apply(model, pixels, tile)
        for spec in model.spec.fields:
            stitcher = stitchers[block, spec.name]
            stitcher.skip(tile) if result is None else stitcher.add(tile, result.fields[spec.name])
        if result is not None and result.objects is not None:
            tables.setdefault(block, []).append(select(result.objects, tile, grid, band, image=image))
    parts = {key: stitcher.finalize() for key, stitcher in stitchers.items()}
    fields = {
        s.name: FieldMerger(grid, s, _loader(parts, s.name)).read(grid.extent) for s in model.spec.fields
    }
    if not model.spec.objects:
        return Joined(None, fields)
    stored = {block: ObjectTable.concat(rows) for block, rows in tables.items()}
    empty = ObjectTable.empty(grid.extent.ndim, model.spec.object_columns)
    return Joined(ObjectTable.concat([empty, *merge_objects(grid, stored.get)]), fields)


def _loader(parts: Mapping[tuple[int, str], FieldPart], name: str) -> Callable[[int], FieldPart]:
    return lambda block: parts[block, name]


def naive_fields(
    pixels: Array, model: TileModel, grid: TileGrid, *, skip: Iterable[int] = ()
) -> dict[str, Array]:
    """Return all fields by the textbook: one canvas of the whole image, ``sum(w p) / sum(w)`` in float64."""
    left_out = set(skip)
    out = {}
    for spec in model.spec.fields:
        weights = outer(window(spec.window, grid.tile, grid.halo)).astype(np.float64)
        total = np.zeros(grid.extent.shape)
        value = np.zeros((len(spec.channels), *grid.extent.shape))
        answered = np.zeros(grid.extent.shape, bool)
        for tile in grid:
            if tile.index in left_out:
                continue
            seen = tile.read.intersect(grid.extent)
            here, there = seen.slices(grid.extent.start), seen.slices(tile.read.start)
            prediction = _apply(model, pixels, tile).fields[spec.name]
            value[(slice(None), *here)] += weights[there] * prediction[(slice(None), *there)]
            total[here] += weights[there]
            answered[tile.owned.slices(grid.extent.start)] = True
        mean = np.divide(value, total, out=np.zeros_like(value), where=total > 0).astype(np.float32)
        finished = finish(mean, spec)
        out[spec.name] = np.where(answered, finished, np.array(FILL, finished.dtype))
    return out


def naive_objects(pixels: Array, model: TileModel) -> ObjectTable:
    """Return the objects of the whole image read in one piece, ordered by anchor."""
    whole = Region((0,) * (pixels.ndim - 1), pixels.shape[:-1])
    table = _apply(model, pixels, Tile(0, whole, whole)).objects
    if table is None:
        raise ValueError(f"{model.spec.name} finds no objects")
    return table.take(np.lexsort(table.anchor.T[::-1]))


def naive_merge(grid: TileGrid, tables: Iterable[ObjectTable]) -> ObjectTable:
    """Return what `merge_objects` keeps of all tiles' selections: every pair compared on whole masks.

    Quadratic in the objects; ordered by anchor.
    """
    table = ObjectTable.concat(list(tables))
    pixels = [_pixels(table, row) for row in range(len(table))]
    tiles = [grid[i] for i in table.tile.tolist()]
    owner = [t.owned.has_point(a) for t, a in zip(tiles, table.anchor.tolist(), strict=True)]
    rivals: list[list[int]] = [[] for _ in pixels]
    for a, mine in enumerate(pixels):
        for b in range(a):
            if tiles[a] != tiles[b] and 2 * len(mine & pixels[b]) > min(len(mine), len(pixels[b])):
                rivals[a].append(b)
                rivals[b].append(a)

    def rank(row: int) -> tuple[Any, ...]:
        anchor, read = table.anchor[row], tiles[row].read
        depth = np.minimum(anchor - read.start, np.array(read.stop) - anchor).min()
        return (table.cut[row], not owner[row], -depth, *anchor.tolist(), tiles[row].index)

    kept: set[int] = set()
    for row in sorted(range(len(table)), key=rank):
        if (owner[row] or rivals[row]) and not kept.intersection(rivals[row]):
            kept.add(row)
    return table.take(np.array(sorted(kept, key=lambda r: table.anchor[r].tolist()), np.int64))


def _pixels(table: ObjectTable, row: int) -> set[tuple[int, ...]]:
    return set(map(tuple, (np.argwhere(table.mask(row)) + table.start[row]).tolist()))
