"""Detection by centroids: who is paired with whom, and the F1 of all and of each type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.assignment import best_pairs
from wsitk.metrics.contingency import LabelMap, as_labels
from wsitk.metrics.counts import Counts, ratio

__all__ = [
    "Pairs",
    "Protocol",
    "TypeScore",
    "TypedCounts",
    "centroids",
    "detection_counts",
    "detection_f1",
    "pair_points",
    "typed_counts",
]

Points = npt.NDArray[np.number]
Types = npt.NDArray[np.integer]
Indices = npt.NDArray[np.intp]

Protocol = Literal["gated", "hovernet"]
"""`gated`: as many pairs within the radius as there can be, and of those the nearest. `hovernet`: the least
total distance over all points, near or far, and then a cut at the radius, as HoVer-Net and CellViT publish;
a far pair may take a point from a near one, so that legal pairs are lost."""

HOVERNET_CELLS = 25_000_000
"""The largest matrix of all against all that `hovernet` solves: 5,000 by 5,000 points, 200 MB."""


REACH_PAIRS = 20_000_000
"""The most pairs within reach that `gated` takes on, 1 GB. A million nuclei at 3 µm have about as many pairs."""


@dataclass(frozen=True)
class Pairs:
    """Paired points, as indices into both sets in ascending order of the first, and those left over."""

    truth: Indices
    predicted: Indices
    distance: npt.NDArray[np.float64]
    unpaired_truth: Indices
    unpaired_predicted: Indices

    @property
    def counts(self) -> Counts:
        """The numbers of pairs and of points without; the overlap is 0."""
        return Counts(self.truth.size, self.unpaired_predicted.size, self.unpaired_truth.size)


@dataclass(frozen=True)
class TypeScore:
    """F1, precision and recall of one type; NaN where nothing is there to count."""

    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class TypedCounts:
    """Pairs by the types of both partners, and points without partner by type. Counts of images add up.

    `paired[i, j]` counts true points of `classes[i]` paired with predictions of `classes[j]`; the last row,
    column and entry stand for types that are not in `classes`, so that every point is counted somewhere.
    """

    classes: tuple[int, ...]
    paired: npt.NDArray[np.int64]
    missed: npt.NDArray[np.int64]
    spurious: npt.NDArray[np.int64]

    def __add__(self, other: TypedCounts) -> TypedCounts:
        if self.classes != other.classes:
            raise UsageError(
                "WSI803", f"counts of classes {self.classes} and of {other.classes} do not add up"
            )
        return TypedCounts(
            self.classes,
            self.paired + other.paired,
            self.missed + other.missed,
            self.spurious + other.spurious,
        )

    @property
    def detection(self) -> Counts:
        """Counts with types left aside."""
        return Counts(int(self.paired.sum()), int(self.spurious.sum()), int(self.missed.sum()))

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose types agree; NaN without pairs. Types outside `classes` never agree."""
        total = int(self.paired.sum())
        return int(np.trace(self.paired[:-1, :-1])) / total if total else float("nan")

    def score(self, type_id: int, weights: tuple[float, float, float, float] = (2, 2, 1, 1)) -> TypeScore:
        """F1, precision and recall of one type (Graham et al. 2019, section IV.B, "F_c").

        `weights` are those of wrongly given types, wrongly withheld types, spurious and missed points. Only
        pairs with the type on either side count, so that the formula's TN is always 0. Raises WSI803.
        """
        if type_id not in self.classes:
            raise UsageError("WSI803", f"type {type_id} was not counted; take one of {self.classes}")
        k = self.classes.index(type_id)
        hit = int(self.paired[k, k])
        given = weights[0] * (int(self.paired[:, k].sum()) - hit) + weights[2] * int(self.spurious[k])
        withheld = weights[1] * (int(self.paired[k].sum()) - hit) + weights[3] * int(self.missed[k])
        return TypeScore(
            ratio(2 * hit, 2 * hit + given + withheld), ratio(hit, hit + given), ratio(hit, hit + withheld)
        )


def centroids(labels: LabelMap) -> npt.NDArray[np.float64]:
    """Centre of mass of each instance, (instances, axes), in ascending order of the label."""
    labels = as_labels(labels)
    positions = np.nonzero(labels)
    if positions[0].size == 0:
        return np.zeros((0, labels.ndim))
    _, index, area = np.unique(labels[positions], return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, axis) / area for axis in positions], axis=1)


