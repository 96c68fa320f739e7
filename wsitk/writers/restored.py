"""What a restoration says of each region: `restored_regions.parquet`, and the same for QuPath as annotations."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from wsitk.geometry import Region
from wsitk.writers.base import atomic_file
from wsitk.writers.geojson import GRID, fit_to_grid

__all__ = ["KIND_COLORS", "RestoredRegion", "read_boxes", "write_region_geojson", "write_regions"]

KIND_COLORS: dict[str, tuple[int, int, int]] = {
    "fold": (214, 96, 77), "bubble": (67, 147, 195), "blur": (153, 112, 171), "pen": (27, 120, 55),
    "dust": (140, 81, 10), "coverslip": (128, 128, 128), "other": (230, 171, 2),
}  # fmt: skip
"""What an artifact of each kind is drawn in; the order is that of the values in the mask, from 1."""


@dataclass(frozen=True)
class RestoredRegion:
    """A region of the mask, and what became of it.

    `box` and `outline` are in level-0 pixels; `status` is ``restored``, or ``left`` with a reason. `change` is the
    mean difference from what was there, `deviation` the mean standard deviation over samples, both in grey levels.
    """

    number: int
    kinds: tuple[str, ...]
    box: Region
    outline: Any
    pixels: int
    area_um2: float | None
    status: str
    reason: str = ""
    change: float | None = None
    deviation: float | None = None


def write_regions(
    path: Path, regions: Sequence[RestoredRegion], *, notes: dict[str, Any], overwrite: bool = False
) -> None:
    """Write a row for each region as GeoParquet 1.1; `notes` go into the metadata, as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "region": pa.array([r.number for r in regions], pa.int32()),
            "kinds": pa.array([" ".join(r.kinds) for r in regions], pa.string()),
            "status": pa.array([r.status for r in regions], pa.string()),
            "reason": pa.array([r.reason for r in regions], pa.string()),
            "x": pa.array([r.box.start[1] for r in regions], pa.int64()),
            "y": pa.array([r.box.start[0] for r in regions], pa.int64()),
            "width": pa.array([r.box.shape[1] for r in regions], pa.int64()),
            "height": pa.array([r.box.shape[0] for r in regions], pa.int64()),
            "pixels": pa.array([r.pixels for r in regions], pa.int64()),
            "area_um2": pa.array([r.area_um2 for r in regions], pa.float64()),
            "change": pa.array([r.change for r in regions], pa.float64()),
            "uncertainty": pa.array([r.deviation for r in regions], pa.float64()),
            "geometry": pa.array([shapely.to_wkb(r.outline, byte_order=1) for r in regions], pa.binary()),
        }
    )
    kinds = sorted({r.outline.geom_type for r in regions})
    column = {"encoding": "WKB", "geometry_types": kinds, "crs": None, "edges": "planar"}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    table = table.replace_schema_metadata(
        {"geo": json.dumps(geo), "wsitk": json.dumps(notes, sort_keys=True)}
    )
    with atomic_file(path, overwrite=overwrite) as stream:
        pq.write_table(table, stream, compression="zstd", compression_level=3)


def read_boxes(path: Path) -> np.ndarray[Any, Any]:
    """Return the level-0 boxes of restored regions, (N, 4): y, x, y stop, x stop."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["y", "x", "height", "width", "status"]).to_pydict()
    each = zip(rows["y"], rows["x"], rows["height"], rows["width"], rows["status"], strict=True)
    return np.array([(y, x, y + h, x + w) for y, x, h, w, s in each if s == "restored"], np.int64).reshape(
        -1, 4
    )


def write_region_geojson(
    path: Path, regions: Sequence[RestoredRegion], *, bounds_xy: tuple[float, float], overwrite: bool = False
) -> None:
    """Write the regions as locked annotations that QuPath imports, a class for each kind of artifact."""
    outlines = np.array([r.outline for r in regions], object)
    fitted, _ = fit_to_grid(outlines, bounds_xy) if len(regions) else (outlines, None)
    features = [
        _feature(region, outline)
        for region, outline in zip(regions, fitted, strict=True)
        if outline is not None and not outline.is_empty
    ]
    data = json.dumps(
        {"type": "FeatureCollection", "features": features}, separators=(",", ":"), ensure_ascii=False
    )
    with atomic_file(path, overwrite=overwrite) as stream:
        stream.write(gzip.compress(data.encode(), 6, mtime=0))


def _feature(region: RestoredRegion, outline: Any) -> dict[str, Any]:
    kind = region.kinds[0] if region.kinds else "other"
    numbers = {"Area µm^2": region.area_um2, "Change": region.change, "Uncertainty": region.deviation}
    word = "Restored" if region.status == "restored" else "Artifact, left"
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, "urn:wsitk:restored"), outline.wkt)),
        "geometry": shapely.geometry.mapping(shapely.set_precision(outline, GRID)),
        "properties": {
            "objectType": "annotation",
            "name": f"{word}: {', '.join(region.kinds) or 'other'}",
            "classification": {"name": f"{word}: {kind}", "color": list(KIND_COLORS[kind])},
            "isLocked": True,
            "measurements": {k: v for k, v in numbers.items() if v is not None},
        },
    }
