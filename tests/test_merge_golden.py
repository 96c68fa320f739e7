"""Upstream CellViT's own merge of 16 tiles and ours, fed the same cells, judged by the same truth.

A cell is a nucleus of the truth if their masks' IoU exceeds one half; a nucleus with no such cell is lost,
one with several is doubled. The margin is all within 64 pixels of a tile's border: what tiles share.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.objects import ObjectTable
from wsitk.stitch.objects import merge_objects, select

Array = NDArray[Any]

GOLDEN = Path(__file__).parent / "golden" / "cellvit" / "post_wsi_full.npz"
SIDE, TILE, OVERLAP = 768, 256, 64
# The default of `ModelSpec.seam_um` (8) at a quarter of a micrometre.
BAND = 32


def grid_of(block: tuple[int, int] = (2, 2)) -> TileGrid:
    halo = (OVERLAP // 2,) * 2
    return TileGrid(Region((0, 0), (SIDE, SIDE)), (TILE, TILE), halo, (0, 0), block)


@dataclass(frozen=True)
class Golden:
    """Upstream's raw cells (`cells`, numbered by the column ``raw``), those it kept, and the truth."""

    cells: ObjectTable
    kept: Array
    truth: Array

    @cached_property
    def nucleus(self) -> Array:
        """Return the nucleus that each raw cell is, or 0."""
        area, found = np.bincount(self.truth.ravel()), np.zeros(len(self.cells), np.int64)
        for row in range(len(found)):
            box = self.cells.region(row)
            seen = box.intersect(Region((0, 0), self.truth.shape))
            mask = self.cells.mask(row)[seen.slices(box.start)]
            shared = np.bincount(self.truth[seen.slices()][mask], minlength=2)
            best = int(shared[1:].argmax()) + 1
            if 2 * shared[best] > mask.sum() + area[best] - shared[best]:
                found[row] = best
        return found

    @cached_property
    def in_margin(self) -> NDArray[np.bool_]:
        """Tell for each nucleus, from number 1, whether it reaches into the margin of a tile."""
        strip = (np.arange(SIDE) + OVERLAP // 2) % (TILE - OVERLAP) < OVERLAP
        reached = np.bincount(self.truth[strip[:, None] | strip], minlength=self.truth.max() + 1)
        return np.asarray(reached[1:] > 0)

    def judge(self, raw: Array) -> tuple[Array, Array]:
        """Return the numbers of the nuclei lost, and of those doubled."""
        copies = np.bincount(self.nucleus[raw], minlength=self.truth.max() + 1)[1:]
        return np.flatnonzero(copies == 0) + 1, np.flatnonzero(copies > 1) + 1


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(GOLDEN) as file:
        stored = dict(file)
    grid, tables = grid_of(), []
    outlines = np.split(stored["cell_contour"].astype(np.int32), stored["cell_contour_offsets"][1:-1])
    for number, (outline, place) in enumerate(zip(outlines, stored["cell_tile"].tolist(), strict=True)):
        low = outline.min(axis=0)
        mask = np.zeros((outline.max(axis=0) - low + 1)[::-1], np.uint8)
        cv2.drawContours(mask, [outline - low], -1, 1, cv2.FILLED)
        origin, raw = (int(low[1]), int(low[0])), {"raw": np.array([number])}
        tile = grid.index_at(tuple(place))
        tables.append(ObjectTable.from_labels(mask, origin=origin, columns=raw, tile=tile))
    cells = ObjectTable.concat(tables)
    boxes = np.stack([cells.start, cells.start + cells.shape], axis=1)
    assert np.array_equal(boxes, stored["cell_bbox"]), "the outlines, filled, are not the cells"
    # Upstream's first tile begins half an overlap before the image; so does the truth.
    inside = Region((OVERLAP // 2,) * 2, (SIDE, SIDE)).slices()
    assert np.count_nonzero(stored["gt_label"]) == np.count_nonzero(stored["gt_label"][inside])
    return Golden(cells, stored["keep"], stored["gt_label"][inside].astype(np.int64))


def ours(golden: Golden, grid: TileGrid, band: float = BAND, missing: Collection[int] = ()) -> Array:
    """Return the numbers of the raw cells that our merge keeps, ascending; `missing` tiles gave nothing."""
    stored: dict[int, list[ObjectTable]] = {}
    for tile in grid:
        if tile.index not in missing:
            seen = golden.cells.take(golden.cells.tile == tile.index)
            stored.setdefault(grid.block_of(tile.index), []).append(select(seen, tile, grid, band))
    blocks = {block: ObjectTable.concat(tables) for block, tables in stored.items()}
    merged = ObjectTable.concat(list(merge_objects(grid, blocks.get)))
    return np.sort(merged.columns["raw"].astype(np.int64))


def test_upstreams_own_counts_are_reproduced(golden: Golden) -> None:
    (lost, doubled), margin = golden.judge(golden.kept), golden.in_margin
    assert (len(golden.cells), len(golden.kept), len(doubled)) == (1096, 699, 0)
    assert (margin.sum(), margin[lost - 1].sum()) == (471, 4)
    assert ((~margin).sum(), (~margin)[lost - 1].sum()) == (233, 1)


def test_we_lose_no_more_and_double_none(golden: Golden) -> None:
    raw = ours(golden, grid_of())
    lost, doubled = golden.judge(raw)
    assert not len(doubled)
    assert (golden.nucleus[raw] > 0).all(), "a fragment stayed beside its nucleus"
    assert set(lost) <= set(golden.judge(golden.kept)[0])
    # Nothing is left to win: no tile found these.
    assert set(lost) == set(golden.judge(np.arange(len(golden.cells)))[0])


@pytest.mark.parametrize("block", [(1, 1), (1, 3), (4, 4)])
def test_blocks_do_not_matter(golden: Golden, block: tuple[int, int]) -> None:
    assert np.array_equal(ours(golden, grid_of(block)), ours(golden, grid_of()))


def test_the_judge_sees_what_a_worse_merge_does(golden: Golden) -> None:
    assert len(golden.judge(np.arange(len(golden.cells)))[1]) == 311
    # Ownership alone: each of two tiles holds nucleus 372, at row 575.5, for the other's.
    assert set(golden.judge(ours(golden, grid_of(), band=0))[0]) - set(golden.judge(golden.kept)[0]) == {372}


@pytest.mark.parametrize("missing", [{i} for i in range(16)] + [{5, 6}, {10, 11}, {3, 12}])
def test_missing_tiles_cost_only_what_they_own(golden: Golden, missing: set[int]) -> None:
    grid = grid_of()
    lost, doubled = golden.judge(ours(golden, grid, missing=missing))
    assert not len(doubled)
    # Each tile sees a nucleus a little elsewhere, so the border of what went missing is a pixel wide.
    gone = [grid[i].owned.grow((1, 1)) for i in missing]
    truth = ObjectTable.from_labels(golden.truth)
    seen = set(lost) - set(golden.judge(np.arange(len(golden.cells)))[0])
    anchors = {number: tuple(truth.anchor[number - 1].tolist()) for number in seen}
    assert all(any(region.has_point(point) for region in gone) for point in anchors.values()), anchors
