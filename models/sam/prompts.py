"""Prompts: points, boxes and masks that say what is to be outlined, from the files that people keep them in.

GeoJSON    a point is a point, any other shape its box; features of one ``prompt`` (a property) belong together
CSV        columns ``x, y`` (``label`` 0: outside) or ``x0, y0, x1, y1``; perhaps ``prompt``, ``class``, ``plane``
Parquet    another model's ``objects.parquet``: the box of every object
NIfTI      labels: every label of every plane is a box and a mask

Coordinates are level-0 pixels, x to the right and y down.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.json_stream import JsonReader, features, open_text
from wsitk.objects import ObjectTable
from wsitk.sources import open_source

__all__ = ["Prompts", "read_prompts"]

Array = NDArray[Any]

UNNAMED = "Object"


@dataclass(frozen=True)
class Prompts:
    """N prompts, column by column.

    Attributes
    ----------
    box_xy : float64 (N, 4)
        (x0, y0, x1, y1), or NaN where there is none.
    point_xy, point_label, offset : float64 (P, 2), int64 (P,), int64 (N + 1,)
        Points of prompt k are rows ``offset[k]`` to ``offset[k + 1]``; label 1 is inside, 0 outside.
    class_id : int16 (N,)
        Position in `classes`.
    plane : int64 (N,)
        Slice of a volume; 0 in flat images.
    masks
        One for each prompt, in pixels (y, x); or None.
    """

    box_xy: Array
    point_xy: Array
    point_label: Array
    offset: Array
    class_id: Array
    plane: Array
    classes: tuple[str, ...]
    masks: ObjectTable | None = None

    def __len__(self) -> int:
        return len(self.plane)

    @property
    def bounds_xy(self) -> Array:
        """Return (N, 4): the least and greatest x and y of each prompt's box and points."""
        low, high = self.box_xy[:, :2].copy(), self.box_xy[:, 2:].copy()
        row = np.repeat(np.arange(len(self)), np.diff(self.offset))
        # fmin and fmax pass over what isn't there
        np.fmin.at(low, row, self.point_xy)
        np.fmax.at(high, row, self.point_xy)
        return np.concatenate([low, high], axis=1)

    def centred(self, window: Region) -> Array:
        """Return the prompts whose middle lies in a window, (y, x) or (z, y, x), as row numbers.

        Windows that divide an image divide its prompts.
        """
        (y, x), (height, width) = window.start[-2:], window.shape[-2:]
        low_x, low_y, high_x, high_y = self.bounds_xy.T
        middle_x, middle_y = (low_x + high_x) / 2, (low_y + high_y) / 2
        here = (middle_x >= x) & (middle_y >= y) & (middle_x < x + width) & (middle_y < y + height)
        if len(window.start) == 3:
            here &= (self.plane >= window.start[0]) & (self.plane < window.stop[0])
        return np.flatnonzero(here)

    @property
    def sha256(self) -> str:
        """Return a hash of everything in here."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for name in ("box_xy", "point_xy", "point_label", "offset", "class_id", "plane"):
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        if self.masks is not None:
            digest.update(self.masks.bits.tobytes() + self.masks.start.tobytes() + self.masks.shape.tobytes())
        return digest.hexdigest()


@dataclass
class _Draft:
    """Prompts while they are being read, number by number."""

    boxes: list[tuple[float, ...]] = field(default_factory=list)
    points: list[list[tuple[float, float, int]]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    planes: list[int] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def row(self, key: str, name: str, plane: int) -> int:
        """Return the row of the prompt called `key`; a prompt without a name is a new one."""
        if key and key in self.known:
            return self.known[key]
        self.boxes.append((math.nan,) * 4)
        self.points.append([])
        self.names.append(name or UNNAMED)
        self.planes.append(plane)
        if key:
            self.known[key] = len(self.names) - 1
        return len(self.names) - 1

    def done(self) -> Prompts:
        classes = tuple(dict.fromkeys(self.names))
        rank = {name: k for k, name in enumerate(classes)}
        flat = [p for points in self.points for p in points]
        return Prompts(
            np.array(self.boxes, np.float64).reshape(-1, 4),
            np.array([p[:2] for p in flat], np.float64).reshape(-1, 2),
            np.array([p[2] for p in flat], np.int64),
            np.cumsum([0] + [len(p) for p in self.points]),
            np.array([rank[n] for n in self.names], np.int16),
            np.array(self.planes, np.int64),
            classes,
        )


def read_prompts(path: str | Path) -> Prompts:
    """Return the prompts in a file; see the module for the kinds of files.

    Raises UsageError: WSI075 (no such kind of file, or no prompt in it), WSI076 (a prompt that makes no sense, by
    its place in the file). SourceError for files that can't be read.
    """
    path = Path(path)
    ending = next((e for e in _READERS if path.name.lower().endswith(e)), None)
    if ending is None:
        kinds = ", ".join(_READERS)
        raise UsageError("WSI075", f"{path.name} holds no prompts that wsitk can read; wanted one of {kinds}")
    try:
        prompts: Prompts = _READERS[ending](path)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError("WSI100", f"{path.name}: {error.strerror or error}") from error
    if not len(prompts):
        raise UsageError("WSI075", f"{path.name} holds no prompt; draw a point or a box, and save again")
    if np.isnan(prompts.bounds_xy).any():
        row = int(np.isnan(prompts.bounds_xy).any(axis=1).argmax())
        raise UsageError("WSI076", f"{path.name}: prompt {row + 1} has neither points nor a box; give it one")
    return prompts


# --- GeoJSON -----------------------------------------------------------------------------------------


def _geojson(path: Path) -> Prompts:
    draft = _Draft()
    with open_text(path) as stream:
        for number, feature in enumerate(features(JsonReader(stream)), 1):
            try:
                _feature(draft, feature)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UsageError(
                    "WSI076", f"{path.name}: feature {number} is no prompt: {error!r}"
                ) from error
    return draft.done()


def _feature(draft: _Draft, feature: Mapping[str, Any]) -> None:
    properties = feature.get("properties") or {}
    name = (properties.get("classification") or {}).get("name", "")
    geometry = feature["geometry"]
    row = draft.row(str(properties.get("prompt", "")), str(name), int(properties.get("plane", 0)))
    places = list(_positions(geometry["coordinates"]))
    if geometry["type"] in ("Point", "MultiPoint"):
        label = int(properties.get("label", 1))
        draft.points[row] += [(x, y, _label(label)) for x, y in places]
        return
    xs, ys = zip(*places, strict=True)
    draft.boxes[row] = (min(xs), min(ys), max(xs), max(ys))


def _positions(coordinates: Any) -> Iterator[tuple[float, float]]:
    """Yield the positions of any geometry."""
    if isinstance(coordinates[0], int | float):
        yield _finite(coordinates[0]), _finite(coordinates[1])
        return
    for inner in coordinates:
        yield from _positions(inner)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no place")
    return number


def _label(value: int) -> int:
    if value not in (0, 1):
        raise ValueError(f"label is {value}, wanted 1 (inside) or 0 (outside)")
    return value


# --- CSV ---------------------------------------------------------------------------------------------


def _csv(path: Path) -> Prompts:
    draft = _Draft()
    with open(path, newline="", encoding="utf-8-sig") as stream:
        for number, line in enumerate(csv.DictReader(stream), 2):
            try:
                _line(draft, {k.strip().lower(): (v or "").strip() for k, v in line.items() if k})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UsageError("WSI076", f"{path.name}: line {number} is no prompt: {error!r}") from error
    return draft.done()


def _line(draft: _Draft, line: Mapping[str, str]) -> None:
    row = draft.row(line.get("prompt", ""), line.get("class", ""), int(line.get("plane") or 0))
    if line.get("x0"):
        x0, y0, x1, y1 = (_finite(line[k]) for k in ("x0", "y0", "x1", "y1"))
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} is empty")
        draft.boxes[row] = (x0, y0, x1, y1)
    if line.get("x"):
        draft.points[row].append(
            (_finite(line["x"]), _finite(line["y"]), _label(int(line.get("label") or 1)))
        )


# --- objects and labels ------------------------------------------------------------------------------


def _parquet(path: Path) -> Prompts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["bbox", "class"])
        box = table["bbox"].combine_chunks()
        sides = [np.asarray(box.field(n), np.float64) for n in ("xmin", "ymin", "xmax", "ymax")]
        coded = table["class"].cast(pa.string()).combine_chunks().dictionary_encode()
    except (pa.ArrowException, KeyError) as error:
        hint = str(error).partition("\n")[0]
        raise UsageError("WSI075", f"{path.name} is no objects.parquet of wsitk: {hint}") from error
    count = table.num_rows
    return Prompts(
        np.stack(sides, axis=1),
        np.zeros((0, 2)),
        np.zeros(0, np.int64),
        np.zeros(count + 1, np.int64),
        np.asarray(coded.indices, np.int16),
        np.zeros(count, np.int64),
        tuple(str(name) for name in coded.dictionary.to_pylist()),
    )


def _labels(path: Path) -> Prompts:
    tables, planes, values = [], [], []
    with open_source(path) as source:
        if source.ndim != 3 or source.dtype.kind not in "iu" or "c" in source.axes:
            raise UsageError(
                "WSI075", f"{path.name} is {source.dtype} with axes {source.axes}; wanted labels (z, y, x)"
            )
        for z in range(source.shape[0]):
            plane = source.read(Region((z, 0, 0), (1, *source.shape[1:])))[0]
            found = np.unique(plane[plane > 0])
            ranked = np.where(plane > 0, np.searchsorted(found, plane) + 1, 0)
            tables.append(ObjectTable.from_labels(ranked.astype(np.int32)))
            planes += [z] * len(found)
            values += found.tolist()
    return _boxed(ObjectTable.concat(tables), planes, values)


def _boxed(masks: ObjectTable, planes: Sequence[int], values: Sequence[int]) -> Prompts:
    start, stop = masks.start[:, ::-1], (masks.start + masks.shape)[:, ::-1]
    kinds = sorted(set(values))
    return Prompts(
        np.concatenate([start, stop], axis=1).astype(np.float64),
        np.zeros((0, 2)),
        np.zeros(0, np.int64),
        np.zeros(len(planes) + 1, np.int64),
        np.searchsorted(kinds, values).astype(np.int16),
        np.array(planes, np.int64),
        tuple(str(k) for k in kinds),
        masks,
    )


_READERS: Mapping[str, Any] = {
    ".geojson": _geojson,
    ".geojson.gz": _geojson,
    ".json": _geojson,
    ".csv": _csv,
    ".parquet": _parquet,
    ".nii": _labels,
    ".nii.gz": _labels,
    ".nrrd": _labels,
}