def pair_points(truth: Points, predicted: Points, radius: float, protocol: Protocol = "gated") -> Pairs:
    """Pair points one to one, at most `radius` apart (the radius included).

    Both arrays are (n, axes), in the same unit as `radius`; axes in any order, the same in both. `gated`
    takes time and memory by the number of pairs within reach, so that whole slides are no trouble.

    Raises UsageError: WSI803 for arrays of other shapes, WSI804 for a radius that is not above 0, WSI805 for
    an unknown protocol, WSI806 for more than can be compared at once: points with `hovernet`, pairs within
    reach with `gated`.
    """
    truth, predicted = _points(truth, "truth"), _points(predicted, "prediction")
    if truth.shape[0] and predicted.shape[0] and truth.shape[1] != predicted.shape[1]:
        raise UsageError(
            "WSI803", f"points of {truth.shape[1]} and of {predicted.shape[1]} axes; give the same"
        )
    if not (np.isfinite(radius) and radius > 0):
        raise UsageError("WSI804", f"the radius must be a number above 0, got {radius}")
    if protocol not in get_args(Protocol):
        raise UsageError("WSI805", f"no protocol {protocol!r}; take one of {', '.join(get_args(Protocol))}")
    pair = _gated if protocol == "gated" else _hovernet
    if len(truth) == 0 or len(predicted) == 0:
        rows, columns, distance = np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    else:
        rows, columns, distance = pair(truth, predicted, radius)
    return Pairs(rows, columns, distance, _others(rows, len(truth)), _others(columns, len(predicted)))


def detection_counts(truth: Points, predicted: Points, radius: float, protocol: Protocol = "gated") -> Counts:
    """Counts of `pair_points`; the overlap is 0."""
    return pair_points(truth, predicted, radius, protocol).counts


def detection_f1(truth: Points, predicted: Points, radius: float, protocol: Protocol = "gated") -> float:
    """F1 of `detection_counts`; NaN for two empty sets."""
    return detection_counts(truth, predicted, radius, protocol).f1


def typed_counts(
    pairs: Pairs, truth_types: Types, predicted_types: Types, classes: tuple[int, ...]
) -> TypedCounts:
    """Sort `pairs` by type: `truth_types` and `predicted_types` hold one type for each point, in order.

    Raises UsageError WSI803 if their number is not that of the points.
    """
    for name, types, paired, left in (
        ("truth", truth_types, pairs.truth, pairs.unpaired_truth),
        ("prediction", predicted_types, pairs.predicted, pairs.unpaired_predicted),
    ):
        if types.shape != (paired.size + left.size,):
            wanted = paired.size + left.size
            raise UsageError(
                "WSI803", f"{name} has {wanted} points, types are {types.shape}; give one for each"
            )
    side = len(classes) + 1
    t, p = _positions(truth_types, classes), _positions(predicted_types, classes)
    paired_flat = np.bincount(t[pairs.truth] * side + p[pairs.predicted], minlength=side * side)
    return TypedCounts(
        tuple(classes),
        paired_flat.reshape(side, side),
        np.bincount(t[pairs.unpaired_truth], minlength=side),
        np.bincount(p[pairs.unpaired_predicted], minlength=side),
    )


def _positions(types: Types, classes: tuple[int, ...]) -> Indices:
    """Where each type stands in `classes`; past the end if it does not."""
    position = np.full(types.shape, len(classes), np.intp)
    for k, c in enumerate(classes):
        position[types == c] = k
    return position


def _points(points: Points, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(points, np.float64)
    if array.size == 0:
        return array.reshape(0, array.shape[1] if array.ndim == 2 else 0)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise UsageError(
            "WSI803", f"{name} must be (points, axes) of finite numbers, got shape {array.shape}"
        )
    return array


def _gated(
    truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64], radius: float
) -> tuple[Indices, Indices, npt.NDArray[np.float64]]:
    from scipy.spatial import cKDTree

    tree, other = cKDTree(truth), cKDTree(predicted)
    within = int(tree.count_neighbors(other, radius))
    if within > REACH_PAIRS:
        raise UsageError(
            "WSI806",
            f"{within} pairs lie within {radius} of each other, far more than objects; is the radius in the "
            "points' own unit?",
        )
    near = tree.sparse_distance_matrix(other, radius, output_type="coo_matrix")
    rows, columns = near.row.astype(np.intp), near.col.astype(np.intp)
    order = np.lexsort((columns, rows))  # the tree's own order says nothing
    rows, columns, distance = rows[order], columns[order], np.asarray(near.data)[order]
    # A point alone costs more than any number of pairs within reach, so that pairs come before nearness.
    alone = (radius + 1) * (min(len(truth), len(predicted)) + 1)
    chosen = best_pairs(rows, columns, distance, alone)
    return rows[chosen], columns[chosen], distance[chosen]


def _hovernet(
    truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64], radius: float
) -> tuple[Indices, Indices, npt.NDArray[np.float64]]:
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    if len(truth) * len(predicted) > HOVERNET_CELLS:
        raise UsageError(
            "WSI806",
            f"the hovernet protocol compares all points, {len(truth)} with {len(predicted)}, which is too many; "
            "evaluate tile by tile, or take the gated protocol",
        )
    distance = cdist(truth, predicted)
    rows, columns = linear_sum_assignment(distance)
    near = distance[rows, columns] <= radius
    return rows[near], columns[near], distance[rows[near], columns[near]]


def _others(taken: Indices, size: int) -> Indices:
    left = np.ones(size, bool)
    left[taken] = False
    return np.flatnonzero(left)
