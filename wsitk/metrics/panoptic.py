"""Instance metrics from one contingency table: panoptic quality, AJI, AJI+, Dice of objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.assignment import best_pairs
from wsitk.metrics.contingency import Contingency, LabelMap
from wsitk.metrics.counts import Convention, Counts, Quality, ratio
from wsitk.metrics.detection import centroids, detection_counts, detection_f1

__all__ = [
    "Contingency",
    "Convention",
    "Counts",
    "Quality",
    "aji",
    "aji_plus",
    "binary_pq",
    "centroids",
    "class_counts",
    "count_matches",
    "detection_counts",
    "detection_f1",
    "ensemble_dice",
    "foreground_dice",
    "matches",
    "panoptic_counts",
]

Classes = npt.NDArray[np.integer]


def panoptic_counts(truth: LabelMap, predicted: LabelMap, threshold: float = 0.5) -> Counts:
    """Match the instances of two label maps whose IoU is above `threshold`; see `matches`."""
    return count_matches(Contingency.of(truth, predicted), threshold)


def binary_pq(truth: LabelMap, predicted: LabelMap, threshold: float = 0.5) -> float:
    """Panoptic quality of one image with all instances in one class; NaN for two empty maps."""
    return panoptic_counts(truth, predicted, threshold).pq


def matches(table: Contingency, threshold: float = 0.5) -> npt.NDArray[np.intp]:
    """Indices of the table's pairs that match: one to one, IoU strictly above `threshold`.

    From 0.5 on, such pairs are unique by themselves (Kirillov et al., Panoptic Segmentation, section 4.1).
    Below, the pairing of the greatest total IoU is taken and then cut at the threshold, as HoVer-Net does.
    Raises UsageError WSI802 for a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise UsageError("WSI802", f"an IoU threshold is at least 0 and below 1, got {threshold}")
    iou = table.iou()
    if threshold >= 0.5:
        return np.flatnonzero(iou > threshold)
    chosen = best_pairs(table.truth, table.predicted, -iou, 0.0)
    return chosen[iou[chosen] > threshold]


def count_matches(table: Contingency, threshold: float = 0.5) -> Counts:
    """Counts of the pairs in `matches`, and of what they leave over."""
    chosen = matches(table, threshold)
    tp = chosen.size
    overlap = float(table.iou()[chosen].sum())
    return Counts(tp, table.predicted_ids.size - tp, table.truth_ids.size - tp, overlap)


def class_counts(
    table: Contingency,
    truth_classes: Classes,
    predicted_classes: Classes,
    classes: Sequence[int],
    threshold: float = 0.5,
) -> tuple[Counts, ...]:
    """Counts of each of `classes`, each as if the other classes were background.

    `truth_classes` and `predicted_classes` hold the class of each of the table's objects, in the order of
    `truth_ids` and `predicted_ids`. Raises UsageError WSI803 if their number is another.
    """
    for name, given, ids in (
        ("truth", truth_classes, table.truth_ids),
        ("prediction", predicted_classes, table.predicted_ids),
    ):
        if given.shape != ids.shape:
            raise UsageError(
                "WSI803", f"{name} has {ids.size} objects and {given.size} classes; give one for each object"
            )
    return tuple(
        count_matches(table.select(truth_classes == c, predicted_classes == c), threshold) for c in classes
    )


def aji(table: Contingency) -> float:
    """Aggregated Jaccard index (Kumar et al. 2017): each true object with the prediction of highest IoU.

    A prediction may serve several true objects. What is left over on either side adds to the union. NaN for
    two empty maps, where the published script fails.
    """
    if table.truth.size == 0:
        return _aggregate(table, np.zeros(0, np.intp))
    iou = table.iou()
    # Per true object the first of its best pairs: pairs are sorted by (truth, predicted), and so ties go to
    # the lowest label, as argmax would have it.
    order = np.lexsort((table.predicted, -iou, table.truth))
    first = np.flatnonzero(np.diff(table.truth[order], prepend=-1))
    return _aggregate(table, order[first])


def aji_plus(table: Contingency) -> float:
    """AJI with one-to-one pairs of greatest total IoU (Graham et al. 2019); NaN for two empty maps."""
    return _aggregate(table, best_pairs(table.truth, table.predicted, -table.iou(), 0.0))


def _aggregate(table: Contingency, pairs: npt.NDArray[np.intp]) -> float:
    """Shared pixels of the pairs, over their unions and all the objects in no pair."""
    lone_truth = np.ones(table.truth_ids.size, bool)
    lone_truth[table.truth[pairs]] = False
    lone_predicted = np.ones(table.predicted_ids.size, bool)
    lone_predicted[table.predicted[pairs]] = False
    left = int(table.truth_area[lone_truth].sum()) + int(table.predicted_area[lone_predicted].sum())
    return ratio(int(table.shared[pairs].sum()), int(table.union[pairs].sum()) + left)


def ensemble_dice(table: Contingency) -> float:
    """Dice over all overlapping pairs ("Dice 2" of HoVer-Net); NaN where no two objects overlap.

    An object counts once for each of its partners, and not at all without one: kept for comparison with old
    tables, not a metric to choose.
    """
    both = table.truth_area[table.truth] + table.predicted_area[table.predicted]
    return ratio(2 * int(table.shared.sum()), int(both.sum()))


def foreground_dice(table: Contingency) -> float:
    """Dice of all objects' pixels against all objects' pixels ("Dice 1"); NaN for two empty maps."""
    total = int(table.truth_area.sum()) + int(table.predicted_area.sum())
    return ratio(2 * int(table.shared.sum()), total)
