"""Post-processing exactly as upstream CellViT does it, flaws included: for parity, not for use.

The steps are HoVer-Net's (Graham et al. 2019, section 3.2). Three habits make them unfit for tiles: each map
is stretched to its own minimum and maximum over the whole array, so a nucleus depends on what else the tile
shows; kernel and object sizes are pixels, whatever the magnification; and confidence is a share of pixels,
not a probability. `wsitk.models.cellvit.hover` is the replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from wsitk.errors import UsageError

__all__ = ["Variant", "UpstreamInstances", "segment_upstream"]

Array = NDArray[Any]
Variant = Literal["v1_40", "v1_20", "v1_gt", "inference"]

SIZES: dict[str, tuple[int, int]] = {
    "v1_40": (10, 21),
    "v1_20": (3, 11),
    "v1_gt": (100, 21),
    "inference": (10, 21),
}
"""Smallest marker (pixels) and Sobel kernel; `inference` accepts a magnification and ignores it."""

MASK_MIN = 10
EDGE = 0.4


@dataclass(frozen=True)
class UpstreamInstances:
    """The instances that upstream lists, one row each; a region without a proper contour has no row.

    Attributes
    ----------
    ids : int32 (N,)
        Value in the instance map.
    bbox : int32 (N, 2, 2)
        ((row, column) of the first pixel, (row, column) behind the last one).
    centroid_xy : float64 (N, 2)
        Mean pixel index, which lies half a pixel before the centre as the rest of wsitk sees it.
    type_id : int32 (N,)
        Most frequent pixel type; background gives way to the runner-up.
    type_prob : float64 (N,)
        Share of the pixels that have this type.
    contour_xy : int32 (V, 2)
        Outer contours through pixel centres, one after the other.
    offset : int64 (N + 1,)
        Where each contour begins.
    """

    ids: Array
    bbox: Array
    centroid_xy: Array
    type_id: Array
    type_prob: Array
    contour_xy: Array
    offset: Array


def segment_upstream(
    binary: Array, types: Array, hv: Array, variant: Variant = "inference"
) -> tuple[NDArray[np.int32], UpstreamInstances]:
    """Return the instance map (H, W) and its instances as upstream computes them.

    `binary` and `types` are argmax maps (H, W), `hv` is float (2, H, W) with x first. `variant` names the
    release and its magnification: ``v1_40``, ``v1_20``, ``v1_gt``, or ``inference`` (CellViT++ and the PyPI
    package). Raises UsageError for another one.
    """
    if variant not in SIZES:
        raise UsageError("WSI061", f"no upstream variant {variant!r}; one of {', '.join(SIZES)}")
    size_min, ksize = SIZES[variant]
    labels = _instance_map(binary, hv.astype(np.float32, copy=False), size_min, ksize)
    if variant == "inference":  # the two v1 paths keep the gaps that the watershed leaves
        labels = _close_gaps(labels)
    return labels, _instances(labels, types)


def _instance_map(binary: Array, hv: Array, size_min: int, ksize: int) -> NDArray[np.int32]:
    mask = _drop_small(ndimage.label(binary > 0)[0], MASK_MIN) > 0
    edge = np.maximum(
        1 - _stretch(cv2.Sobel(_stretch(hv[0]), cv2.CV_64F, 1, 0, ksize=ksize)),
        1 - _stretch(cv2.Sobel(_stretch(hv[1]), cv2.CV_64F, 0, 1, ksize=ksize)),
    )
    edge = np.maximum(edge - (1 - mask.astype(np.int32)), 0)
    elevation = -cv2.GaussianBlur((1.0 - edge) * mask, (3, 3), 0)
    marker = ndimage.binary_fill_holes(mask & (edge < EDGE)).astype(np.uint8)
    marker = cv2.morphologyEx(marker, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    seeds = _drop_small(ndimage.label(marker)[0], size_min)
    return np.asarray(watershed(elevation, markers=seeds, mask=mask), np.int32)


def _close_gaps(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Number the labels 1, 2, ... in their order; 0 stays 0."""
    present = np.bincount(labels.ravel(), minlength=1) > 0
    present[0] = False
    return np.asarray(np.where(present, np.cumsum(present), 0)[labels], np.int32)


def _stretch(values: Array) -> Array:
    """Map the minimum of the array to 0 and its maximum to 1, as float32."""
    return np.asarray(cv2.normalize(values, None, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F))


def _drop_small(labels: Array, size_min: int) -> Array:
    """Set labels of fewer than `size_min` pixels to zero; the others keep their number."""
    keep = np.bincount(labels.ravel()) >= size_min
    keep[0] = False
    return np.where(keep[labels], labels, 0)


def _instances(labels: Array, types: Array) -> UpstreamInstances:
    ids, boxes, centroids, kinds, shares, contours = [], [], [], [], [], []
    regions = ndimage.find_objects(labels)
    # Upstream takes the smallest value for background, so without any background it loses an instance.
    for label in np.unique(labels)[1:].tolist():
        box = regions[label - 1]
        mask = (labels[box] == label).astype(np.uint8)
        outline = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0][0].reshape(-1, 2)
        if len(outline) < 3:
            continue
        corner_xy = np.array([box[1].start, box[0].start])
        moments = cv2.moments(mask)
        kind, count = _majority(types[box][mask > 0])
        ids.append(label)
        boxes.append([[box[0].start, box[1].start], [box[0].stop, box[1].stop]])
        centroids.append(np.array([moments["m10"], moments["m01"]]) / moments["m00"] + corner_xy)
        kinds.append(kind)
        shares.append(count / (int(mask.sum()) + 1e-6))
        contours.append(outline + corner_xy)
    return UpstreamInstances(
        ids=np.array(ids, np.int32),
        bbox=np.array(boxes, np.int32).reshape(-1, 2, 2),
        centroid_xy=np.array(centroids, np.float64).reshape(-1, 2),
        type_id=np.array(kinds, np.int32),
        type_prob=np.array(shares, np.float64),
        contour_xy=np.concatenate([np.zeros((0, 2), np.int32), *contours]).astype(np.int32),
        offset=np.cumsum([0] + [len(c) for c in contours], dtype=np.int64),
    )


def _majority(values: Array) -> tuple[int, int]:
    """Return the most frequent value and its count; ties go to the smaller, 0 to any other value."""
    kinds, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    best = order[1] if kinds[order[0]] == 0 and len(order) > 1 else order[0]
    return int(kinds[best]), int(counts[best])
