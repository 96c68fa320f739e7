"""`objects.geojson.gz`: the QuPath view of `objects.parquet`, streamed.

QuPath refuses a whole file for one bad object, so every outline is brought onto its grid of 0.01 px here
and must be valid there; what cannot be repaired is dropped and counted. The parquet stays the record:
measurements are written with five significant digits, coordinates with two decimals.
"""

from __future__ import annotations

import re
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.model import ObjectClass
from wsitk.writers.base import atomic_file
from wsitk.writers.gz import GzipStream
from wsitk.writers.parquet import ObjectsFile

__all__ = ["GeoJsonCounts", "write_geojson", "fit_to_grid", "measurement_name"]

Array = NDArray[Any]

GRID = 0.01  # px: the precision to which QuPath 0.6 and later reduces what it reads
_MIN_WIDTH = 5 * GRID  # 2 * area / perimeter; thinner than this may collapse on the grid
_ROWS = 4096  # objects turned into text at a time
_UNREADABLE = b'{"name":"Unreadable*","color":[180,180,180]}'
_NAMES = {"probability": "Detection probability", "area_um2": "Area µm^2", "perimeter_um": "Perimeter µm"}
_UNITS = (("_um2", " µm^2"), ("_um", " µm"), ("_px", " px"))


@dataclass(frozen=True, slots=True)
class GeoJsonCounts:
    """What became of the objects: `written` includes `repaired`; `dropped` had no area on the grid."""

    written: int
    repaired: int
    dropped: int
    annotations: int


def write_geojson(
    objects: str | Path,
    out: str | Path,
    *,
    classes: Sequence[ObjectClass] | None = None,
    bounds_xy: tuple[float, float] = (0.0, 0.0),
    unreadable: Sequence[Region] = (),
    restored_apart: bool = False,
    overwrite: bool = False,
) -> GeoJsonCounts:
    """Write the table `objects` as a gzipped FeatureCollection that QuPath imports, and count.

    Parameters
    ----------
    objects, out
        An `objects.parquet`, and the file to make.
    classes
        Names and colours, if others than those in the table are wanted.
    bounds_xy
        OpenSlide's ``bounds-x`` and ``bounds-y``: QuPath shows slides cropped to them.
    unreadable
        Level-0 boxes (y, x) that nobody could read; they become locked ``Unreadable*`` annotations.
    restored_apart
        Whether objects in restored pixels get a class derived from theirs, ``Tumor: Restored``: QuPath counts and
        hides it apart.

    Raises OutputError: WSI510 to WSI512, WSI515, and WSI516 for a class name that QuPath cannot hold.
    """
    written = repaired = dropped = 0
    with ObjectsFile(objects) as table, atomic_file(out, overwrite=overwrite) as stream:
        kinds = classes or table.classes
        labels = [_classification(c) for c in kinds]
        apart = [_classification(_restored(c)) for c in kinds] if restored_apart else labels
        encoder = _Encoder(labels, apart, ("probability", "area_um2", "perimeter_um", *table.columns))
        with GzipStream(stream) as target:
            target.write(b'{"type":"FeatureCollection","features":[\n')
            notes = list(_annotations(unreadable, bounds_xy))
            target.write(b",\n".join(notes))
            empty = not notes
            for rows, geometry, changed in _prepared(table, bounds_xy):
                keep = ~shapely.is_missing(geometry)
                repaired += int((changed & keep).sum())
                dropped += int((~keep).sum())
                features = encoder.encode(rows.filter(pa.array(keep)), geometry[keep])
                if features:
                    target.write((b"" if empty else b",\n") + b",\n".join(features))
                    empty = False
                written += len(features)
            target.write(b"\n]}\n")
    return GeoJsonCounts(written, repaired, dropped, len(notes))


