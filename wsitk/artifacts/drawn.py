"""Artifacts that a person has drawn: GeoJSON as QuPath exports it, brought onto a grid."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.artifacts.mask import KINDS, OTHER, ArtifactMask
from wsitk.errors import SourceError, UsageError
from wsitk.json_stream import JsonReader, features, open_text
from wsitk.sources.base import Source

__all__ = ["artifacts_from_geojson"]

MAX_PIXELS = 1 << 24
"""Pixels of a grid: 16 MB, whatever was drawn on whatever slide."""

MAX_CORNERS = 5_000_000
"""Corners of all outlines together: more than anyone draws, and about 100 MB."""

Rings = list[NDArray[np.float64]]


def artifacts_from_geojson(path: str | Path, source: Source) -> ArtifactMask:
    """Return the regions in a GeoJSON file (also ``.gz``) as a mask over what they cover.

    An outline's class decides its kind, whatever its case (``Fold``, ``pen``); any other is ``other``. The
    grid covers the outlines' common box, at level 0 if that has at most 2**24 pixels, else at the least power
    of two that fits. A pixel is marked if its centre lies inside, or the outline passes through it: no part of
    an outline is lost. Coordinates are QuPath's: level-0 pixels from the corner of the scanned bounds.

    Raises UsageError (WSI014) if the file can't be read or holds no polygon inside the image.
    """
    start, extent = source.bounds.start, source.shape
    outlines = _outlines(Path(path), (float(start[1]), float(start[0])))
    corners = np.concatenate([ring for polygons in outlines.values() for rings in polygons for ring in rings])
    low = np.maximum(np.floor(corners.min(0)), 0)
    high = np.minimum(np.ceil(corners.max(0)) + 1, extent[::-1])
    if (high <= low).any():
        raise UsageError(
            "WSI014", f"{path}: its regions lie outside of {source.name}; is it another slide's?"
        )
    scale = _scale((int(high[1] - low[1]), int(high[0] - low[0])))
    shape = (ceil((high[1] - low[1]) / scale), ceil((high[0] - low[0]) / scale))
    found = {kind: _filled(rings, shape, low, scale) for kind, rings in outlines.items()}
    um = source.spacing.um if source.spacing else None
    return ArtifactMask.of_kinds(
        found, (float(scale),) * 2, corner=(float(low[1]), float(low[0])), um=(um[0], um[1]) if um else None
    )


def _scale(shape: tuple[int, int]) -> int:
    """Return the least power of two at which `shape` has at most MAX_PIXELS pixels."""
    scale = 1
    while ceil(shape[0] / scale) * ceil(shape[1] / scale) > MAX_PIXELS:
        scale *= 2
    return scale


def _filled(
    polygons: list[Rings], shape: tuple[int, int], corner_xy: NDArray[np.float64], scale: int
) -> NDArray[np.bool_]:
    """Return polygons as pixels; where a polygon's rings lie inside each other they take turns."""
    import cv2

    mask = np.zeros(shape, np.uint8)
    for rings in polygons:
        # OpenCV counts from the centre of the first pixel, in sixteenths
        points = [np.rint(((ring - corner_xy) / scale - 0.5) * 16).astype(np.int32) for ring in rings]
        cv2.fillPoly(mask, points, 1, shift=4)
    return mask.astype(bool)


def _outlines(path: Path, offset_xy: tuple[float, float]) -> dict[str, list[Rings]]:
    """Return each kind's polygons, as rings of level-0 (x, y); kinds in the order of KINDS."""
    found: dict[str, list[Rings]] = {}
    corners = 0
    try:
        with open_text(path) as stream:
            for feature in features(JsonReader(stream)):
                for polygon in _polygons(feature.get("geometry", feature)):
                    rings = [_ring(ring, offset_xy) for ring in polygon]
                    corners += sum(map(len, rings))
                    if corners > MAX_CORNERS:
                        raise ValueError(f"more than {MAX_CORNERS:,} corners")
                    found.setdefault(_kind(feature), []).append(rings)
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:
        said = error.message if isinstance(error, SourceError) else error
        raise UsageError("WSI014", f"{path} is no GeoJSON of regions ({said}); export it again") from error
    if not found:
        raise UsageError("WSI014", f"{path} holds no Polygon or MultiPolygon; draw artifacts and export them")
    return {kind: found[kind] for kind in (*KINDS, OTHER) if kind in found}


def _ring(ring: Any, offset_xy: tuple[float, float]) -> NDArray[np.float64]:
    """Return a ring's corners (N, 2); raises ValueError for what is none, or lies beyond any slide."""
    corners = np.asarray(ring, np.float64)
    if corners.ndim != 2 or corners.shape[1] < 2 or len(corners) < 3:
        raise ValueError(f"a ring of shape {corners.shape}, wanted at least three corners (x, y)")
    placed: NDArray[np.float64] = corners[:, :2] + offset_xy
    if not (np.abs(placed) < 1 << 26).all():
        raise ValueError("a corner is not finite, or far beyond any slide")
    return placed


def _polygons(geometry: Any) -> Iterator[Sequence[Any]]:
    """Yield the polygons of a geometry, each a list of rings."""
    if not isinstance(geometry, Mapping):
        return
    if geometry.get("type") == "Polygon":
        yield geometry["coordinates"]
    elif geometry.get("type") == "MultiPolygon":
        yield from geometry["coordinates"]
    elif geometry.get("type") == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)


def _kind(feature: Mapping[str, Any]) -> str:
    """Return what a feature's class, or its name, says it is."""
    properties = feature.get("properties") or {}
    said = properties.get("classification") or properties.get("name") or ""
    name = said.get("name", "") if isinstance(said, Mapping) else said
    words = str(name).strip().lower()
    return words if words in KINDS else OTHER
