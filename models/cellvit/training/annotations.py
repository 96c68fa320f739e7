"""What a person or a program drew on a slide, from GeoJSON as QuPath exports it.

The file is read feature by feature and kept as flat arrays: a million nuclei take some 150 megabytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.models.cellvit.training.rasterise import HUNDREDTHS, Outlines

__all__ = ["REGIONS", "Annotations", "read_annotations"]

REGIONS = ("training*", "region*", "roi*")
"""Class names, lower case, of areas in which every nucleus is drawn."""

_NO_NUCLEUS = {"tile", "tmacore", "root"}


@dataclass(frozen=True, eq=False)
class Annotations:
    """The content of one file; coordinates as in the file.

    Attributes
    ----------
    nuclei
        Outlines of N nuclei.
    labels
        Class name of each nucleus as a number into `names`, int32 (N,); -1 without a class.
    names
        Class names in the order they occur.
    regions, ignored
        Areas that are labelled completely; areas about which nothing is said.
    drawn
        Whether each nucleus is an annotation (drawn) rather than a detection, bool (N,).
    skipped
        Features that are neither, by kind.
    """

    nuclei: Outlines
    labels: NDArray[np.int32]
    names: tuple[str, ...]
    regions: Outlines
    ignored: Outlines
    drawn: NDArray[np.bool_]
    skipped: Mapping[str, int]


@final
class _Builder:
    """Collects outlines: bytes, not objects."""

    def __init__(self) -> None:
        self._points = bytearray()
        self._rings = array("q", [0])
        self._objects = array("q", [0])

    def add(self, polygons: Sequence[Any]) -> None:
        """Add one object. Raises ValueError for a ring that is none."""
        rings = [np.asarray(ring, np.float64)[:, :2] for polygon in polygons for ring in polygon]
        for points in rings:
            if len(points) < 3 or not np.isfinite(points).all():
                raise ValueError("a ring needs three finite points")
            if (points[0] != points[-1]).any():
                points = np.vstack([points, points[:1]])
            self._points += np.rint(points * HUNDREDTHS).astype(np.int32).tobytes()
            self._rings.append(len(self._points) // 8)
        self._objects.append(len(self._rings) - 1)

    def outlines(self) -> Outlines:
        xy = np.frombuffer(bytes(self._points), np.int32).reshape(-1, 2)
        return Outlines(xy, np.array(self._rings, np.int64), np.array(self._objects, np.int64))


def read_annotations(path: Path, regions: Sequence[str] = REGIONS) -> Annotations:
    """Return the annotations of a ``.geojson`` or ``.geojson.gz``.

    A class that matches `regions` (``*`` stands for anything) marks an area of complete labels; any other
    class that ends in ``*``, which is how QuPath marks classes to ignore, an area of none. Everything else that
    has an area is a nucleus; of a QuPath cell, its nucleus. Raises SourceError: WSI190, WSI191 if the
    file is no GeoJSON, WSI905 for a feature without usable coordinates.
    """
    nuclei, areas, ignored = _Builder(), _Builder(), _Builder()
    labels, drawn = array("i"), array("b")
    names: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for number, feature in enumerate(_stream(path)):
        try:
            kind, name, polygons = _parts(feature)
            if not polygons or kind in _NO_NUCLEUS:
                skipped[kind if kind in _NO_NUCLEUS else "points and lines"] += 1
            elif name and any(fnmatchcase(name.lower(), pattern.lower()) for pattern in regions):
                areas.add(polygons)
            elif name.endswith("*"):
                ignored.add(polygons)
            else:
                nuclei.add(polygons)
                labels.append(names.setdefault(name, len(names)) if name else -1)
                drawn.append(kind == "annotation")
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise SourceError(
                "WSI905", f"{path.name}: feature {number} has no usable outline ({error}); export it again"
            ) from error
    return Annotations(
        nuclei.outlines(),
        np.array(labels, np.int32),
        tuple(names),
        areas.outlines(),
        ignored.outlines(),
        np.array(drawn, bool),
        dict(skipped),
    )


def _stream(path: Path) -> Iterator[Any]:
    """Yield the features of a file. Raises SourceError WSI905 if it cannot be read at all."""
    from wsitk.json_stream import JsonReader, features, open_text

    try:
        with open_text(path) as stream:
            yield from features(JsonReader(stream))
    except SourceError as error:
        raise SourceError(error.code, f"{path.name}: {error.message}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError("WSI905", f"{path.name} cannot be read: {error}") from error


def _parts(feature: Any) -> tuple[str, str, list[Any]]:
    """Return the object type, the class name (empty without one) and the polygons of a feature."""
    properties = feature.get("properties") or {}
    kind = str(properties.get("objectType") or properties.get("object_type") or "").lower()
    geometry = feature.get("nucleusGeometry") or feature.get("geometry") or {}
    shape = geometry.get("type")
    coordinates: Any = geometry.get("coordinates")
    polygons: list[Any] = []
    if shape in ("Polygon", "MultiPolygon"):
        polygons = [coordinates] if shape == "Polygon" else list(coordinates)
    return kind, _class_name(properties.get("classification")), polygons


def _class_name(classification: Any) -> str:
    """Return a class as QuPath shows it: ``Tumor: Positive``."""
    if isinstance(classification, Mapping):
        names = classification.get("names") or [classification.get("name")]
        return ": ".join(str(n) for n in names if n)
    return str(classification or "")
