"""Instance metrics: panoptic quality from one contingency table, and detection by centroids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

LabelMap = npt.NDArray[np.integer]
Points = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Counts:
    """Matched and unmatched objects, and the overlap of the matched. Counts of images add up."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou_sum + other.iou_sum
        )

    @property
    def f1(self) -> float:
        """Detection quality; NaN where there is nothing in the truth and nothing was found."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")

    @property
    def precision(self) -> float:
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else float("nan")

    @property
    def recall(self) -> float:
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else float("nan")

    @property
    def sq(self) -> float:
        """Mean overlap of the matched objects; 0 where none is matched."""
        return self.iou_sum / self.tp if self.tp else 0.0

    @property
    def pq(self) -> float:
        """Panoptic quality: `f1 * sq`."""
        return self.f1 * self.sq


@dataclass(frozen=True)
class Overlaps:
    """The contingency table of two label maps: only the pairs that share pixels.

    `truth[k]` and `predicted[k]` index into `truth_area` and `predicted_area`, the areas of the labels in
    ascending order without background; `shared[k]` is the number of pixels that they have in common.
    """

    truth: npt.NDArray[np.intp]
    predicted: npt.NDArray[np.intp]
    shared: npt.NDArray[np.intp]
    truth_area: npt.NDArray[np.intp]
    predicted_area: npt.NDArray[np.intp]

    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each pair."""
        union = self.truth_area[self.truth] + self.predicted_area[self.predicted] - self.shared
        return np.asarray(self.shared / union, dtype=np.float64)


def overlaps(truth: LabelMap, predicted: LabelMap) -> Overlaps:
    """Compare two label maps of equal shape, of any number of axes, with 0 for background."""
    if truth.shape != predicted.shape:
        raise ValueError(f"label maps of different shapes: {truth.shape} and {predicted.shape}")
    truth_index, truth_area = _compact(truth)
    predicted_index, predicted_area = _compact(predicted)
    both = (truth_index >= 0) & (predicted_index >= 0)
    columns = max(predicted_area.size, 1)
    pair, shared = np.unique(truth_index[both] * columns + predicted_index[both], return_counts=True)
    return Overlaps(pair // columns, pair % columns, shared, truth_area, predicted_area)


def _compact(labels: LabelMap) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Flat labels as 0, 1, ... with -1 for background, and the area of each."""
    values, index, area = np.unique(labels.ravel(), return_inverse=True, return_counts=True)
    if values.size and values[0] == 0:
        return index - 1, area[1:]
    return index, area


def panoptic_counts(truth: LabelMap, predicted: LabelMap, threshold: float = 0.5) -> Counts:
    """Match instances whose IoU is above `threshold`; at 0.5 and more a match is unique by itself."""
    if threshold < 0.5:
        raise ValueError(f"below an IoU of 0.5 matches are ambiguous; threshold was {threshold}")
    table = overlaps(truth, predicted)
    iou = table.iou()
    matched = iou > threshold
    tp = int(matched.sum())
    return Counts(tp, table.predicted_area.size - tp, table.truth_area.size - tp, float(iou[matched].sum()))


def binary_pq(truth: LabelMap, predicted: LabelMap, threshold: float = 0.5) -> float:
    """Panoptic quality of one image with all instances in one class; NaN for two empty maps."""
    return panoptic_counts(truth, predicted, threshold).pq


def centroids(labels: LabelMap) -> npt.NDArray[np.float64]:
    """Centre of mass of each instance, (instances, axes), in ascending order of the label."""
    positions = np.nonzero(labels)
    if positions[0].size == 0:
        return np.zeros((0, labels.ndim))
    _, index, area = np.unique(labels[positions], return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, axis) / area for axis in positions], axis=1)


def detection_counts(truth: Points, predicted: Points, radius: float) -> Counts:
    """Pair points one to one, at most `radius` apart, with the least total distance (Hungarian).

    As many pairs as possible are made first, so that the result does not hang on which point is nearest to
    which. Both arrays are (n, axes) in the same unit as `radius`. The overlap of the result is 0.
    """
    tp = _pairs(np.asarray(truth, np.float64), np.asarray(predicted, np.float64), radius)
    return Counts(tp, len(predicted) - tp, len(truth) - tp)


def detection_f1(truth: Points, predicted: Points, radius: float) -> float:
    """F1 of `detection_counts`; NaN for two empty sets."""
    return detection_counts(truth, predicted, radius).f1


def _pairs(truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64], radius: float) -> int:
    """Number of pairs. Points that could pair form small clusters, and each is solved on its own."""
    if len(truth) == 0 or len(predicted) == 0:
        return 0
    near = cKDTree(truth).sparse_distance_matrix(cKDTree(predicted), radius, output_type="coo_matrix")
    rows, columns, distance = near.row, near.col, near.data
    nodes = len(truth) + len(predicted)
    graph = coo_array((np.ones(rows.size), (rows, columns + len(truth))), shape=(nodes, nodes))
    cluster = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(cluster, kind="stable")
    breaks = np.flatnonzero(np.diff(cluster[order])) + 1
    total = 0
    for edges in np.split(order, breaks):
        if edges.size == 1:
            total += 1
        elif edges.size:
            total += _assign(rows[edges], columns[edges], distance[edges], radius)
    return total


def _assign(
    rows: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
    distance: npt.NDArray[np.float64],
    radius: float,
) -> int:
    """Pairs of one cluster: pairs out of reach cost more than any full set of pairs within reach."""
    row_values, r = np.unique(rows, return_inverse=True)
    column_values, c = np.unique(columns, return_inverse=True)
    far = (radius + 1) * (min(row_values.size, column_values.size) + 1)
    cost = np.full((row_values.size, column_values.size), far)
    cost[r, c] = distance
    chosen = linear_sum_assignment(cost)
    return int((cost[chosen] < far).sum())
