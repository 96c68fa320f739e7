"""From committed layers to the labels of a volume: files on the input's own grid, voxels and volume per class.

The stored layers are read once for each file and once for the counts, a few rows at a time.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import wsitk
from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.model import FieldSpec, ModelSpec
from wsitk.plan import Plan
from wsitk.stitch.labels import LabelMerger, LabelPart
from wsitk.stitch.layers import Layers
from wsitk.writers.dicom_seg import Maker, Series, kind_for, write_dicom_seg
from wsitk.writers.labels import LabelClass, write_ngff
from wsitk.writers.nifti import write_nifti

__all__ = ["label_classes", "label_merger", "write_labels", "write_segmentation"]


def label_merger(plan: Plan, spec: FieldSpec, load: Callable[[int], LabelPart | None]) -> LabelMerger:
    """Return the labels of an input on its own grid; `load` gives the part of a layer, or None."""
    assert plan.canvas is not None  # every plan of a model with labels has one
    corner = plan.view.crop.start if plan.view else (0,) * len(plan.canvas.shape)
    layers = Layers(plan.grid, spec, plan.canvas)
    return LabelMerger(layers, spec, plan.shape, Region(corner, plan.canvas.shape), load)


def label_classes(spec: FieldSpec, model: ModelSpec) -> tuple[LabelClass, ...]:
    """Return what the values of a label map mean, all but 0; a class without a colour of the model's gets one."""
    colors = {c.name: c.color for c in model.classes}
    values = spec.regions or tuple(range(len(spec.channels)))
    return tuple(
        LabelClass(value, name, colors.get(name) or _color(value))
        for value, name in zip(values, spec.channels, strict=True)
        if value
    )


def _color(value: int) -> tuple[int, int, int]:
    """Return a colour for a label; neighbouring values lie far apart on the wheel."""
    turn = value * 0.618034 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(turn, 0.55 + 0.4 * (value % 3) / 2, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def write_labels(plan: Plan, spec: ModelSpec, merger: LabelMerger, folder: Path) -> dict[str, Any]:
    """Write `labels.ome.zarr`, and `labels.nii.gz` where the input has a place in space.

    Returns for each class its voxels and, where the voxel size is known, its volume in mm³.
    """
    (field,) = spec.labels
    classes = label_classes(field, spec)
    um = plan.spacing.um if plan.spacing else (1.0,) * len(plan.shape)
    notes = {"model": spec.name, "field": field.name}
    write_ngff(
        folder / "labels.ome.zarr",
        plan.shape,
        um,
        classes,
        merger.read,
        frame=plan.frame,
        notes=notes,
        overwrite=True,
    )
    if plan.frame is not None:
        write_nifti(folder / "labels.nii.gz", plan.shape, plan.frame, classes, merger.read, overwrite=True)
    mm3 = _voxel_mm3(plan)
    found = zip(classes, merger.counts([c.value for c in classes]), strict=True)
    return {c.name: {"voxels": n} | ({"volume_mm3": round(n * mm3, 3)} if mm3 else {}) for c, n in found}


def write_segmentation(
    plan: Plan, spec: ModelSpec, merger: LabelMerger, folder: Path, series: Series | None
) -> str:
    """Write `labels.dcm`, if the input is a DICOM series; return why not, if it cannot be done.

    The other files hold the same labels, so this is no reason for the input to fail.
    """
    if series is None:
        return ""
    classes = label_classes(spec.labels[0], spec)
    maker = Maker(spec.name, spec.version, f"wsitk {wsitk.__version__}")
    try:
        write_dicom_seg(
            folder / "labels.dcm", series, classes, merger.read, maker, kind=kind_for(classes), overwrite=True
        )
    except OutputError as error:
        if error.code not in ("WSI530", "WSI531"):
            raise
        return f"no labels.dcm: {error}"
    return ""


def _voxel_mm3(plan: Plan) -> float:
    """Return the volume of a voxel; 0 where its size is unknown. A sheared voxel is smaller than its edges say."""
    if plan.spacing is None:
        return 0.0
    if plan.frame is None:
        return float(prod(plan.spacing.um)) / 1e9
    cosines = abs(float(np.linalg.det(plan.frame.directions)))
    return float(prod(plan.spacing.um)) / 1e9 * cosines
