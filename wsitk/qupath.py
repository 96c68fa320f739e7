"""What QuPath's importer does with a GeoJSON file, without QuPath.

The rules are those of QuPath 0.6 to 0.8 (`PathIO.readObjects`, `QuPathTypeAdapters`, `ROITypeAdapters`,
`GsonTools`): an *error* costs the whole file, or an object; a *warning* is something read otherwise than
the writer meant. The file is read feature by feature, so memory follows the largest feature.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import shapely

__all__ = ["Finding", "Report", "check_geojson"]

_EXAMPLES = 5  # findings kept for each rule; all are counted
_PIECE = 1 << 20
_LARGEST = 1 << 28  # characters of one feature: beyond this the file is no list of objects
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
    objects: Mapping[str, int]
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Tell whether QuPath imports every object as it is meant."""
        return not any(f.severity == "error" for f in self.findings)

    def lines(self) -> Iterator[str]:
        """Yield the report as a person reads it."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.objects.items())) or "no objects"
        yield f"{self.path}: {'imports' if self.ok else 'DOES NOT IMPORT'}; {self.features} features ({kinds})"
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
        with _open(file) as stream:
            for feature in _features(_Reader(stream), check):
                check.feature(feature)
    except _SyntaxError as error:
        check.error("json", None, str(error))
    except RecursionError:
        check.error("json", None, "nested too deeply to be read")
    except UnicodeDecodeError as error:
        check.error("encoding", None, f"not UTF-8: {error.reason} at byte {error.start}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        check.error("gzip", None, f"the compressed data are broken or cut short ({error})")
    return check.report(file)


def _open(file: Path) -> TextIO:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8")
    return open(file, encoding="utf-8")


class _SyntaxError(Exception):
    """The text is not JSON."""


class _Reader:
    """Takes JSON values one by one from a stream, holding only the one it is at."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._done = False

    def _more(self) -> bool:
        if self._done:
            return False
        piece = self._stream.read(max(_PIECE, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        self._done = not piece
        return bool(piece)

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n\ufeff":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Consume one character out of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise _SyntaxError(f"expected one of {wanted!r}, found {found or 'the end of the file'!r}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Consume one whole value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at < _LARGEST and self._more():
                    continue
                raise _SyntaxError(
                    f"no JSON: {error.msg} near {self._text[error.pos : error.pos + 20]!r}"
                ) from error
            # a number at the end of the piece may go on in the next one
            if end == len(self._text) and self._more():
                continue
            self._at = end
            return value

    def skip(self) -> Any:
        """Consume a value and return it if it is plain text, else nothing."""
        value = self.value()
        return value if isinstance(value, str) else None


def _features(reader: _Reader, check: _Check) -> Iterator[Any]:
    """Yield the features of a file in any of the forms that QuPath takes."""
    start = reader.peek()
    if start == "[":
        yield from _elements(reader)
    elif start == "{":
        yield from _members(reader, check)
    else:
        check.error(
            "top-level", None, f"starts with {start!r}; wanted a FeatureCollection, a Feature or a list"
        )
        return
    if reader.peek():
        check.error("json", None, "there is more text after the end of the collection")


def _elements(reader: _Reader) -> Iterator[Any]:
    """Yield the elements of the array that begins here."""
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        return
    while True:
        yield reader.value()
        if reader.take(",]") == "]":
            return


def _members(reader: _Reader, check: _Check) -> Iterator[Any]:
    """Yield the features of the object that begins here: its `features`, or itself."""
    whole: dict[str, Any] = {}
    streamed = False
    reader.take("{")
    if reader.peek() == "}":
        reader.take("}")
    else:
        while True:
            key = reader.skip()
            reader.take(":")
            if key == "features" and reader.peek() == "[":
                streamed = True
                yield from _elements(reader)
            else:
                whole[str(key)] = reader.value()
            if reader.take(",}") == "}":
                break
    kind = whole.get("type")
    if streamed and kind != "FeatureCollection":
        check.error(
            "top-level", None, f"type is {kind!r}, wanted 'FeatureCollection': QuPath ignores the file"
        )
    elif not streamed and kind == "FeatureCollection":
        check.error("top-level", None, "a FeatureCollection without a list of features")
    elif not streamed:
        yield whole


@dataclass
class _Check:
    """Collects findings; outlines wait until there are enough of them for one call to GEOS."""

    features: int = 0
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
        return Report(str(file), self.features, dict(self.objects), dict(self.counts), tuple(self.findings))

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
        coordinates = value.get("coordinates")
        problem = _shape_problem(str(kind), coordinates)
        if problem:
            self.error(problem[0], row, problem[1])
            return
        if kind in ("Polygon", "MultiPolygon"):
            self._outlines.append((row, _polygon(coordinates if kind == "MultiPolygon" else [coordinates])))
            if len(self._outlines) >= _BATCH:
                self._reduce()

    def _reduce(self) -> None:
        """Do QuPath's reduction to 0.01 px: one outline that fails costs the whole import."""
        for row, outline in self._outlines:
            try:
                reduced = shapely.set_precision(outline, _GRID)
            except shapely.errors.GEOSException as error:
                self.error("precision", row, f"'Reduction failed, possible invalid input' ({error})")
                continue
            if reduced.is_empty or reduced.area == 0:
                self.error("precision", row, "nothing is left of it on QuPath's grid of 0.01 px")
            elif not shapely.is_valid(outline):
                self.warning("validity", row, shapely.is_valid_reason(outline))
        self._outlines.clear()


def _shape_problem(kind: str, coordinates: Any) -> tuple[str, str] | None:
    """Return the rule and message of the first thing wrong with nested coordinates, or None."""
    depth = {
        "Point": 0,
        "MultiPoint": 1,
        "LineString": 1,
        "MultiLineString": 2,
        "Polygon": 2,
        "MultiPolygon": 3,
    }
    level: list[Any] = [coordinates]
    for _ in range(depth[kind]):
        if not all(isinstance(v, list) for v in level):
            return "coordinates", f"coordinates of a {kind} are not nested deeply enough"
        rings, level = level, [v for part in level for v in part]
    for point in level:
        numbers = isinstance(point, list) and len(point) >= 2
        if not numbers or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in point):
            return "coordinates", f"{str(point)[:60]} is no position"
        if not all(map(math.isfinite, point)):
            return "coordinate-nan", f"position {point} is not finite: QuPath refuses the whole file"
    if depth[kind] < 2 or kind == "MultiLineString":
        return None
    return _ring_problem(rings)


def _ring_problem(rings: Iterable[list[Any]]) -> tuple[str, str] | None:
    empty = True
    for ring in rings:
        empty = False
        if len(ring) < 4:
            return (
                "ring-length",
                f"a ring of {len(ring)} positions, wanted 4 or more: the whole file is refused",
            )
        if ring[0][:2] != ring[-1][:2]:
            return "ring-closure", f"a ring from {ring[0]} to {ring[-1]} is open: the whole file is refused"
    return ("ring-length", "no rings at all") if empty else None


def _polygon(parts: list[Any]) -> Any:
    """Return the shapely form of multipolygon coordinates, in two dimensions."""
    polygons = [shapely.Polygon(*_rings(part)) for part in parts]
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def _rings(part: list[Any]) -> tuple[list[Any], list[Any]]:
    flat = [[point[:2] for point in ring] for ring in part]
    return flat[0], flat[1:]