def _prepared(table: ObjectsFile, shift_xy: tuple[float, float]) -> Iterator[tuple[pa.Table, Array, Array]]:
    """Yield rows with their fitted outlines, in order; GEOS works ahead in other threads, without the GIL."""

    def fit(rows: pa.Table) -> tuple[pa.Table, Array, Array]:
        return rows, *fit_to_grid(shapely.from_wkb(rows["geometry"].to_numpy()), shift_xy)

    waiting: deque[Future[tuple[pa.Table, Array, Array]]] = deque()
    with ThreadPoolExecutor(2, thread_name_prefix="wsitk-geojson") as pool:
        for group in table.groups():
            for first in range(0, len(group), _ROWS):
                waiting.append(pool.submit(fit, group.slice(first, _ROWS)))
                if len(waiting) > 3:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def measurement_name(column: str) -> str:
    """Return the name that QuPath's users know a column by: ``max_diameter_um`` -> ``Max diameter µm``."""
    if column in _NAMES:
        return _NAMES[column]
    if column.startswith("uncertainty_"):
        return "Uncertainty: " + column.removeprefix("uncertainty_").replace("_", " ")
    if column.startswith("probability_"):
        return "Probability: " + column.removeprefix("probability_").replace("_", " ")
    for suffix, unit in _UNITS:
        if column.endswith(suffix):
            return _sentence(column.removesuffix(suffix)) + unit
    return _sentence(column)


def _sentence(column: str) -> str:
    words = column.replace("_", " ")
    return words[:1].upper() + words[1:]


def fit_to_grid(
    geometry: Array, shift_xy: tuple[float, float] = (0.0, 0.0)
) -> tuple[Array, NDArray[np.bool_]]:
    """Return polygons minus `shift_xy`, on the 0.01 px grid and valid there, and which needed repair.

    Rounding is enough for nearly all; the others go through GEOS's own reduction, the one QuPath applies.
    None stands where no area is left.
    """
    xy = shapely.get_coordinates(geometry)
    moved = shapely.set_coordinates(geometry.copy(), np.rint((xy - shift_xy) / GRID) * GRID)
    length = shapely.length(moved)
    wide = 2 * shapely.area(moved) > _MIN_WIDTH * length
    good = shapely.is_valid(moved) & wide & np.isin(shapely.get_type_id(moved), (3, 6))
    for row in np.flatnonzero(~good):
        moved[row] = _repair(geometry[row], shift_xy)
    return moved, ~good


def _repair(geometry: shapely.Geometry | None, shift_xy: tuple[float, float]) -> shapely.Geometry | None:
    """Return the polygonal part of a geometry after reduction to the grid; None if there is no area."""
    if geometry is None or not np.isfinite(shapely.get_coordinates(geometry)).all():
        return None
    shifted = shapely.transform(geometry, lambda xy: xy - shift_xy)
    # part by part: repaired together, overlapping parts would lose what they share
    try:
        whole = shapely.union_all(shapely.make_valid(shapely.get_parts(shifted)))
        reduced = shapely.set_precision(whole, GRID)
    except shapely.errors.GEOSException:
        return None  # QuPath's reduction would fail too; the caller counts it
    parts = [
        p for p in shapely.get_parts(shapely.get_parts(reduced)) if p.geom_type == "Polygon" and p.area > 0
    ]
    if not parts:
        return None
    kept = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return kept if shapely.is_valid(kept) else None


class _Encoder:
    """Turns row groups into features: bytes are formatted column by column, joined row by row."""

    def __init__(self, labels: Sequence[bytes], restored: Sequence[bytes], columns: Sequence[str]) -> None:
        self._labels = labels, restored
        self._columns = {name: orjson.dumps(measurement_name(name)) + b":" for name in columns}

    def encode(self, rows: pa.Table, geometry: Array) -> list[bytes]:
        """Return one feature for each row, without separators."""
        if not len(geometry):
            return []
        kinds = rows["class_id"].to_numpy()
        flags = self._flags(rows)
        return [
            b'{"type":"Feature","id":"%b","geometry":%b,"properties":{"objectType":"detection",'
            b'"classification":%b,"measurements":{%b}%b}}'
            % (name, outline, self._labels[doubtful][kind], values, flag)
            for name, outline, kind, doubtful, values, flag in zip(
                _ids(rows["id"]),
                _outlines(geometry),
                kinds.tolist(),
                rows["restored"].to_pylist(),
                self._measurements(rows),
                flags,
                strict=True,
            )
        ]

    def _measurements(self, rows: pa.Table) -> Iterator[bytes]:
        """Yield the inside of each row's measurement map; a value that is no number is left out."""
        tokens = [_tokens(rows[name].to_numpy(), label) for name, label in self._columns.items()]
        for row in zip(*tokens, strict=True):
            yield b",".join(row) if all(row) else b",".join(filter(None, row))

    @staticmethod
    def _flags(rows: pa.Table) -> list[bytes]:
        """Return what follows the measurements: metadata, for the few rows that carry a flag."""
        names = ("touches_unreadable", "restored")
        flags = np.stack([rows[n].to_numpy() for n in names], axis=1)
        out = [b""] * len(flags)
        for row in np.flatnonzero(flags.any(axis=1)).tolist():
            marks = {n: "true" for n, flag in zip(names, flags[row], strict=True) if flag}
            out[row] = b',"metadata":' + orjson.dumps(marks)
        return out


