"""The results of one input, as they lie on disk; nothing is read before it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsitk.record import read_json

if TYPE_CHECKING:
    import dask.array
    import geopandas

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """The folder of one finished input.

    `objects` is a GeoDataFrame (geometry in level-0 pixels, x right, y down), `maps` a lazy dask array
    (channels, then the working grid), `labels` one of a volume's labels (its own grid), `provenance` what made the
    bytes.
    """

    path: Path

    @cached_property
    def objects(self) -> geopandas.GeoDataFrame:
        """Read `objects.parquet`."""
        import geopandas

        return geopandas.read_parquet(self.path / "objects.parquet")

    @cached_property
    def maps(self) -> dask.array.Array:
        """Open the finest level of `maps.ome.zarr`; `map_channels` names its first axis."""
        import dask.array

        return dask.array.from_zarr(str(self.path / "maps.ome.zarr"), component="0")

    @cached_property
    def restored(self) -> dask.array.Array:
        """Open the finest level of `restored.ome.zarr`: the whole image (3, y, x) with what was painted in it."""
        import dask.array

        return dask.array.from_zarr(str(self.path / "restored.ome.zarr"), component="0")

    @cached_property
    def map_channels(self) -> tuple[str, ...]:
        """Return the names of the maps' channels."""
        import zarr

        omero: Any = zarr.open_group(str(self.path / "maps.ome.zarr"), mode="r").attrs["ome"]
        return tuple(channel["label"] for channel in omero["omero"]["channels"])

    @cached_property
    def labels(self) -> dask.array.Array:
        """Open the labels of a volume, on the input's own grid; `label_names` says what the values mean."""
        import dask.array

        return dask.array.from_zarr(str(self.path / "labels.ome.zarr"), component="0")

    @cached_property
    def label_names(self) -> dict[int, str]:
        """Return the names of the labels' values; 0 is what has none."""
        import zarr

        image: Any = zarr.open_group(str(self.path / "labels.ome.zarr"), mode="r").attrs["ome"]
        return {item["label-value"]: item["name"] for item in image["image-label"]["properties"]}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Read `provenance.json`."""
        return read_json(self.path / "provenance.json")
