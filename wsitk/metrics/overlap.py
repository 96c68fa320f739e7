"""Overlap of two masks of any number of axes: Dice, IoU, clDice, and all that four pixel counts give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.contingency import Contingency, LabelMap
from wsitk.metrics.counts import ratio
from wsitk.metrics.empties import Empty

__all__ = ["Confusion", "as_masks", "centreline_dice", "class_confusions", "confusion", "dice", "iou"]

Mask = npt.NDArray[np.bool_]
AnyMask = npt.NDArray[np.number | np.bool_]


@dataclass(frozen=True)
class Confusion:
    """Pixels by truth and prediction. Those of images add up, which gives the pooled figures."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    def dice(self, empty: Empty = Empty.SKIP) -> float:
        """2 TP / (2 TP + FP + FN), which is also F1."""
        special = empty.overlap(not self.truth, not self.predicted, "dice")
        return 2 * self.tp / (self.truth + self.predicted) if special is None else special

    def iou(self, empty: Empty = Empty.SKIP) -> float:
        """TP / (TP + FP + FN)."""
        special = empty.overlap(not self.truth, not self.predicted, "iou")
        return self.tp / (self.tp + self.fp + self.fn) if special is None else special

    @property
    def truth(self) -> int:
        """Pixels of the truth."""
        return self.tp + self.fn

    @property
    def predicted(self) -> int:
        """Pixels of the prediction."""
        return self.tp + self.fp

    @property
    def sensitivity(self) -> float:
        """TP / (TP + FN); NaN where the truth is empty."""
        return ratio(self.tp, self.truth)

    @property
    def specificity(self) -> float:
        """TN / (TN + FP); NaN where the truth is everything."""
        return ratio(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        """TP / (TP + FP); 0 where nothing was predicted but should have been, NaN if both are empty."""
        return ratio(self.tp, self.predicted) if self.predicted or not self.truth else 0.0

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity."""
        return (self.sensitivity + self.specificity) / 2

    @property
    def mcc(self) -> float:
        """Matthews' correlation; NaN if either mask is empty or everything."""
        product = self.truth * self.predicted * (self.tn + self.fp) * (self.tn + self.fn)
        return ratio(self.tp * self.tn - self.fp * self.fn, sqrt(product))

    @property
    def kappa(self) -> float:
        """Cohen's kappa; NaN where chance alone agrees everywhere."""
        total = self.tp + self.fp + self.fn + self.tn
        chance = self.truth * self.predicted + (self.tn + self.fp) * (self.tn + self.fn)
        return ratio((self.tp + self.tn) * total - chance, total * total - chance)

    @property
    def volume_difference(self) -> float:
        """|predicted - true| / true pixels; NaN where the truth is empty."""
        return ratio(abs(self.predicted - self.truth), self.truth)


def confusion(truth: AnyMask, predicted: AnyMask) -> Confusion:
    """Count the pixels of two masks of equal shape; what is not 0 belongs to a mask. Raises WSI800."""
    t, p = as_masks(truth, predicted)
    both, true, found = (int(np.count_nonzero(m)) for m in (t & p, t, p))
    return Confusion(both, found - both, true - both, t.size - true - found + both)


def class_confusions(truth: LabelMap, predicted: LabelMap, classes: Sequence[int]) -> dict[int, Confusion]:
    """The pixel counts of each class of two maps of classes, from one pass over the pixels.

    Raises UsageError: WSI800 for different shapes, WSI801 for arrays that hold no labels or a class below 1.
    """
    if any(c < 1 for c in classes):
        raise UsageError("WSI801", f"0 is background; classes are above it, got {list(classes)}")
    table = Contingency.of(truth, predicted)
    true = dict(zip(table.truth_ids.tolist(), table.truth_area.tolist(), strict=True))
    found = dict(zip(table.predicted_ids.tolist(), table.predicted_area.tolist(), strict=True))
    same = table.truth_ids[table.truth] == table.predicted_ids[table.predicted]
    both = dict(zip(table.truth_ids[table.truth[same]].tolist(), table.shared[same].tolist(), strict=True))
    out = {}
    for c in classes:
        tp, t, p = both.get(c, 0), true.get(c, 0), found.get(c, 0)
        out[c] = Confusion(tp, p - tp, t - tp, truth.size - t - p + tp)
    return out


def dice(truth: AnyMask, predicted: AnyMask, empty: Empty = Empty.SKIP) -> float:
    """Dice of two masks; `empty` says what it is without pixels. Raises WSI800."""
    return confusion(truth, predicted).dice(empty)


def iou(truth: AnyMask, predicted: AnyMask, empty: Empty = Empty.SKIP) -> float:
    """Intersection over union of two masks; `empty` says what it is without pixels. Raises WSI800."""
    return confusion(truth, predicted).iou(empty)


def centreline_dice(truth: AnyMask, predicted: AnyMask, empty: Empty = Empty.SKIP) -> float:
    """clDice of two masks in 2-D or 3-D (Shit et al. 2021): how much of each skeleton lies in the other mask.

    Skeletons are scikit-image's, by Zhang in 2-D and by Lee in 3-D; NaN where thinning leaves nothing of a
    mask, as it does of some blobs in 3-D. Raises WSI800, WSI808 for other axes.
    """
    from skimage.morphology import skeletonize

    t, p = as_masks(truth, predicted)
    if t.ndim not in (2, 3):
        raise UsageError("WSI808", f"skeletons are made of 2 or 3 axes, got {t.ndim}")
    special = empty.overlap(not t.any(), not p.any(), "cldice")
    if special is not None:
        return special
    t_line, p_line = skeletonize(t) > 0, skeletonize(p) > 0
    precision = ratio(int(np.count_nonzero(p_line & t)), int(np.count_nonzero(p_line)))
    recall = ratio(int(np.count_nonzero(t_line & p)), int(np.count_nonzero(t_line)))
    return ratio(2 * precision * recall, precision + recall) if precision + recall else 0.0


def as_masks(truth: AnyMask, predicted: AnyMask) -> tuple[Mask, Mask]:
    """Both as booleans. Raises UsageError WSI800 for different shapes."""
    if truth.shape != predicted.shape:
        raise UsageError(
            "WSI800",
            f"truth is {truth.shape} and prediction {predicted.shape}; bring both onto one pixel grid",
        )
    return truth != 0, predicted != 0
