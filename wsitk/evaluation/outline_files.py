"""Outlines from files: our own `objects.parquet`, GeoJSON as QuPath writes it, and points in a CSV."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.evaluation.labels import Outlines, Packed, PackedOutlines

__all__ = ["read_objects", "read_geojson", "read_points"]

Array = NDArray[Any]

_PIECE = 16_384  # shapes that exist as Python objects at once
_GROUPS = 8  # row groups of an objects.parquet that stay in memory: about 4 MB each


def read_objects(path: Path) -> Outlines:
    """Return the objects of an `objects.parquet` of wsitk; polygons stay in the file until they are asked for.

    Raises OutputError (WSI515) for a file that is none.
    """
    return _Stored(path)


@final
class _Stored(Outlines):
    """Outlines in an `objects.parquet`: 60 bytes in memory for each, and some row groups of polygons."""

    def __init__(self, path: Path) -> None:
        from wsitk.writers.parquet import ObjectsFile

        self._path = path
        with ObjectsFile(path) as file:
            names = tuple(c.name for c in file.classes)
            columns = ["class_id", "centroid_x", "centroid_y", "bbox"]
            parts: list[tuple[Array, Array, Array]] = []
            sizes = [0]
            for group in file.groups(columns):
                box = np.stack([v.to_numpy() for v in group["bbox"].combine_chunks().flatten()], axis=1)
                centre = np.stack([group[n].to_numpy() for n in ("centroid_x", "centroid_y")], axis=1)
                parts.append((box, centre, group["class_id"].to_numpy().astype(np.int64)))
                sizes.append(len(group))
        self._first = np.cumsum(sizes)
        empty = (np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0, np.int64))
        bounds, centres, kinds = (np.concatenate(p) for p in zip(empty, *parts, strict=True))
        super().__init__(
            bounds,
            centres,
            kinds,
            names,
            declared=True,
            spacing_um=_spacing(path.with_name("provenance.json")),
            source=f"{path.parent.name}/{path.name}: {len(kinds):,} polygons, {', '.join(names)}",
        )
        self._group = lru_cache(maxsize=_GROUPS)(self._read_group)

    @property
    def has_areas(self) -> bool:
        return True

    def polygons(self, rows: Array) -> NDArray[np.object_]:
        import shapely

        found = np.full(len(rows), None, object)
        where = np.searchsorted(self._first, rows, side="right") - 1
        for group in np.unique(where):
            mine = where == group
            found[mine] = shapely.from_wkb(self._group(int(group))[rows[mine] - self._first[group]])
        return found

    def _read_group(self, group: int) -> Array:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._path) as file:
            table = file.read_row_group(group, columns=["geometry"], use_threads=False)
        return np.asarray(table["geometry"].to_numpy(zero_copy_only=False), object)


def _spacing(provenance: Path) -> float | None:
    """Return the pixel size of level 0 that a run noted, in µm; None if there is no such note."""
    if not provenance.is_file():
        return None
    try:
        stated = json.loads(provenance.read_bytes())["spacing_um"]
    except (ValueError, KeyError, TypeError):
        return None
    return float(np.mean(stated)) if stated else None


def read_geojson(path: Path) -> Outlines:
    """Return the polygons or points of a GeoJSON file, with the class names that QuPath gave them.

    Invalid polygons are mended (shapely's `make_valid`), and `source` says how many. Raises SourceError: WSI190 and
    WSI191 for broken files, WSI822 for features that are neither polygons nor points, or both.
    """
    kinds = array("l")
    names: dict[str, int] = {}
    pieces: list[Packed] = []
    mended = 0
    for batch in _batches(_features(path)):
        kinds.extend(names.setdefault(name, len(names)) if name else -1 for name, _ in batch)
        shapes, broken = _shapes([geometry for _, geometry in batch], path)
        pieces.append(Packed.of(shapes))
        mended += broken
    if len({p.has_areas for p in pieces}) > 1:
        raise _mixed(path)
    said = f"{path.name}: {len(kinds):,} shapes" + (f", {mended} invalid ones mended" if mended else "")
    typed = bool(names) or not kinds
    return PackedOutlines(pieces, np.array(kinds, np.int64), tuple(names), typed=typed, source=said)


def _batches(features: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    while batch := list(islice(features, _PIECE)):
        yield batch


def _features(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield class name and geometry (as JSON) of each feature."""
    import orjson

    from wsitk.json_stream import JsonReader, features, open_text

    try:
        with open_text(path) as stream:
            for feature in features(JsonReader(stream)):
                properties = feature.get("properties") or {}
                kind = properties.get("classification") or properties.get("class") or ""
                name = kind.get("name", "") if isinstance(kind, dict) else kind
                if feature.get("geometry") is None:
                    raise SourceError("WSI822", f"{path}: a feature has no geometry; export it again")
                yield str(name), orjson.dumps(feature["geometry"])
    except SourceError as error:
        if str(path) in error.message:
            raise
        raise SourceError(error.code, f"{path}: {error.message}") from error
    except (OSError, EOFError, UnicodeDecodeError, AttributeError) as error:
        raise SourceError("WSI821", f"{path}: can't be read ({error}); is the file whole?") from error


def _shapes(blobs: list[bytes], path: Path) -> tuple[Array, int]:
    """Return valid polygons or points from GeoJSON geometries, and how many had to be mended."""
    import shapely

    try:
        shapes = np.asarray(shapely.from_geojson(np.array(blobs, object)), object)
    except (shapely.errors.ShapelyError, ValueError) as error:
        raise SourceError("WSI822", f"{path}: a geometry is no GeoJSON ({error})") from error
    broken = ~shapely.is_valid(shapes)
    shapes[broken] = [_polygonal(s) for s in shapely.make_valid(shapes[broken])]
    dimensions = set(shapely.get_dimensions(shapes).tolist())
    if dimensions - {0, 2} or len(dimensions) > 1:
        raise _mixed(path)
    return shapes, int(broken.sum())


def _mixed(path: Path) -> SourceError:
    return SourceError(
        "WSI822", f"{path}: mixes points, lines and polygons; export one kind of object (QuPath: detections)"
    )


def _polygonal(shape: Any) -> Any:
    """Return what has an area in a mended shape; the loose lines that mending leaves have none."""
    import shapely

    if shapely.get_dimensions(shape) < 2 or shape.geom_type != "GeometryCollection":
        return shape
    return shapely.union_all([part for part in shape.geoms if part.area > 0])


def read_points(path: Path) -> Outlines:
    """Return the points of a CSV with the columns x, y and, where there are classes, class; in pixels.

    ``centroid_x`` and ``centroid_y`` are understood too. Raises SourceError (WSI838) for other columns or values.
    """
    import pyarrow as pa
    import shapely
    from pyarrow import csv

    try:
        table = csv.read_csv(path)
        held = table.column_names
        pair = next((p for p in (("x", "y"), ("centroid_x", "centroid_y")) if set(held) >= set(p)), None)
        if pair is None:
            raise SourceError("WSI838", f"{path}: columns {sorted(held)}; wanted x, y and perhaps class")
        xy = np.stack([table[c].cast(pa.float64()).to_numpy() for c in pair], axis=1)
    except pa.ArrowException as error:
        said = str(error).split("\n")[0]
        raise SourceError("WSI838", f"{path}: not a table of points ({said})") from error
    if not np.isfinite(xy).all():
        raise SourceError("WSI838", f"{path}: a coordinate is missing or not finite")
    kinds = np.full(len(xy), -1)
    names: tuple[str, ...] = ()
    if "class" in held:
        words = table["class"].cast(pa.string()).fill_null("").to_numpy()
        names = tuple(sorted(set(words) - {""}))
        kinds = np.array([*range(len(names)), -1])[np.searchsorted([*names, "\U0010ffff"], words)]
        kinds[words == ""] = -1
    return PackedOutlines(
        [Packed.of(shapely.points(xy))], kinds, names, typed=bool(names) or not len(xy),
        source=f"{path.name}: {len(xy):,} points",
    )  # fmt: skip
