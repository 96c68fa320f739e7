"""The post-processing of CellViT: maps of a tile in, objects on the working grid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.grid import Tile
from wsitk.models.cellvit.hover import HoverSettings, segment
from wsitk.models.cellvit.hover_upstream import UpstreamInstances, Variant, segment_upstream
from wsitk.models.cellvit.watershed import sum_by_label
from wsitk.objects import ObjectTable

__all__ = [
    "HoverSettings",
    "UpstreamInstances",
    "Variant",
    "segment",
    "segment_upstream",
    "mean_by_label",
    "classify_objects",
    "objects_from_maps",
]

Array = NDArray[Any]


def mean_by_label(labels: Array, values: Array) -> NDArray[np.float32]:
    """Return (N, C): the mean of each channel of `values` (C, H, W) over each label 1 .. N of (H, W).

    Sums are float64 in raster order of the object, so an object's means have the same bits in every tile
    that shows the same values. All labels 1 .. N must occur.
    """
    sizes = np.bincount(labels.ravel(), minlength=1)[1:]
    sums = sum_by_label(np.ascontiguousarray(labels), np.ascontiguousarray(values, np.float32), len(sizes))
    return np.asarray(sums / sizes[:, None], np.float32)


def classify_objects(
    labels: Array, type_prob: Array
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
    """Return class (N,), its probability (N,), and the probability of every class (N, C - 1).

    `type_prob` is the softmax of the type map, float32 (C, H, W), whose channel 0 is background and no
    class: class ``k`` is channel ``k + 1``. An object's probability of a class is the mean over its pixels,
    unlike upstream's share of pixels that a class wins; the rest to 1 is background. The largest wins, the
    first among equals.
    """
    each = mean_by_label(labels, type_prob[1:])
    best = np.argmax(each, axis=1)
    return best.astype(np.int16), each[np.arange(len(each)), best], each


def objects_from_maps(
    prob: Array,
    hv: Array,
    type_prob: Array | None,
    tile: Tile,
    spacing_um: float,
    settings: HoverSettings | None = None,
    columns: Sequence[str] = (),
) -> ObjectTable:
    """Return the nuclei of one tile in working-grid coordinates.

    `prob` is the foreground probability (H, W), `hv` is (2, H, W) with x first, `type_prob` the softmax of
    the type map (C, H, W) with background first, or None for a model of one class. The objects'
    probability is that of their class, or the mean foreground probability where there are no types.
    `columns` names the probability of each class (``C - 1`` names); none, and they are left out.
    """
    chosen = settings or HoverSettings()
    if columns and (type_prob is None or len(columns) != len(type_prob) - 1):
        raise UsageError("WSI064", f"{len(columns)} column names do not fit the type map's classes")
    if chosen.mode == "upstream":
        labels, class_id, probability, each = _upstream(prob, hv, type_prob)
    else:
        labels = segment(prob, hv, spacing_um, chosen)
        if type_prob is None:
            probability = mean_by_label(labels, prob[None])[:, 0]
            class_id, each = np.zeros(len(probability), np.int16), np.zeros((len(probability), 0), np.float32)
        else:
            class_id, probability, each = classify_objects(labels, type_prob)
    return ObjectTable.from_labels(
        labels,
        origin=tile.read.start,
        class_id=class_id,
        probability=probability,
        columns={name: each[:, k] for k, name in enumerate(columns)},
        tile=tile.index,
    )


def _upstream(prob: Array, hv: Array, type_prob: Array | None) -> tuple[Array, Array, Array, Array]:
    """Return labels, class, confidence and class probabilities of the instances that upstream keeps.

    An instance all of whose pixels are typed background is dropped, as upstream does when it joins tiles.
    """
    binary = (prob > 0.5).astype(np.uint8)
    types = binary if type_prob is None else np.argmax(type_prob, axis=0).astype(np.uint8)
    labels, found = segment_upstream(binary, types, hv)
    keep = found.type_id > 0
    fresh = np.zeros(int(labels.max()) + 1, np.int32)
    fresh[found.ids[keep]] = np.arange(1, int(keep.sum()) + 1)
    labels = fresh[labels]
    values = type_prob[1:] if type_prob is not None else prob[None]
    return labels, found.type_id[keep] - 1, found.type_prob[keep], mean_by_label(labels, values)