def _ids(column: pa.ChunkedArray) -> list[bytes]:
    return [str(name).encode() for name in column.to_pylist()]


def _tokens(values: Array, label: bytes) -> list[bytes]:
    """Return ``label + number`` for each value, five significant digits; empty where not finite."""
    numbers = values.astype(np.float64)
    usable = np.isfinite(numbers) & (numbers != 0)
    exponent = np.floor(np.log10(np.abs(numbers, where=usable, out=np.ones_like(numbers))))
    scale = 10.0 ** (4 - exponent)
    rounded = np.where(usable, np.rint(numbers * scale) / scale, numbers)
    text = orjson.dumps(rounded.astype(np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return [b"" if t == b"null" else label + t for t in text[1:-1].split(b",")]


def _outlines(geometry: Array) -> Iterator[bytes]:
    """Yield each polygon or multipolygon as compact GeoJSON."""
    from wsitk.writers.digits import ring_text  # compiles; only when there is something to write

    parts, owner = shapely.get_parts(geometry, return_index=True)
    _, xy, (ring_stop, part_stop) = shapely.to_ragged_array(parts)
    hundredths = np.rint(xy / GRID).astype(np.int64)
    buffer, ends = ring_text(hundredths, np.asarray(ring_stop, np.int64))
    text, stops = buffer.tobytes(), ends.tolist()
    rings = np.asarray(part_stop).tolist()
    if len(parts) == len(geometry) == len(stops) - 1:  # nearly always: one ring each
        yield from (b'{"type":"Polygon","coordinates":[%b]}' % text[a:b] for a, b in pairwise(stops))
        return
    first = np.searchsorted(owner, np.arange(len(geometry) + 1)).tolist()
    for low, high in pairwise(first):
        polygons = [
            b"[" + b",".join([text[stops[r] : stops[r + 1]] for r in range(rings[p], rings[p + 1])]) + b"]"
            for p in range(low, high)
        ]
        if high - low == 1:
            yield b'{"type":"Polygon","coordinates":%b}' % polygons[0]
        else:
            yield b'{"type":"MultiPolygon","coordinates":[%b]}' % b",".join(polygons)


def _classification(kind: ObjectClass) -> bytes:
    """Return QuPath's class: always with a colour, without which the importer refuses the file."""
    if not kind.name.strip() or re.search(r"[\r\n]", kind.name):
        raise OutputError(
            "WSI516",
            f"class name {kind.name!r}: QuPath holds no empty name and no line break; rename the class",
        )
    return orjson.dumps({"name": kind.name, "color": list(kind.color)})


def _restored(kind: ObjectClass) -> ObjectClass:
    """Return the class of objects of a kind in restored pixels: derived from it, and paler."""
    red, green, blue = (round(255 - 0.5 * (255 - c)) for c in kind.color)
    return ObjectClass(f"{kind.name}: Restored", (red, green, blue))


def _annotations(regions: Sequence[Region], bounds_xy: tuple[float, float]) -> Iterator[bytes]:
    """Yield the union of `regions` as locked annotations: neighbouring tiles become one."""
    if not regions:
        return
    boxes = shapely.box(*np.array([[*r.start[::-1], *r.stop[::-1]] for r in regions], np.float64).T)
    union, _ = fit_to_grid(np.array([shapely.union_all(boxes)]), bounds_xy)
    parts = shapely.get_parts(shapely.normalize(union))
    for outline, name in zip(_outlines(parts), _region_ids(parts), strict=True):
        yield (
            b'{"type":"Feature","id":"%b","geometry":%b,"properties":{"objectType":"annotation",'
            b'"classification":%b,"name":"Unreadable","isLocked":true}}' % (name, outline, _UNREADABLE)
        )


def _region_ids(parts: Array) -> list[bytes]:
    """Return stable ids of annotations: from their own outline."""
    space = uuid.uuid5(uuid.NAMESPACE_URL, "urn:wsitk:unreadable")
    return [str(uuid.uuid5(space, p.wkt)).encode() for p in parts]
