"""Objects as packed masks in boxes: exact, compact, and the same in 2-D and 3-D.

A nucleus costs about a hundred bytes here; polygons are made from the masks when they are written.
Coordinates are pixels of the run's working grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region

__all__ = ["ObjectTable"]

Array = NDArray[Any]


@dataclass(frozen=True)
class ObjectTable:
    """N objects in d dimensions, column by column.

    Attributes
    ----------
    start, shape : int32 (N, d)
        Bounding box of each object on the working grid.
    bits : uint8 (B,)
        All masks, each packed in C order (`numpy.packbits`), one after the other.
    offset : int64 (N + 1,)
        Where each mask begins in `bits`.
    anchor : float64 (N, d)
        Centroid; the pixel ``i`` contributes ``i + 0.5``. The tile that owns this point owns the object.
    size : int64 (N,)
        Number of pixels.
    class_id : int16 (N,)
        Position in the model's list of classes.
    probability : float32 (N,)
        The model's confidence, 0 to 1.
    tile : int32 (N,)
        The tile that saw it.
    cut : bool (N,)
        Whether the tile's read window cuts it (the image's own border does not count).
    columns : name -> float32 (N,)
        Whatever else the model measures for each object.
    """

    start: Array
    shape: Array
    bits: Array
    offset: Array
    anchor: Array
    size: Array
    class_id: Array
    probability: Array
    tile: Array
    cut: Array
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.size)

    @property
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return int(self.start.shape[1])

    @classmethod
    def empty(cls, ndim: int, columns: Sequence[str] = ()) -> ObjectTable:
        """Return a table without rows."""
        return cls(
            start=np.zeros((0, ndim), np.int32),
            shape=np.zeros((0, ndim), np.int32),
            bits=np.zeros(0, np.uint8),
            offset=np.zeros(1, np.int64),
            anchor=np.zeros((0, ndim), np.float64),
            size=np.zeros(0, np.int64),
            class_id=np.zeros(0, np.int16),
            probability=np.zeros(0, np.float32),
            tile=np.zeros(0, np.int32),
            cut=np.zeros(0, bool),
            columns={name: np.zeros(0, np.float32) for name in columns},
        )

    @classmethod
    def from_labels(
        cls,
        labels: Array,
        *,
        origin: tuple[int, ...] | None = None,
        class_id: Array | None = None,
        probability: Array | None = None,
        columns: Mapping[str, Array] | None = None,
        tile: int = 0,
    ) -> ObjectTable:
        """Return the objects of an integer label image (0 = background), in label order.

        `origin` is the working-grid position of the image's first pixel. `class_id`, `probability` and
        `columns` hold a value for each label present, in ascending label order. `cut` stays False: the
        stitcher knows the borders.
        """
        from scipy import ndimage

        first = np.asarray(origin or (0,) * labels.ndim, np.int64)
        boxes = [(i + 1, box) for i, box in enumerate(ndimage.find_objects(labels)) if box is not None]
        count = len(boxes)
        start, shape = np.zeros((count, labels.ndim), np.int32), np.zeros((count, labels.ndim), np.int32)
        anchor, size = np.zeros((count, labels.ndim)), np.zeros(count, np.int64)
        packed: list[Array] = []
        for row, (label, box) in enumerate(boxes):
            mask = labels[box] == label
            low = np.array([s.start for s in box])
            where = np.nonzero(mask)
            start[row], shape[row], size[row] = first + low, mask.shape, len(where[0])
            # One rounding only: the anchor must not depend on the tile that an object is seen in.
            anchor[row] = [w.sum() / len(w) + 0.5 for w in where] + (first + low)
            packed.append(np.packbits(mask))
        return cls(
            start=start,
            shape=shape,
            bits=np.concatenate(packed) if packed else np.zeros(0, np.uint8),
            offset=np.cumsum([0] + [len(p) for p in packed], dtype=np.int64),
            anchor=anchor,
            size=size,
            class_id=np.zeros(count, np.int16) if class_id is None else class_id.astype(np.int16),
            probability=np.ones(count, np.float32) if probability is None else probability.astype(np.float32),
            tile=np.full(count, tile, np.int32),
            cut=np.zeros(count, bool),
            columns={k: np.asarray(v, np.float32) for k, v in (columns or {}).items()},
        )

    def region(self, row: int) -> Region:
        """Return the bounding box of object `row`."""
        return Region(tuple(self.start[row].tolist()), tuple(self.shape[row].tolist()))

    def mask(self, row: int) -> NDArray[np.bool_]:
        """Return object `row` as a boolean array of its bounding box."""
        shape = self.shape[row]
        flat = np.unpackbits(self.bits[self.offset[row] : self.offset[row + 1]], count=int(shape.prod()))
        return flat.reshape(shape).astype(bool)

    def take(self, rows: Array) -> ObjectTable:
        """Return the given rows (indices or a boolean mask), in the order given."""
        index = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows, np.int64)
        length = np.diff(self.offset)[index]
        offset = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        source = np.repeat(self.offset[index] - offset[:-1], length) + np.arange(offset[-1])
        return ObjectTable(
            start=self.start[index],
            shape=self.shape[index],
            bits=self.bits[source],
            offset=offset,
            anchor=self.anchor[index],
            size=self.size[index],
            class_id=self.class_id[index],
            probability=self.probability[index],
            tile=self.tile[index],
            cut=self.cut[index],
            columns={k: v[index] for k, v in self.columns.items()},
        )

    @classmethod
    def concat(cls, tables: Sequence[ObjectTable]) -> ObjectTable:
        """Return all rows of `tables` (at least one), one table after the other."""
        if len(tables) == 1:
            return tables[0]
        names = tables[0].columns.keys()
        shifts = np.cumsum([0] + [len(t.bits) for t in tables])
        joined = {
            name: np.concatenate([getattr(t, name) for t in tables])
            for name in cls.__dataclass_fields__
            if name not in ("offset", "columns")
        }
        offset = np.concatenate(
            [t.offset[:-1] + s for t, s in zip(tables, shifts, strict=False)] + [shifts[-1:]]
        )
        columns = {n: np.concatenate([t.columns[n] for t in tables]) for n in names}
        return cls(**joined, offset=offset.astype(np.int64), columns=columns)

    def with_columns(self, **columns: Array) -> ObjectTable:
        """Return the same objects with further columns."""
        return replace(self, columns={**self.columns, **columns})

    def to_arrays(self) -> dict[str, Array]:
        """Return plain arrays for storage; `from_arrays` is the inverse."""
        plain = {n: getattr(self, n) for n in self.__dataclass_fields__ if n != "columns"}
        return plain | {f"column:{k}": v for k, v in self.columns.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> ObjectTable:
        """Return the table whose `to_arrays` gave `arrays`."""
        columns = {k.removeprefix("column:"): v for k, v in arrays.items() if k.startswith("column:")}
        fields = {n: arrays[n] for n in cls.__dataclass_fields__ if n != "columns"}
        return cls(**fields, columns=columns)
