"""Labels on an input's own grid: what a class is, how labels are asked for and checked, and NGFF image-labels.

Every writer of labels takes `read(region)`, which returns the labels of a box in the input's level-0 voxels, as
`ome_zarr.write_maps` does; so a volume need never be whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.writers.ome_zarr import MapLevel, write_maps

__all__ = [
    "Code",
    "LabelClass",
    "ReadLabels",
    "check_classes",
    "label_dtype",
    "read_checked",
    "slabs",
    "write_ngff",
]

ReadLabels = Callable[[Region], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Code:
    """A term of a coding scheme, such as ``SCT 10200004 Liver``."""

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class LabelClass:
    """What one value of a label map means; `code` says what the structure is, `category` of which kind."""

    value: int
    name: str
    color: tuple[int, int, int]
    code: Code | None = None
    category: Code | None = None


def check_classes(classes: Sequence[LabelClass]) -> tuple[LabelClass, ...]:
    """Return the classes by rising value; raises OutputError (WSI514) unless they are different and above 0."""
    ordered = tuple(sorted(classes, key=lambda c: c.value))
    values = [c.value for c in ordered]
    if not ordered or values[0] < 1 or values[-1] >= 1 << 32 or len(set(values)) < len(values):
        raise OutputError(
            "WSI514",
            f"label values {values[:9]}; wanted different ones above 0 (the background) and below 2**32",
        )
    return ordered


def label_dtype(largest: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds `largest`."""
    return np.dtype(np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.uint32)


def slabs(shape: tuple[int, ...], depth: int) -> Iterator[Region]:
    """Yield boxes of at most `depth` whole slices, in order."""
    for z in range(0, shape[0], depth):
        yield Region((z, 0, 0), (min(depth, shape[0] - z), *shape[1:]))


def read_checked(read: ReadLabels, region: Region, largest: int) -> NDArray[Any]:
    """Return the labels of `region` in the smallest type that holds `largest`.

    Raises OutputError (WSI513) for another shape, for values that are no whole numbers, or beyond the classes.
    """
    labels = np.asarray(read(region))
    if labels.shape != region.shape or labels.dtype.kind not in "iub":
        raise OutputError(
            "WSI513",
            f"labels at {region.start}: got {labels.shape} {labels.dtype}, wanted {region.shape} whole numbers;"
            " this is a defect of the model's output: report it",
        )
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) > largest):
        raise OutputError(
            "WSI513",
            f"labels at {region.start} reach from {labels.min()} to {labels.max()}, classes from 0 to {largest};"
            " this is a defect of the model's output: report it",
        )
    return labels.astype(label_dtype(largest), copy=False)


def write_ngff(
    path: str | Path,
    shape: tuple[int, ...],
    spacing_um: tuple[float, ...],
    classes: Sequence[LabelClass],
    read: ReadLabels,
    *,
    frame: Frame | None = None,
    name: str = "labels",
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> tuple[MapLevel, ...]:
    """Write labels as an NGFF 0.5 image-label: a sharded pyramid with CRC32C, names and colours.

    NGFF 0.5 knows no oblique axes: the image lies at the origin of its own grid, as `Source.as_zarr` shows the
    input, so that both overlay in a viewer; `frame` is kept beside it, as ``wsitk.frame``. `read` is called
    once for each shard (256 voxels a side) and may be called for any box. Works for flat images too.

    Raises OutputError: WSI510 to WSI514, as `write_maps`.
    """
    ordered = check_classes(classes)
    largest = ordered[-1].value
    kept = dict(notes or {})
    if frame is not None:
        kept["frame"] = frame.to_json()
    return write_maps(
        path,
        shape,
        label_dtype(largest),
        (),
        spacing_um,
        (0.0,) * len(shape),
        lambda region: read_checked(read, region, largest),
        kind="labels",
        name=name,
        notes=kept,
        image_label=_image_label(ordered),
        overwrite=overwrite,
    )


def _image_label(classes: Sequence[LabelClass]) -> dict[str, Any]:
    """Return NGFF's ``image-label``: colours for viewers, names as properties."""
    return {
        "colors": [{"label-value": c.value, "rgba": [*c.color, 255]} for c in classes],
        "properties": [{"label-value": c.value, "name": c.name} for c in classes],
    }
