"""`objects.parquet`: a row per object, as GeoParquet 1.1 with polygons in level-0 pixels.

Rows are buffered to groups of fixed size, so that neither memory nor bytes depend on how many rows there
are or in what batches they come. The file holds no time and no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.model import ObjectClass
from wsitk.writers.base import atomic_file

__all__ = ["ObjectRows", "ObjectWriter", "ObjectsFile", "ROW_GROUP"]

Array = NDArray[Any]

ROW_GROUP = 16_384  # rows held in memory at once: about 8 MB, and the unit of reading back
_FIXED = {
    "class_id": pa.int16(),
    "probability": pa.float32(),
    "centroid_x": pa.float64(),
    "centroid_y": pa.float64(),
    "area_um2": pa.float32(),
    "perimeter_um": pa.float32(),
}
_FLAGS = ("touches_unreadable", "restored")
_BBOX = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class ObjectRows:
    """N objects ready to be written.

    Attributes
    ----------
    id : S36 (N,)
        From `wsitk.writers.ids.object_ids`.
    class_id : int (N,)
        Position in the writer's `classes`.
    probability : float (N,)
        0 to 1.
    centroid_xy : float64 (N, 2)
        In level-0 pixels.
    area_um2, perimeter_um : float (N,)
    geometry : object (N,)
        Shapely polygons or multipolygons, x right and y down, in level-0 pixels.
    touches_unreadable, restored : bool (N,)
    columns : name -> float (N,)
        Exactly the writer's `columns`.
    """

    id: Array
    class_id: Array
    probability: Array
    centroid_xy: Array
    area_um2: Array
    perimeter_um: Array
    geometry: Array
    touches_unreadable: Array
    restored: Array
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.id)

    @classmethod
    def empty(cls, columns: Sequence[str] = ()) -> ObjectRows:
        """Return a table without rows."""
        none = np.zeros(0, np.float32)
        flag = np.zeros(0, bool)
        return cls(
            id=np.zeros(0, "S36"),
            class_id=np.zeros(0, np.int16),
            probability=none,
            centroid_xy=np.zeros((0, 2)),
            area_um2=none,
            perimeter_um=none,
            geometry=np.zeros(0, object),
            touches_unreadable=flag,
            restored=flag,
            columns=dict.fromkeys(columns, none),
        )


@final
class ObjectWriter:
    """Streams `ObjectRows` into one GeoParquet 1.1 file; use it as a context manager.

    `write` may be called any number of times; the file appears under its name when the block ends well,
    and not at all if it ends with an exception. `notes` is stored as JSON under the key ``wsitk``, beside
    the classes. Raises OutputError: WSI510 to WSI512 as `atomic_file`, WSI514 for rows that do not fit.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[ObjectClass],
        columns: Sequence[str] = (),
        *,
        notes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.classes = tuple(classes)
        self.columns = tuple(columns)
        self.count = 0
        self._schema = _schema(self.columns)
        if len({c.name for c in self.classes}) != len(self.classes):
            raise OutputError("WSI514", f"class names repeat: {[c.name for c in self.classes]}; rename them")
        self._notes = dict(notes or {})
        self._pending: list[pa.Table] = []
        self._waiting = 0
        self._types: set[int] = set()
        self._bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
        with ExitStack() as stack:
            stream = stack.enter_context(atomic_file(self.path, overwrite=overwrite))
            self._sink = pq.ParquetWriter(
                stream,
                self._schema,
                compression="zstd",
                compression_level=3,
                use_dictionary=["class"],
                write_page_index=True,
            )
            stack.callback(self._sink.close)  # before its stream, also when a batch fails
            self._stack = stack.pop_all()

    def write(self, rows: ObjectRows) -> None:
        """Append `rows` in the order given."""
        self._check(rows)
        if not len(rows):
            return
        bounds = shapely.bounds(rows.geometry)
        self._bounds[:2] = np.minimum(self._bounds[:2], bounds[:, :2].min(axis=0))
        self._bounds[2:] = np.maximum(self._bounds[2:], bounds[:, 2:].max(axis=0))
        self._types |= set(np.unique(shapely.get_type_id(rows.geometry)).tolist())
        self.count += len(rows)
        self._pending.append(self._table(rows, bounds))
        self._waiting += len(rows)
        if self._waiting >= ROW_GROUP:
            self._flush(keep=self._waiting % ROW_GROUP)

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._flush(keep=0)
            self._sink.add_key_value_metadata({"geo": self._geo(), "wsitk": self._extra()})
            self._sink.close()

    def _check(self, rows: ObjectRows) -> None:
        """Refuse rows that would make a file that lies."""
        if set(rows.columns) != set(self.columns):
            raise OutputError(
                "WSI514",
                f"{self.path.name}: columns {sorted(rows.columns)} given, {sorted(self.columns)} announced;"
                " announce all columns when the writer is made",
            )
        plain = [getattr(rows, f.name) for f in fields(rows) if f.name != "columns"]
        if {len(a) for a in (*plain, *rows.columns.values())} != {len(rows)}:
            raise OutputError(
                "WSI514", f"{self.path.name}: columns differ in length; give one value for each object"
            )
        if not len(rows):
            return
        if rows.class_id.min() < 0 or rows.class_id.max() >= len(self.classes):
            raise OutputError(
                "WSI514",
                f"{self.path.name}: class ids {rows.class_id.min()} to {rows.class_id.max()},"
                f" but there are {len(self.classes)} classes; check the model's card",
            )
        if not np.isfinite(shapely.bounds(rows.geometry)).all():
            raise OutputError(
                "WSI514", f"{self.path.name}: an object has no finite outline; drop or repair it first"
            )

    def _table(self, rows: ObjectRows, bounds: Array) -> pa.Table:
        """Return `rows` as an Arrow table of the file's schema."""
        # one fixed dictionary: an inferred one would depend on how the rows were batched
        names = pa.array([c.name for c in self.classes], pa.string())
        kinds = pa.DictionaryArray.from_arrays(pa.array(rows.class_id, pa.int32()), names)
        values: dict[str, Any] = {
            "id": pa.array(rows.id.astype("U36"), pa.string()),
            "class": kinds,
            "class_id": rows.class_id,
            "probability": rows.probability,
            "centroid_x": rows.centroid_xy[:, 0],
            "centroid_y": rows.centroid_xy[:, 1],
            "area_um2": rows.area_um2,
            "perimeter_um": rows.perimeter_um,
            **{name: rows.columns[name] for name in self.columns},
            **{name: getattr(rows, name) for name in _FLAGS},
            "geometry": shapely.to_wkb(rows.geometry, byte_order=1),
            "bbox": pa.StructArray.from_arrays([pa.array(v) for v in bounds.T], _BBOX),
        }
        arrays = [_as_array(values[f.name], f.type) for f in self._schema]
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _flush(self, keep: int) -> None:
        """Write all waiting rows but the last `keep`, in groups of `ROW_GROUP`."""
        if not self._pending:
            return
        table = pa.concat_tables(self._pending).combine_chunks()
        done = len(table) - keep
        if done:
            self._sink.write_table(table[:done], row_group_size=ROW_GROUP)
        self._pending = [table[done:]] if keep else []
        self._waiting = keep

    def _geo(self) -> str:
        """Return the metadata of GeoParquet 1.1."""
        kinds = {3: "Polygon", 6: "MultiPolygon"}
        column = {
            "encoding": "WKB",
            "geometry_types": sorted(kinds[t] for t in self._types),
            "crs": None,  # pixels of an image are in no reference system
            "edges": "planar",
            "covering": {"bbox": {name: ["bbox", name] for name in _BBOX}},
        }
        if self.count:
            column["bbox"] = self._bounds.tolist()
        return _json({"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}})

    def _extra(self) -> str:
        classes = [{"name": c.name, "color": list(c.color)} for c in self.classes]
        return _json(self._notes | {"classes": classes, "columns": list(self.columns)})


@final
class ObjectsFile:
    """Reads an `objects.parquet` that `ObjectWriter` wrote, a row group at a time.

    Raises OutputError (WSI515) if the file is not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(self.path)
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                "WSI515", f"{self.path}: cannot be read as Parquet ({error}); run again with --overwrite"
            ) from error
        stored = self._file.metadata.metadata or {}
        if b"wsitk" not in stored or b"geo" not in stored:
            raise OutputError(
                "WSI515", f"{self.path}: not an objects.parquet of wsitk; give the one in an output folder"
            )
        self.notes: dict[str, Any] = json.loads(stored[b"wsitk"])
        self.classes = tuple(ObjectClass(c["name"], tuple(c["color"])) for c in self.notes["classes"])
        self.columns: tuple[str, ...] = tuple(self.notes["columns"])

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def groups(self, columns: Sequence[str] | None = None) -> Any:
        """Yield the row groups as `pyarrow.Table`s, in order, with the given columns only."""
        for index in range(self._file.num_row_groups):
            yield self._file.read_row_group(index, columns=columns, use_threads=False)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _schema(columns: Sequence[str]) -> pa.Schema:
    """Return the file's columns in their order; raises OutputError (WSI514) for a name used twice."""
    taken = {"id", "class", *_FIXED, *_FLAGS, "geometry", "bbox"}
    if len(set(columns)) != len(columns) or taken & set(columns):
        raise OutputError(
            "WSI514", f"column names {sorted(columns)} repeat, or use one of {sorted(taken)}; rename them"
        )
    box = pa.struct([pa.field(name, pa.float64(), nullable=False) for name in _BBOX])
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("class", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            *(pa.field(name, kind, nullable=False) for name, kind in _FIXED.items()),
            *(pa.field(name, pa.float32(), nullable=False) for name in columns),
            *(pa.field(name, pa.bool_(), nullable=False) for name in _FLAGS),
            pa.field("geometry", pa.binary(), nullable=False),
            pa.field("bbox", box, nullable=False),
        ]
    )


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    """Return `values` as an Arrow array of type `kind`."""
    if isinstance(values, pa.Array):
        return values
    return pa.array(np.ascontiguousarray(values), kind)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
