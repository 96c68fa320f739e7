"""Which objects of two label maps share pixels: one table, from which every instance metric follows.

No mask per object and no loop over pairs: the maps are cut into runs of equal (truth, predicted), and all
the rest works on the runs. That is one pass over the pixels, whatever the number of objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError

__all__ = ["Contingency", "as_labels"]

LabelMap = npt.NDArray[np.number | np.bool_]
Ids = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


HIGHEST = 2**63 - 1
EXACT = 2.0**53
"""Beyond it floats are no longer whole numbers one by one; NaN and infinity are not below it either."""


@dataclass(frozen=True)
class Contingency:
    """The objects of two label maps with their areas, and the pairs that share pixels.

    Objects stand in ascending order of their label, background left out; labels need not be contiguous.
    `truth[k]` and `predicted[k]` index into the objects, `shared[k] > 0` is the number of pixels that the
    two have in common. Pairs stand in ascending order of (truth, predicted).
    """

    truth_ids: Ids
    predicted_ids: Ids
    truth_area: Ids
    predicted_area: Ids
    truth: Indices
    predicted: Indices
    shared: Ids

    @classmethod
    def of(cls, truth: LabelMap, predicted: LabelMap) -> Contingency:
        """Compare two label maps of equal shape, of any number of axes, with 0 for background.

        Raises UsageError: WSI800 for different shapes, WSI801 for arrays that hold no labels.
        """
        if truth.shape != predicted.shape:
            raise UsageError(
                "WSI800",
                f"truth is {truth.shape} and prediction {predicted.shape}; bring both onto one pixel grid",
            )
        flat_truth, flat_predicted = as_labels(truth).ravel(), as_labels(predicted).ravel()
        starts, length = _runs(flat_truth, flat_predicted)
        truth_ids, truth_index, truth_area = _objects(flat_truth[starts], length)
        predicted_ids, predicted_index, predicted_area = _objects(flat_predicted[starts], length)
        both = (truth_index >= 0) & (predicted_index >= 0)
        columns = max(predicted_ids.size, 1)
        keys, inverse = np.unique(truth_index[both] * columns + predicted_index[both], return_inverse=True)
        shared = _sums(inverse, length[both], keys.size)
        return cls(
            truth_ids, predicted_ids, truth_area, predicted_area, keys // columns, keys % columns, shared
        )

    @property
    def union(self) -> Ids:
        """Number of pixels that the two objects of each pair cover together."""
        return self.truth_area[self.truth] + self.predicted_area[self.predicted] - self.shared

    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each pair; pairs that share nothing are not listed, theirs is 0."""
        return np.asarray(self.shared / self.union, dtype=np.float64)

    def select(self, truth: Mask, predicted: Mask) -> Contingency:
        """The table of some objects only: `truth` (objects,) and `predicted` (objects,) are True for those.

        What the other objects covered counts as background, as if they had been erased from the maps.
        """
        kept = truth[self.truth] & predicted[self.predicted]
        return Contingency(
            self.truth_ids[truth],
            self.predicted_ids[predicted],
            self.truth_area[truth],
            self.predicted_area[predicted],
            (np.cumsum(truth) - 1)[self.truth[kept]],
            (np.cumsum(predicted) - 1)[self.predicted[kept]],
            self.shared[kept],
        )


def as_labels(array: npt.NDArray[np.generic]) -> npt.NDArray[np.integer]:
    """The array as integer labels, without a copy if it holds integers; PanNuke stores whole floats.

    Raises UsageError WSI801 for numbers below 0 or not whole, and for arrays of anything else.
    """
    labels = _whole(array)
    lowest = int(labels.min()) if labels.size and labels.dtype.kind == "i" else 0
    if labels.size and labels.dtype == np.uint64 and int(labels.max()) > HIGHEST:
        raise UsageError("WSI801", f"a label map holds {labels.max()}; number its objects below 2**63")
    if lowest < 0:
        raise UsageError(
            "WSI801", f"a label map holds {lowest}; set to 0 what is background or to be ignored"
        )
    return labels


def _whole(array: npt.NDArray[np.generic]) -> npt.NDArray[np.integer]:
    """As integers, if nothing is lost by it."""
    if array.dtype.kind in "iu":
        return np.asarray(array)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and (np.abs(array) < EXACT).all():
        labels = array.astype(np.int64)
        if (labels == array).all():
            return labels
    raise UsageError(
        "WSI801", f"labels must be whole numbers, got {array.dtype} that is not; pass a label map"
    )


def _runs(truth: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> tuple[Indices, Ids]:
    """Where runs of one pair of labels start, and how long they are."""
    if truth.size == 0:
        return np.zeros(0, np.intp), np.zeros(0, np.int64)
    change = truth[1:] != truth[:-1]
    change |= predicted[1:] != predicted[:-1]
    starts = np.concatenate([[0], np.flatnonzero(change) + 1])
    return starts, np.diff(starts, append=truth.size)


def _objects(labels: npt.NDArray[np.integer], length: Ids) -> tuple[Ids, Indices, Ids]:
    """Labels without background, the index of each run's label among them (-1 for background), areas."""
    values, index = np.unique(labels, return_inverse=True)
    area = _sums(index, length, values.size)
    if values.size and values[0] == 0:
        return values[1:].astype(np.int64), index - 1, area[1:]
    return values.astype(np.int64), index, area


def _sums(index: Indices, weights: Ids, size: int) -> Ids:
    """Sum of the weights of each index; exact, as pixels are counted in float64 far below 2**53."""
    return np.bincount(index, weights, minlength=size).astype(np.int64)
