"""What QuPath's importer does with a GeoJSON file, without QuPath.

The rules are those of QuPath 0.6 to 0.8 (`PathIO.readObjects`, `QuPathTypeAdapters`, `ROITypeAdapters`,
`GsonTools`): an *error* costs the whole file, an object, or what its writer meant by it; a *warning* does
no harm today. The file is read feature by feature, so memory follows the largest feature, and 16 bytes an
object to find ids used twice.
"""

from __future__ import annotations

import gzip
import math
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from wsitk.errors import SourceError
from wsitk.json_stream import JsonReader, features, open_text

__all__ = ["Finding", "Report", "check_geojson"]

_EXAMPLES = 5  # findings kept for each rule; all are counted
_GRID = 0.01
_BATCH = 2048
_EXTENSIONS = (".json", ".geojson", ".json.gz", ".geojson.gz")
_OBJECT_TYPES = {"annotation", "detection", "cell", "tile", "tmacore", "root"}
_GEOMETRIES = {"Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString", "MultiLineString"}
_NUMBER_WORDS = {"NaN", "inf", "-inf", "Infinity", "-Infinity"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: its rule, whether it is an ``error`` or a ``warning``, and where."""

    rule: str
    severity: str
    feature: int | None
    message: str


@dataclass(frozen=True)
class Report:
    """What a check found. `counts` has all findings by rule, `findings` the first few of each."""

    path: str
    features: int
    errors: int
    objects: Mapping[str, int]
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Tell whether QuPath imports every object as it is meant."""
        return not self.errors

    def lines(self) -> Iterator[str]:
        """Yield the report as a person reads it."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.objects.items())) or "no objects"
        verdict = "imports" if self.ok else "DOES NOT IMPORT as meant"
        yield f"{self.path}: {verdict}; {self.features} features ({kinds})"
        for finding in self.findings:
            place = "file" if finding.feature is None else f"feature {finding.feature}"
            yield f"  {finding.severity} {finding.rule}, {place}: {finding.message}"
        for rule, count in sorted(self.counts.items()):
            shown = sum(f.rule == rule for f in self.findings)
            if count > shown:
                yield f"  … and {count - shown} more of {rule}"


def check_geojson(path: str | Path) -> Report:
    """Return what QuPath would make of `path`; a bad file is a finding, never an exception.

    Raises FileNotFoundError if there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a .geojson or .geojson.gz")
    check = _Check()
    if not file.name.lower().endswith(_EXTENSIONS):
        check.error("extension", None, f"QuPath reads {', '.join(_EXTENSIONS)} only; rename the file")
    try:
        with open_text(file) as stream:
            for feature in features(JsonReader(stream)):
                check.feature(feature)
    except SourceError as error:
        check.error("json" if error.code == "WSI190" else "top-level", None, error.message)
    except RecursionError:
        check.error("json", None, "nested too deeply to be read")
    except UnicodeDecodeError as error:
        check.error("encoding", None, f"not UTF-8: {error.reason} at byte {error.start}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        check.error("gzip", None, f"the compressed data are broken or cut short ({error})")
    return check.report(file)


@dataclass
class _Check:
    """Collects findings; outlines wait until there are enough of them for one call to GEOS."""

    features: int = 0
    errors: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    _ids: list[bytes] = field(default_factory=list)
    _packed: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _outlines: list[tuple[int, Any]] = field(default_factory=list)

    def error(self, rule: str, feature: int | None, message: str) -> None:
        self._add(rule, "error", feature, message)

    def warning(self, rule: str, feature: int | None, message: str) -> None:
        self._add(rule, "warning", feature, message)

    def _add(self, rule: str, severity: str, feature: int | None, message: str) -> None:
        self.counts[rule] += 1
        self.errors += severity == "error"
        if self.counts[rule] <= _EXAMPLES:
            self.findings.append(Finding(rule, severity, feature, message))

    def report(self, file: Path) -> Report:
        """Return everything found, after the checks that need all features."""
        self._reduce()
        self._pack_ids()
        if self._packed:
            ids = np.concatenate(self._packed)
            twice = len(ids) - len(np.unique(ids))
            if twice:
                self.error(
                    "duplicate-id", None, f"{twice} ids are used again: QuPath asks what to do, or drops them"
                )
        if not self.features and not self.findings:
            self.warning("empty", None, "no features")
        return Report(
            str(file),
            self.features,
            self.errors,
            dict(self.objects),
            dict(self.counts),
            tuple(self.findings),
        )

    def feature(self, value: Any) -> None:
        """Check one element of the collection."""
        row = self.features
        self.features += 1
        if isinstance(value, list):
            for item in value:  # QuPath goes into lists of lists
                self.feature(item)
            return
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in _GEOMETRIES:
            self.warning("bare-geometry", row, f"a bare {kind} becomes an annotation without class")
            self._geometry(row, value)
        elif kind != "Feature":
            self.error("feature-type", row, f"type {kind!r}, wanted 'Feature': QuPath leaves it out")
        else:
            self._feature(row, value)

    def _feature(self, row: int, value: dict[str, Any]) -> None:
        self._id(row, value.get("id"))
        properties = value.get("properties")
        if not isinstance(properties, dict):
            if properties is not None:
                self.error(
                    "properties", row, f"properties is a {type(properties).__name__}, wanted an object"
                )
            properties = {}
        self._object_type(row, value, properties)
        self._classification(row, properties.get("classification"))
        self._measurements(row, properties.get("measurements"))
        self._metadata(row, properties.get("metadata"))
        self._geometry(row, value.get("geometry"))
        if "nucleusGeometry" in value:
            self._geometry(row, value["nucleusGeometry"])

    def _id(self, row: int, name: Any) -> None:
        if name is None:
            self.warning("id", row, "no id: a fresh one at every import")
            return
        try:
            self._ids.append(uuid.UUID(str(name)).bytes)
        except ValueError:
            self.error("id", row, f"id {str(name)[:60]!r} is no UUID: QuPath replaces it")
        if len(self._ids) >= _BATCH:
            self._pack_ids()

    def _pack_ids(self) -> None:
        """Move ids from Python objects to 16 bytes each."""
        if self._ids:
            self._packed.append(np.frombuffer(b"".join(self._ids), "V16"))
            self._ids.clear()

    def _object_type(self, row: int, value: dict[str, Any], properties: dict[str, Any]) -> None:
        """Missing or unknown types become annotations: heavy, and not what was meant."""
        aliases = ("objectType", "object_type", "type")
        kind = next((properties[a] for a in aliases if a in properties), None)
        if kind is None:
            outside = next((a for a in aliases[:2] if a in value), None)
            where = f"; `{outside}` stands outside `properties`" if outside else ""
            self.error("object-type", row, f"no objectType in properties{where}: it becomes an annotation")
        elif not isinstance(kind, str) or kind.lower() not in _OBJECT_TYPES:
            self.error("object-type", row, f"objectType {kind!r} is unknown: it becomes an annotation")
        elif kind.lower() == "tmacore":
            self.error("object-type", row, "TMA cores are not imported")
        self.objects[kind.lower() if isinstance(kind, str) else "annotation"] += 1

    def _classification(self, row: int, kind: Any) -> None:
        if kind is None:
            return
        names = [kind]
        if isinstance(kind, dict):
            if "color" not in kind and "colorRGB" not in kind:
                self.error(
                    "class-color", row, "a classification without `color`: QuPath refuses the whole file"
                )
            elif kind.get("color") is not None:
                self._color(row, kind["color"])
            names = kind["names"] if isinstance(kind.get("names"), list) else [kind.get("name")]
        for name in names:
            if not isinstance(name, str) or not name.strip():
                self.error("class-name", row, f"class name {name!r}, wanted text")
            elif re.search(r"[\r\n]", name) or (len(names) > 1 and ":" in name):
                self.error("class-name", row, f"class name {name!r} holds a character that QuPath forbids")

    def _color(self, row: int, color: Any) -> None:
        """Accept [r, g, b], [r, g, b, a], [packed] and, as QuPath does, a packed integer."""
        values = color if isinstance(color, list) else [color]
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        if (
            not whole
            or len(values) not in (1, 3, 4)
            or (len(values) > 1 and not all(0 <= v <= 255 for v in values))
        ):
            self.error("class-color", row, f"color {color!r}, wanted [red, green, blue] of 0 to 255")

    def _measurements(self, row: int, values: Any) -> None:
        if values is None:
            return
        if isinstance(values, list):
            pairs = [(v.get("name"), v.get("value")) if isinstance(v, dict) else (None, v) for v in values]
            self.warning("measurements", row, "measurements as a list is QuPath's old form; write a map")
        elif isinstance(values, dict):
            pairs = list(values.items())
        else:
            self.error("measurements", row, f"measurements is a {type(values).__name__}, wanted a map")
            return
        for name, value in pairs:
            self._measurement(row, name, value)

    def _measurement(self, row: int, name: Any, value: Any) -> None:
        if isinstance(value, str) and value in _NUMBER_WORDS:
            self.warning("measurement-nan", row, f"{name!r} is {value!r}: not read by QuPath before 0.5")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            self.error("measurement-type", row, f"{name!r} is {value!r}, wanted a number: QuPath skips it")
        elif not math.isfinite(value):
            self.error("measurement-nan", row, f"{name!r} is {value!r}, which is not JSON; leave it out")

    def _metadata(self, row: int, values: Any) -> None:
        if values is None:
            return
        if not isinstance(values, dict) or any(isinstance(v, (dict, list)) for v in values.values()):
            self.error("metadata", row, "metadata must be a flat map of text")

    def _geometry(self, row: int, value: Any) -> None:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "GeometryCollection":
            self.error("geometry-type", row, "GeometryCollection: QuPath 0.6 and later refuse the whole file")
            return
        if kind not in _GEOMETRIES:
            self.error(
                "geometry-type", row, f"geometry {kind!r}, wanted one of {', '.join(sorted(_GEOMETRIES))}"
            )
            return
        rings, problem = _positions(str(kind), value.get("coordinates"))
        if problem:
            self.error(problem[0], row, problem[1])
        elif kind in ("Polygon", "MultiPolygon"):
            self._outlines.append((row, rings))
            if len(self._outlines) >= _BATCH:
                self._reduce()

    def _reduce(self) -> None:
        """Do QuPath's reduction to 0.01 px: one outline that fails costs the whole import."""
        rows = [row for row, _ in self._outlines]
        outlines = np.array([_polygon(rings) for _, rings in self._outlines], dtype=object)
        self._outlines.clear()
        try:
            reduced = shapely.set_precision(outlines, _GRID)
        except shapely.errors.GEOSException:
            reduced = np.array(
                [self._reduced(*pair) for pair in zip(rows, outlines, strict=True)], dtype=object
            )
        for at in np.flatnonzero(~(shapely.area(reduced) > 0) & ~shapely.is_missing(reduced)):
            self.error("precision", rows[at], "nothing is left of it on QuPath's grid of 0.01 px")
        for at in np.flatnonzero(~shapely.is_valid(outlines) & (shapely.area(reduced) > 0)):
            self.warning("validity", rows[at], shapely.is_valid_reason(outlines[at]))

    def _reduced(self, row: int, outline: Any) -> Any:
        """Return one outline reduced, or None after noting that it cannot be."""
        try:
            return shapely.set_precision(outline, _GRID)
        except shapely.errors.GEOSException as error:
            self.error("precision", row, f"'Reduction failed, possible invalid input' ({error})")
            return None


_Rings = list[list[Any]]  # parts of rings of (n, 2) positions
_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}


def _positions(kind: str, coordinates: Any) -> tuple[_Rings, tuple[str, str] | None]:
    """Return coordinates as parts of rings, and the rule and message of the first thing wrong with them."""
    nested = coordinates
    for _ in range(3 - _DEPTH[kind]):
        nested = [nested]
    if not isinstance(nested, list) or not all(isinstance(part, list) for part in nested):
        return [], ("coordinates", f"coordinates of a {kind} are not nested as they should be")
    parts: _Rings = []
    for part in nested:
        parts.append([])
        for ring in part:
            positions, problem = _ring(ring, closed=kind.endswith("Polygon"))
            if problem:
                return [], problem
            parts[-1].append(positions)
    if kind.endswith("Polygon") and not (parts and all(parts)):
        return [], ("ring-length", "no rings at all")
    return parts, None


def _ring(ring: Any, closed: bool) -> tuple[Any, tuple[str, str] | None]:
    """Return one list of positions as (n, 2) numbers, and what is wrong with it."""
    try:
        positions = np.array(ring)
    except ValueError:  # positions of different length
        positions = np.array(0)
    if positions.ndim != 2 or positions.shape[1] < 2 or positions.dtype.kind not in "if":
        return None, ("coordinates", f"{str(ring)[:60]} are no positions")
    if not np.isfinite(positions).all():
        return None, ("coordinate-nan", "a position is not finite: QuPath refuses the whole file")
    if closed and len(positions) < 4:
        return None, (
            "ring-length",
            f"a ring of {len(ring)} positions, wanted 4 or more: the whole file is refused",
        )
    if closed and (positions[0, :2] != positions[-1, :2]).any():
        return None, (
            "ring-closure",
            f"a ring from {ring[0]} to {ring[-1]} is open: the whole file is refused",
        )
    return positions[:, :2], None


def _polygon(parts: _Rings) -> Any:
    """Return the shapely form of parts of rings."""
    polygons = [shapely.polygons(p[0], [shapely.linearrings(r) for r in p[1:]] or None) for p in parts]
    return polygons[0] if len(polygons) == 1 else shapely.multipolygons(polygons)
