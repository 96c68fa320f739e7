"""Grids: owned regions partition the extent, read windows are constant, blocks partition the tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.geometry import Region
from wsitk.grid import TileGrid


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    """Return any small grid in 1 to 3 dimensions; halos may exceed cells, origins may lie anywhere."""
    ndim = draw(st.integers(1, 3))

    def vector(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    halo, cell = vector(0, 4), vector(2, 6)
    tile = tuple(c + 2 * h for c, h in zip(cell, halo, strict=True))
    extent = Region(vector(-5, 5), vector(1, 14))
    return TileGrid(extent, tile, halo, vector(-9, 9), vector(1, 3))


def counted(grid: TileGrid, regions: list[Region]) -> np.ndarray:
    """Return how many of `regions` (inside the extent) cover each pixel of the extent."""
    cover = np.zeros(grid.extent.shape, int)
    for region in regions:
        assert grid.extent.contains(region)
        cover[region.slices(grid.extent.start)] += 1
    return cover


@given(grids())
def test_owned_regions_partition_the_extent(grid: TileGrid) -> None:
    assert (counted(grid, [tile.owned for tile in grid]) == 1).all()
    assert all(tile.owned.size for tile in grid)


@given(grids())
def test_read_is_constant_and_holds_owned_with_its_halo(grid: TileGrid) -> None:
    for tile in grid:
        assert tile.read.shape == grid.tile
        assert tile.read.contains(tile.owned.grow(grid.halo))
        lattice = zip(tile.read.start, grid.halo, grid.origin, grid.cell, strict=True)
        assert all((a + h - o) % c == 0 for a, h, o, c in lattice)


@given(grids())
def test_positions_and_indices_are_inverse(grid: TileGrid) -> None:
    assert [tile.index for tile in grid] == list(range(len(grid)))
    places = [grid.position(i) for i in range(len(grid))]
    assert places == list(np.ndindex(*grid.counts))
    assert [grid.index_at(p) for p in places] == list(range(len(grid)))


@given(grids())
def test_blocks_partition_tiles_and_pixels(grid: TileGrid) -> None:
    blocks = list(grid.blocks())
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert sorted(i for b in blocks for i in b.tiles) == list(range(len(grid)))
    assert all(grid.block_of(i) == b.index for b in blocks for i in b.tiles)
    assert (counted(grid, [b.owned for b in blocks]) == 1).all()
    for block in blocks:
        assert list(block.tiles) == sorted(block.tiles)
        reads = [grid[i].read for i in block.tiles]
        assert block.read.start == tuple(np.min([r.start for r in reads], axis=0))
        assert block.read.stop == tuple(np.max([r.stop for r in reads], axis=0))


@given(grids(), st.data())
def test_overlapping_equals_brute_force(grid: TileGrid, data: st.DataObject) -> None:
    ndim = grid.extent.ndim
    start = tuple(data.draw(st.integers(-12, 20)) for _ in range(ndim))
    region = Region(start, tuple(data.draw(st.integers(0, 6)) for _ in range(ndim)))
    wanted = [t for t in grid if t.read.intersect(region).size]
    assert list(grid.overlapping(region)) == wanted


@given(grids(), st.data())
@settings(max_examples=200)
def test_fit_aligns_every_read_window(grid: TileGrid, data: st.DataObject) -> None:
    align = tuple(data.draw(st.sampled_from([p for p in range(1, c + 1) if c % p == 0])) for c in grid.cell)
    fitted = TileGrid.fit(grid.extent, grid.tile, grid.halo, align=align, block=grid.block)
    for tile in fitted:
        assert all(a % p == 0 for a, p in zip(tile.read.start, align, strict=True))
    assert (counted(fitted, [tile.owned for tile in fitted]) == 1).all()
    # Not a lattice step too many in front of the image.
    gaps = zip(fitted.extent.start, fitted.origin, align, strict=True)
    assert all(0 <= a - o < p for a, o, p in gaps)


def test_fit_refuses_a_cell_that_breaks_the_period() -> None:
    with pytest.raises(ValueError, match="multiple"):
        TileGrid.fit(Region((0, 0), (9, 9)), (64, 64), (8, 8), align=(32, 32))


@pytest.mark.parametrize(
    ("extent", "tile", "halo"),
    [
        (Region((0, 0), (0, 5)), (8, 8), (1, 1)),
        (Region((0, 0), (5, 5)), (8, 8), (4, 1)),
        (Region((0, 0), (5, 5)), (8, 8, 8), (1, 1)),
    ],
)
def test_a_grid_refuses_nonsense(extent: Region, tile: tuple[int, ...], halo: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"empty|inside|length"):
        TileGrid(extent, tile, halo, (0, 0), (1, 1))


def test_indices_beyond_the_grid_are_refused() -> None:
    grid = TileGrid.fit(Region((0, 0), (20, 20)), (8, 8), (1, 1), block=(2, 2))
    with pytest.raises(IndexError):
        grid[len(grid)]
    with pytest.raises(IndexError):
        grid.index_at((0, grid.counts[1]))
    with pytest.raises(IndexError):
        grid.block_at(len(list(grid.blocks())))
