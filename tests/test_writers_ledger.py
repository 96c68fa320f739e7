"""tiles.parquet: one row for each tile, agreeing with the grid."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.writers.base import sha256_file
from wsitk.writers.ledger import TILE_STATUSES, level0_region, write_ledger


@settings(max_examples=30, deadline=None)
@given(
    ndim=st.integers(2, 3),
    data=st.data(),
    scale=st.floats(0.3, 5),
    seed=st.integers(0, 2**16),
)
def test_rows_agree_with_the_grid(tmp_path_factory, ndim, data, scale, seed):
    start = tuple(data.draw(st.integers(-20, 20)) for _ in range(ndim))
    shape = tuple(data.draw(st.integers(1, 60)) for _ in range(ndim))
    grid = TileGrid.fit(Region(start, shape), (20,) * ndim, (3,) * ndim)
    status = np.random.default_rng(seed).integers(0, len(TILE_STATUSES), len(grid))
    path = tmp_path_factory.mktemp("ledger") / "tiles.parquet"
    scales, offset = (scale,) * ndim, (0.25,) * ndim
    write_ledger(path, grid, status, scales, reasons={0: "why"}, offset=offset)
    rows = pq.read_table(path).to_pylist()
    assert [r["tile"] for r in rows] == list(range(len(grid)))
    assert [r["status"] for r in rows] == [TILE_STATUSES[k] for k in status]
    assert [r["reason"] for r in rows] == ["why"] + [""] * (len(grid) - 1)
    for row, tile in zip(rows, grid, strict=True):
        fine = level0_region(tile.owned, scales, offset)
        for axis in range(ndim):
            assert (row[f"start_{axis}"], row[f"shape_{axis}"]) == (
                tile.owned.start[axis],
                tile.owned.shape[axis],
            )
            assert row[f"level0_start_{axis}"] == fine.start[axis]
            assert row[f"level0_shape_{axis}"] == fine.shape[axis]


def test_level0_regions_partition_level_0():
    grid = TileGrid.fit(Region((0, 0), (97, 61)), (20, 20), (4, 4))
    seen = np.zeros((97 * 2, 61 * 2), int)
    for tile in grid:
        fine = level0_region(tile.owned, (1.37, 1.37), (0.0, 0.0))
        seen[fine.slices()] += 1
    whole = level0_region(grid.extent, (1.37, 1.37), (0.0, 0.0))
    assert (seen[whole.slices()] == 1).all()
    assert seen.sum() == whole.size


def test_same_ledger_same_bytes_and_wrong_status_refused(tmp_path):
    grid = TileGrid.fit(Region((0, 0), (97, 61)), (20, 20), (4, 4))
    status = np.zeros(len(grid), np.int8)
    for name in "ab":
        write_ledger(tmp_path / name, grid, status, (1.0, 1.0))
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")
    for bad in (status[1:], status - 1, status + len(TILE_STATUSES)):
        with pytest.raises(OutputError, match="WSI514"):
            write_ledger(tmp_path / "c", grid, bad, (1.0, 1.0))
    assert not (tmp_path / "c").exists()
