"""`tiles.parquet`: what became of every tile. No times: the ledger belongs to the deterministic tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.writers.base import atomic_file

__all__ = ["TILE_STATUSES", "write_ledger", "level0_region"]

TILE_STATUSES = ("ok", "background", "absent", "unreadable", "model_failed", "not_done")
_GROUP = 65_536  # rows made at once


def write_ledger(
    path: str | Path,
    grid: TileGrid,
    status: NDArray[Any],
    scale: tuple[float, ...],
    *,
    reasons: Mapping[int, str] | None = None,
    offset: tuple[float, ...] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a row for each tile of `grid`, in index order.

    Columns: ``tile``, ``status``, ``reason``, and for each axis ``k`` the owned region as ``start_k``,
    ``shape_k`` (working pixels) and ``level0_start_k``, ``level0_shape_k`` (level-0 pixels).

    Parameters
    ----------
    status
        Integers (N,): positions in `TILE_STATUSES`.
    scale, offset
        Level-0 pixels per working pixel along each axis, and where working pixel 0 begins at level 0.
    reasons
        Why, for the tiles that need one; empty text for the others.

    Raises OutputError: WSI510 to WSI512 as `atomic_file`, WSI514 if `status` does not fit the grid.
    """
    codes = np.asarray(status)
    if codes.shape != (len(grid),) or (
        codes.size and not 0 <= codes.min() <= codes.max() < len(TILE_STATUSES)
    ):
        raise OutputError(
            "WSI514",
            f"ledger: {codes.shape} statuses for {len(grid)} tiles; give one of {TILE_STATUSES} for each",
        )
    schema = _schema(grid.extent.ndim)
    with (
        atomic_file(path, overwrite=overwrite) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", compression_level=3) as sink,
    ):
        for first in range(0, len(grid), _GROUP):
            rows = np.arange(first, min(first + _GROUP, len(grid)))
            columns = _regions(grid, rows, scale, offset or (0.0,) * grid.extent.ndim)
            columns["tile"] = rows
            columns["status"] = pa.DictionaryArray.from_arrays(
                pa.array(codes[rows].astype(np.int32)), pa.array(TILE_STATUSES)
            )
            why = reasons or {}
            columns["reason"] = pa.array([why.get(i, "") for i in rows.tolist()], pa.string())
            sink.write_table(pa.table({f.name: columns[f.name] for f in schema}, schema=schema))


def level0_region(region: Region, scale: tuple[float, ...], offset: tuple[float, ...]) -> Region:
    """Return `region` of the working grid in whole level-0 pixels: its edges, rounded half up.

    Neighbours share their rounded edge, so regions that partition the grid partition level 0 too.
    """
    edges = [
        tuple(int(np.floor(a * s + o + 0.5)) for a, s, o in zip(corner, scale, offset, strict=True))
        for corner in (region.start, region.stop)
    ]
    return Region.between(*edges)


def _regions(
    grid: TileGrid, rows: NDArray[Any], scale: tuple[float, ...], offset: tuple[float, ...]
) -> dict[str, Any]:
    """Return the owned regions of tiles `rows`, as `grid[i].owned` and `level0_region` give them."""
    columns: dict[str, Any] = {}
    places = np.unravel_index(rows, grid.counts)
    for axis, place in enumerate(places):
        owned = np.array(grid.lines[axis].owned)
        start, stop = owned[place], owned[place + 1]
        fine = [np.floor(e * scale[axis] + offset[axis] + 0.5).astype(np.int64) for e in (start, stop)]
        columns[f"start_{axis}"], columns[f"shape_{axis}"] = start, stop - start
        columns[f"level0_start_{axis}"], columns[f"level0_shape_{axis}"] = fine[0], fine[1] - fine[0]
    return columns


def _schema(ndim: int) -> pa.Schema:
    names = [
        f"{p}{kind}_{axis}" for p in ("", "level0_") for kind in ("start", "shape") for axis in range(ndim)
    ]
    return pa.schema(
        [
            pa.field("tile", pa.int64(), nullable=False),
            pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            *(pa.field(name, pa.int64(), nullable=False) for name in names),
        ]
    )
