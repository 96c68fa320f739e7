"""Where DICOM slices lie, and whether together they make one regular grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.frame import Frame
from wsitk.sources.dicom_pixels import PixelStore, read_dataset

__all__ = ["Slice", "Stack", "read_slices", "stack"]

_TAGS = [
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

_SAME_PLACE_MM = 1e-3
_COSINE = 1e-3  # positions of slices are written with few digits, cosines with six
_STEP = 0.02  # of the slice spacing; scanners round positions to 0.01 mm or so
_STEP_MM = 0.011
_SHIFT_PIXELS = 0.2


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame of one file: its place (LPS millimetres), cosines, pixel spacing (row, column), and scale."""

    store: PixelStore
    frame: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]
    slope: float
    intercept: float
    thickness: float | None

    @property
    def label(self) -> str:
        """Return what to call it in a message."""
        base = os.path.basename(self.store.path)
        return base if self.store.frames == 1 else f"{base} frame {self.frame + 1}"


@dataclass(frozen=True, slots=True)
class Stack:
    """Slices in the order of z, their frame, and the field that states the distance between them."""

    slices: tuple[Slice, ...]
    frame: Frame
    provenance: str


def read_slices(name: str, files: Sequence[str]) -> list[Slice]:
    """Return every frame of every file; raises SourceError (WSI127 where one has no place, and others)."""
    found: list[Slice] = []
    for path in files:
        title = f"{name}: {os.path.basename(path)}"
        dataset, store = read_dataset(path, title, _TAGS)
        if "ModalityLUTSequence" in dataset:
            raise SourceError("WSI118", f"{title}: a modality look-up table in a volume is not read")
        shared = _first(dataset, "SharedFunctionalGroupsSequence")
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or [None] * store.frames
        if len(frames) != store.frames:
            raise SourceError("WSI115", f"{title}: {store.frames} frames, and places for {len(frames)}")
        found += [_slice(title, store, k, (group, shared, dataset)) for k, group in enumerate(frames)]
    return found


def _first(holder: Any, sequence: str) -> Any:
    """Return the first item of a sequence; None if it is missing or empty."""
    items = holder.get(sequence) if holder is not None else None
    return items[0] if items else None


def _attribute(holders: Sequence[Any], sequence: str, keyword: str) -> Any:
    """Return an attribute of a frame: its own functional group, else the shared one, else the file's."""
    own, shared, dataset = holders
    for group in (own, shared):
        value = getattr(_first(group, sequence), keyword, None)
        if value is not None:
            return value
    return dataset.get(keyword)


