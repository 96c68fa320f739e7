"""Which objects were found in restored pixels: they are guesses about guesses, and are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.objects import ObjectTable
from wsitk.plan import Plan
from wsitk.sources.restored import MASK
from wsitk.writers.restored import read_boxes

__all__ = ["RestoredPixels", "restored_pixels"]


def restored_pixels(plan: Plan) -> RestoredPixels | None:
    """Return the restored pixels of an input; None if it is as it was scanned."""
    folder = plan.ref.options.get("restored")
    return RestoredPixels(Path(folder), plan.shape, plan.scale) if folder else None


@final
class RestoredPixels:
    """The restored pixels of an image of `shape`, at level 0; `scale` is level-0 pixels per working pixel."""

    def __init__(self, folder: Path, shape: tuple[int, ...], scale: tuple[float, ...]) -> None:
        import zarr

        self._mask: Any = zarr.open_array(str(folder / MASK / "0"), mode="r")
        self._boxes = read_boxes(folder / "restored_regions.parquet")
        self._image = Region((0,) * len(shape), shape)
        self._scale = np.array(scale)

    def holds(self, table: ObjectTable) -> NDArray[np.bool_]:
        """Tell, for each object of a table on the working grid, whether any of its pixels was restored."""
        low = np.floor(table.start * self._scale).astype(np.int64)
        high = np.ceil((table.start + table.shape) * self._scale).astype(np.int64)
        near = np.zeros(len(table), bool)
        for box in self._boxes:
            near |= ((low < box[2:]) & (high > box[:2])).all(axis=1)
        found = np.zeros(len(table), bool)
        for row in np.flatnonzero(near).tolist():
            box = Region.between(low[row], high[row]).intersect(self._image)
            marked = np.asarray(self._mask[box.slices()]) > 0
            found[row] = marked.any() and bool((marked & self._enlarged(table, row, box)).any())
        return found

    def _enlarged(self, table: ObjectTable, row: int, box: Region) -> NDArray[np.bool_]:
        """Return an object's mask over a level-0 box."""
        mask = table.mask(row)
        places = []
        for axis, scale in enumerate(self._scale):
            place = np.floor((np.arange(box.start[axis], box.stop[axis]) + 0.5) / scale).astype(np.int64)
            places.append((place - table.start[row, axis]).clip(0, mask.shape[axis] - 1))
        return np.asarray(mask[np.ix_(*places)])
