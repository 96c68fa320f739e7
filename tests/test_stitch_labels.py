"""Labels of volumes: the textbook's scores, in any order, from any layer, on any canvas."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import zoom

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import FieldSpec
from wsitk.stitch.labels import LabelMerger, LabelPart, LabelStitcher
from wsitk.stitch.layers import Canvas
from wsitk.stitch.spool import Spool
from wsitk.stitch.windows import outer, window

CLASSES = 5
SPEC = FieldSpec("f", tuple("abcde"), kind="labels", reduction="argmax", window="gaussian")


def layered(grid: TileGrid) -> TileGrid:
    return replace(grid, block=(1, *grid.counts[1:]))


def sliding(shape: tuple[int, ...], tile: tuple[int, ...], step: float = 0.5) -> TileGrid:
    return layered(TileGrid.sliding(Region((0,) * len(shape), shape), tile, step))


GRIDS = {
    "even": sliding((40, 30, 33), (16, 32, 16)),
    "dense": sliding((41, 20, 24), (16, 16, 16), 0.3),
    "small": sliding((9, 20, 30), (16, 16, 16)),
    "halo": layered(TileGrid.fit(Region((0, 0, 0), (40, 30, 33)), (16, 20, 18), (4, 3, 5))),
}


def said(tile: Tile) -> NDArray[np.float32]:
    return np.random.default_rng(tile.index).random((CLASSES, *tile.read.shape), dtype=np.float32)


def textbook(grid: TileGrid, spec: FieldSpec, lost: frozenset[int] = frozenset()) -> NDArray[np.float64]:
    weights = outer(window(spec.window, grid.tile, grid.halo)).astype(np.float64)
    total, weight = np.zeros((CLASSES, *grid.extent.shape)), np.zeros(grid.extent.shape)
    for tile in grid:
        if tile.index in lost:
            continue
        seen = tile.read.intersect(grid.extent)
        here = seen.slices(tile.read.start)
        total[(slice(None), *seen.slices())] += said(tile)[(slice(None), *here)] * weights[here]
        weight[seen.slices()] += weights[here]
    return total / np.where(weight > 0, weight, 1)


def on_canvas(scores: NDArray[Any], canvas: Canvas, order: int) -> NDArray[Any]:
    """Return scores resampled as SciPy does: slice by slice, and then across, where the canvas says so."""
    factors = [m / n for m, n in zip(canvas.shape, scores.shape[1:], strict=True)]
    orders = [0 if axis == canvas.apart else order for axis in range(3)]
    for axis in range(3):
        one = [factors[a] if a == axis else 1.0 for a in range(3)]
        scores = np.stack([zoom(s, one, order=orders[axis], mode="nearest", grid_mode=True) for s in scores])
    return scores


def canvas_of(grid: TileGrid, shape: tuple[int, ...] | None = None, apart: int | None = None) -> Canvas:
    full = shape or grid.extent.shape
    return Canvas(full, tuple(n / m for n, m in zip(full, grid.extent.shape, strict=True)), apart)


def stitch(
    grid: TileGrid,
    spec: FieldSpec,
    canvas: Canvas,
    order: list[int] | None = None,
    give: Callable[[Tile], Any] = said,
    lost: frozenset[int] = frozenset(),
) -> NDArray[Any]:
    stitcher = LabelStitcher(grid, spec, canvas)
    for i in order or range(len(grid)):
        if i in lost:
            stitcher.skip(grid[i])
        else:
            stitcher.add(grid[i], give(grid[i]))
    return np.concatenate([stitcher.finish(k).labels for k in range(grid.counts[0])])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("window", ["gaussian", "flat", "crop"])
def test_scores_are_the_textbooks(name: str, window: Any) -> None:
    if window == "crop" and name != "halo":
        pytest.skip("windows that overlap have no halo to crop")
    grid, spec = GRIDS[name], replace(SPEC, window=window)
    wanted = textbook(grid, spec)
    stitcher = LabelStitcher(grid, spec, canvas_of(grid))
    for layer in range(grid.counts[0]):
        for i in grid.block_at(layer).tiles:
            stitcher.add(grid[i], said(grid[i]))
        low, high = stitcher.layers.painted(layer)
        for kind in range(CLASSES):
            assert stitcher._rows(kind, low, high) == pytest.approx(wanted[kind, low:high], abs=1e-6)
        assert np.array_equal(stitcher.finish(layer).labels, wanted[:, low:high].argmax(0))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    ("factor", "apart"), [((1.3, 1.4, 0.9), None), ((0.5, 1.2, 1.0), 0), ((2.6, 0.7, 1), 2)]
)
@pytest.mark.parametrize("restore", ["linear", "nearest"])
def test_labels_on_a_canvas_are_scipys(name: str, factor: Any, apart: int | None, restore: Any) -> None:
    grid, spec = GRIDS[name], replace(SPEC, restore=restore)
    shape = tuple(max(1, round(n * f)) for n, f in zip(grid.extent.shape, factor, strict=True))
    canvas = canvas_of(grid, shape, apart)
    wanted = on_canvas(textbook(grid, spec), canvas, 1 if restore == "linear" else 0)
    two = np.sort(wanted, axis=0)[-2:]
    clear = two[1] - two[0] > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(stitch(grid, spec, canvas)[clear], wanted.argmax(0)[clear])


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_order_of_arrival_changes_nothing(name: str, seed: int) -> None:
    grid = GRIDS[name]
    canvas = canvas_of(grid, tuple(n + 7 for n in grid.extent.shape))
    order = np.random.default_rng(seed).permutation(len(grid)).tolist()
    assert np.array_equal(stitch(grid, SPEC, canvas, order), stitch(grid, SPEC, canvas))


@pytest.mark.parametrize("name", GRIDS)
def test_a_run_may_begin_at_any_layer(name: str) -> None:
    grid = GRIDS[name]
    canvas = canvas_of(grid, tuple(2 * n - 5 for n in grid.extent.shape))
    whole = stitch(grid, SPEC, canvas)
    for layer in range(grid.counts[0]):
        stitcher = LabelStitcher(grid, SPEC, canvas, first=layer)
        for earlier in [*stitcher.layers.before(layer), layer]:
            for i in grid.block_at(earlier).tiles:
                stitcher.add(grid[i], said(grid[i]))
        part = stitcher.finish(layer)
        assert np.array_equal(part.labels, whole[part.start : part.start + len(part.labels)])


def test_classes_may_come_in_parts() -> None:
    grid, canvas = GRIDS["even"], canvas_of(GRIDS["even"])
    given = stitch(grid, SPEC, canvas, give=lambda tile: lambda a, b: said(tile)[a:b])
    assert np.array_equal(given, stitch(grid, SPEC, canvas))


def test_a_lost_tile_keeps_what_it_owns_empty() -> None:
    grid, lost = GRIDS["even"], frozenset({1, 4})
    canvas = canvas_of(grid, tuple(2 * n for n in grid.extent.shape))
    spec = replace(SPEC, regions=(1, 2, 3, 4, 5), threshold=-1.0)
    labels = stitch(grid, spec, canvas, lost=lost)
    owned = np.zeros(canvas.shape, bool)
    for i in lost:
        owned[tuple(slice(2 * s.start, 2 * s.stop) for s in grid[i].owned.slices())] = True
    assert not labels[owned].any()
    assert (labels[~owned] == 5).all()


def test_the_merger_reads_any_box_of_the_image() -> None:
    grid, canvas = GRIDS["even"], canvas_of(GRIDS["even"])
    labels = stitch(grid, SPEC, canvas)
    stitcher = LabelStitcher(grid, SPEC, canvas)
    parts = {}
    for layer in range(grid.counts[0]):
        low, high = stitcher.layers.painted(layer)
        parts[layer] = LabelPart.from_arrays(LabelPart(low, labels[low:high]).to_arrays())
    del parts[1]
    low, high = stitcher.layers.painted(1)
    shape = tuple(n + 9 for n in canvas.shape)
    image = np.zeros(shape, np.uint8)
    box = Region((2, 3, 4), canvas.shape)
    image[box.slices()] = labels
    image[2 + low : 2 + high] = 0
    merger = LabelMerger(stitcher.layers, SPEC, shape, box, parts.get)
    for region in (Region((0, 0, 0), shape), Region((5, 1, 30), (31, 7, 12)), Region((0, 0, 0), (2, 3, 4))):
        assert np.array_equal(merger.read(region), image[region.slices()])
    assert merger.counts(range(5)) == np.bincount(image.ravel(), minlength=5).tolist()
    assert np.array_equal(np.concatenate(list(merger.rows(7))), image)


def test_what_does_not_fit_is_refused() -> None:
    grid = GRIDS["even"]
    stitcher = LabelStitcher(grid, SPEC, canvas_of(grid))
    with pytest.raises(ModelError, match="WSI331"):
        stitcher.add(grid[0], said(grid[0])[:, 1:])
    stitcher.add(grid[0], said(grid[0]))
    with pytest.raises(ValueError, match="came before"):
        stitcher.skip(grid[0])
    with pytest.raises(ValueError, match="not the next"):
        stitcher.finish(1)


def test_scratch_grows_with_neither_slices_nor_layers() -> None:
    sizes = set()
    for depth in (64, 128, 640):
        grid = sliding((depth, 30, 33), (16, 32, 16))
        sizes.add(LabelStitcher(grid, SPEC, canvas_of(grid)).scratch_bytes)
    (size,) = sizes
    assert size == 4 * CLASSES * 16 * 30 * 33


# --- the scratch file ------------------------------------------------------------------------------------


def test_the_spool_keeps_a_window_of_rows(tmp_path: Path) -> None:
    extent = Region((3, 0, 0), (50, 6, 7))
    spool = Spool(extent, 2, 8, [[0, 2, 6], [0, 7]], folder=tmp_path)
    truth = np.zeros((2, 60, 6, 7), np.float32)
    rng = np.random.default_rng(0)
    for low in range(3, 45, 3):
        spool.advance(low)
        truth[:, :low] = np.nan
        for brick, box in spool.bricks(Region((low, 0, 0), (6, 6, 7))):
            for kind in range(2):
                values = rng.random(box.shape, dtype=np.float32)
                spool.write(brick, kind, low, values)
                truth[kind][box.slices()] = values
            spool.wrote(brick, low, low + 6)
        for brick, box in spool.bricks(Region((low, 0, 0), (8, 6, 7))):
            for kind in range(2):
                assert np.array_equal(spool.read(brick, kind, low, low + 8), truth[kind][box.slices()])
    with pytest.raises(ValueError, match="not kept"):
        spool.read(0, 0, 2, 4)
    assert list(tmp_path.iterdir()) == []  # it has no name
    assert spool.nbytes == 4 * 2 * 8 * prod((6, 7))
    spool.close()


def test_a_disk_without_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    spool = Spool(Region((0, 0), (9, 1 << 20)), 1 << 20, 1 << 10, [[0, 1 << 20]], folder=tmp_path)
    with pytest.raises(OSError, match="no room for") as caught:
        spool.write(0, 0, 0, np.zeros((1, 1 << 20), np.float32))
    assert caught.value.errno == errno.ENOSPC