def _slice(title: str, store: PixelStore, index: int, holders: Sequence[Any]) -> Slice:
    position = _attribute(holders, "PlanePositionSequence", "ImagePositionPatient")
    orientation = _attribute(holders, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = _attribute(holders, "PixelMeasuresSequence", "PixelSpacing")
    thickness = _attribute(holders, "PixelMeasuresSequence", "SpacingBetweenSlices") or _attribute(
        holders, "PixelMeasuresSequence", "SliceThickness"
    )
    slope = _attribute(holders, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _attribute(holders, "PixelValueTransformationSequence", "RescaleIntercept")
    if not (position and orientation and spacing) or (store.frames > 1 and holders[0] is None):
        raise SourceError(
            "WSI127", f"{title}: states no position, orientation or pixel spacing; a volume needs all three"
        )
    try:
        item = Slice(
            store=store,
            frame=index,
            position=_numbers(position, 3),
            orientation=_numbers(orientation, 6),
            pixel_spacing=_numbers(spacing, 2),
            slope=1.0 if slope in (None, "") else float(slope),
            intercept=0.0 if intercept in (None, "") else float(intercept),
            thickness=float(thickness) if thickness else None,
        )
    except (ValueError, TypeError) as error:
        raise SourceError("WSI115", f"{title}: its place cannot be true: {error}") from error
    cosines = np.reshape(item.orientation, (2, 3))
    if np.abs(cosines @ cosines.T - np.eye(2)).max() > _COSINE or min(item.pixel_spacing) <= 0:
        raise SourceError("WSI115", f"{title}: orientation {item.orientation} is no pair of unit vectors")
    if not np.isfinite([item.slope, item.intercept]).all() or item.slope == 0:
        raise SourceError("WSI115", f"{title}: slope {item.slope:g}, intercept {item.intercept:g}")
    return item


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{numbers}, wanted {count} numbers")
    return numbers


def stack(name: str, slices: Sequence[Slice]) -> Stack:
    """Return slices ordered along their normal, with their frame; refuse what is not one regular grid.

    Raises SourceError: WSI122 to WSI126, WSI143, each with the slices that are at fault.
    """
    first = slices[0]
    _check_alike(name, slices)
    across, down = np.reshape(first.orientation, (2, 3))
    across = across / np.linalg.norm(across)
    down = down - (down @ across) * across
    down /= np.linalg.norm(down)
    normal = np.cross(across, down)
    ordered = sorted(slices, key=lambda s: (float(np.dot(s.position, normal)), s.label))
    places = np.array([s.position for s in ordered])
    step, provenance = _step(name, ordered, places @ normal)
    _check_upright(name, ordered, places, normal)
    frame = Frame.from_axes(
        places[0], np.stack([normal, down, across], axis=1), (step, *ordered[0].pixel_spacing)
    )
    return Stack(tuple(ordered), frame, provenance)


def _check_alike(name: str, slices: Sequence[Slice]) -> None:
    """Raise SourceError if size, orientation or pixel spacing differ (WSI126, WSI125, WSI124)."""
    first = slices[0]
    for item in slices[1:]:
        if item.store.form != first.store.form:
            _refuse("WSI126", name, first, item, "differ in size or type", first.store.form, item.store.form)
        turned = np.abs(np.subtract(item.orientation, first.orientation)).max()
        if turned > _COSINE:
            _refuse("WSI125", name, first, item, "differ in orientation", first.orientation, item.orientation)
        if not np.allclose(item.pixel_spacing, first.pixel_spacing, rtol=1e-3, atol=0):
            _refuse(
                "WSI124",
                name,
                first,
                item,
                "differ in pixel spacing",
                first.pixel_spacing,
                item.pixel_spacing,
            )


def _refuse(code: str, name: str, one: Slice, other: Slice, what: str, have: Any, got: Any) -> None:
    raise SourceError(
        code, f"{name}: {one.label} and {other.label} {what}: {have} and {got}; keep one of the two kinds"
    )


def _step(name: str, ordered: Sequence[Slice], heights: NDArray[np.float64]) -> tuple[float, str]:
    """Return the distance of slices in millimetres; raises SourceError (WSI122, WSI123, WSI124)."""
    if len(ordered) == 1:
        thickness = ordered[0].thickness
        if not thickness or thickness <= 0:
            raise SourceError("WSI127", f"{name}: one slice, and no thickness; a volume needs three sizes")
        return thickness, "dicom.SliceThickness"
    steps = np.diff(heights)
    typical = float(np.median(steps))
    for (one, other), step in zip(pairwise(ordered), steps, strict=True):
        pair = f"{one.label} and {other.label}"
        if step < _SAME_PLACE_MM:
            raise SourceError(
                "WSI123",
                f"{name}: {pair} lie in one place; several phases or echoes? Keep the files of one of them",
            )
        off = abs(step - typical)
        if off <= max(_STEP * typical, _STEP_MM):
            continue
        missing = round(step / typical) - 1
        if missing >= 1 and abs(step - (missing + 1) * typical) <= _STEP * step + _STEP_MM:
            raise SourceError(
                "WSI122",
                f"{name}: a gap of {step:.3f} mm between {pair}, elsewhere {typical:.3f} mm; "
                f"{missing} slices are missing: copy the series again",
            )
        raise SourceError(
            "WSI124", f"{name}: {pair} are {step:.3f} mm apart, others {typical:.3f} mm; resample it first"
        )
    return float(heights[-1] - heights[0]) / (len(ordered) - 1), "dicom.ImagePositionPatient"


def _check_upright(
    name: str, ordered: Sequence[Slice], places: NDArray[np.float64], normal: NDArray[np.float64]
) -> None:
    """Raise SourceError (WSI143) if slices are shifted sideways, as by a tilted gantry."""
    offset = places - places[0]
    aside = np.linalg.norm(offset - np.outer(offset @ normal, normal), axis=1)
    if aside.max() > _SHIFT_PIXELS * min(ordered[0].pixel_spacing):
        raise SourceError(
            "WSI143",
            f"{name}: slices are shifted sideways by up to {aside.max():.2f} mm (a tilted gantry); "
            "resample it to an upright grid first",
        )
