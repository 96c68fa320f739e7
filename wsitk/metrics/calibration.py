"""Whether probabilities mean what they say: reliability, ECE, Brier score, log score, and intervals.

Everything is made of sums over items, so that images add up, slides can be drawn again by `bootstrap`, and a
map of any size is read block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError

__all__ = [
    "Binning",
    "Reliability",
    "bin_sums",
    "brier_score",
    "calibration_error",
    "equal_mass_edges",
    "equal_width_edges",
    "interval_scores",
    "log_score",
    "reliability",
]

Floats = npt.NDArray[np.float64]
Binning = Literal["width", "mass"]

FLOOR = 1e-7
"""Probabilities nearer to 0 or 1 count as this near: one object that is wrong at float32's 1 must not decide."""


@final
@dataclass(frozen=True)
class Reliability:
    """Items by their confidence: how sure they were, and how often they were right.

    Attributes
    ----------
    edges : float64 (B + 1,)
        Bin ``b`` holds confidences above ``edges[b]`` and up to ``edges[b + 1]``; the first holds ``edges[0]`` too.
    count, confidence, right : float64 (B,)
        Items, sum of their confidences, and how many were right.
    """

    edges: Floats
    count: Floats
    confidence: Floats
    right: Floats

    def __add__(self, other: Reliability) -> Reliability:
        """Add the items of another image. Raises UsageError (WSI840) for other edges."""
        if not np.array_equal(self.edges, other.edges):
            raise UsageError("WSI840", "reliabilities of other bins do not add up; give all the same edges")
        return Reliability(
            self.edges,
            self.count + other.count,
            self.confidence + other.confidence,
            self.right + other.right,
        )

    @property
    def sums(self) -> Floats:
        """Return (3 B,) sums for `bootstrap`: counts, confidences, right ones."""
        return np.concatenate([self.count, self.confidence, self.right])

    @property
    def points(self) -> tuple[Floats, Floats]:
        """Return mean confidence and share of right ones of each bin; NaN where a bin is empty."""
        return _divide(self.confidence, self.count), _divide(self.right, self.count)

    @property
    def ece(self) -> float:
        """Return the expected calibration error; NaN without items."""
        return float(calibration_error(self.sums[None])[0])

    @property
    def worst(self) -> float:
        """Return the largest gap of a bin that holds anything (MCE); NaN without items."""
        confidence, accuracy = self.points
        held = self.count > 0
        return float(np.abs(confidence - accuracy)[held].max()) if held.any() else float("nan")


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike, edges: npt.ArrayLike) -> Reliability:
    """Return how often items (N,) were `right` by their `confidence` (N,), in the bins of `edges` (B + 1,).

    Raises UsageError (WSI840) for lengths that differ, confidences outside 0 to 1 and edges that don't ascend
    from 0 to 1.
    """
    p, r = _checked(confidence, right)
    e = np.asarray(edges, np.float64)
    if e.ndim != 1 or len(e) < 2 or e[0] != 0 or e[-1] != 1 or (np.diff(e) <= 0).any():
        raise UsageError("WSI840", f"edges of bins ascend from 0 to 1, got {e.tolist()[:5]} ...")
    return Reliability(e, *bin_sums(p, r, e))


def bin_sums(p: Floats, right: Floats, edges: Floats) -> tuple[Floats, Floats, Floats]:
    """Return items, sum of `p` and of `right` for each bin; edges are compared as they are, never computed."""
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, bins - 1)
    return (
        np.bincount(place, minlength=bins).astype(np.float64),
        np.bincount(place, p, minlength=bins).astype(np.float64),
        np.bincount(place, right, minlength=bins).astype(np.float64),
    )


def equal_width_edges(bins: int = 15) -> Floats:
    """Return edges of bins of one width, as Guo et al. (1706.04599, eq. 3) have them. Raises UsageError (WSI840)."""
    if bins < 1:
        raise UsageError("WSI840", f"reliability needs a bin, got {bins}; 15 is usual")
    return np.arange(bins + 1) / bins


def equal_mass_edges(confidence: npt.ArrayLike, bins: int = 15) -> Floats:
    """Return edges of bins that hold equally many items, as far as ties allow: equal confidences share a bin.

    A value goes to the bin in which the middle of its rank lies ("adaptive" ECE, Nguyen & O'Connor 2015), and an
    edge lies halfway between the values on its sides. So there may be fewer bins than asked for.
    """
    if bins < 1:
        raise UsageError("WSI840", f"reliability needs a bin, got {bins}; 15 is usual")
    values, count = np.unique(np.asarray(confidence, np.float64).ravel(), return_counts=True)
    if not len(values):
        return np.array([0.0, 1.0])
    middle = np.cumsum(count) - count / 2
    place = np.minimum((bins * middle / count.sum()).astype(np.int64), bins - 1)
    last = np.flatnonzero(np.diff(place) > 0)
    halfway = (values[last] + values[last + 1]) / 2
    # of two neighbours in float64 the mean may be the upper one, which would fall below its own edge
    between = np.where(halfway < values[last + 1], halfway, values[last])
    inner = between[(between > 0) & (between < 1)]
    return np.concatenate([[0.0], inner, [1.0]])


def calibration_error(sums: Floats) -> Floats:
    """Return the ECE of each row of (D, 3 B) `Reliability.sums`; NaN for rows without items. For `bootstrap`."""
    count, confidence, right = np.split(sums, 3, axis=1)
    return _divide(np.abs(confidence - right).sum(axis=1), count.sum(axis=1))


def brier_score(confidence: npt.ArrayLike, right: npt.ArrayLike) -> Floats:
    """Return each item's squared distance from the truth (Brier 1950), (N,). Raises UsageError (WSI840)."""
    p, r = _checked(confidence, right)
    return np.asarray((p - r) ** 2)


def log_score(confidence: npt.ArrayLike, right: npt.ArrayLike) -> Floats:
    """Return each item's negative log likelihood in nats, (N,), of probabilities kept `FLOOR` away from 0 and 1.

    Raises UsageError (WSI840).
    """
    p, r = _checked(confidence, right)
    return np.asarray(-np.log(np.clip(np.where(r > 0, p, 1 - p), FLOOR, 1 - FLOOR)))


def interval_scores(
    low: npt.ArrayLike, high: npt.ArrayLike, truth: npt.ArrayLike, level: float
) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Return whether each interval (N,) covers the truth, its width, and its interval score.

    Borders belong to the interval. The score (Winkler 1972; Gneiting & Raftery 2007, eq. 43) is the width, and
    ``2 / (1 - level)`` times how far outside the truth lies: lower is better, and honest intervals are best.
    Raises UsageError (WSI841) for lengths that differ, intervals upside down, or a level outside (0, 1).
    """
    a, b, x = (np.asarray(v, np.float64).ravel() for v in (low, high, truth))
    if not len(a) == len(b) == len(x) or (a > b).any() or not np.isfinite([*a, *b, *x]).all():
        raise UsageError(
            "WSI841", "intervals need a low, a high that is no less, and a truth each, all finite"
        )
    if not 0 < level < 1:
        raise UsageError("WSI841", f"the level of an interval lies between 0 and 1, got {level}")
    outside = np.maximum(a - x, 0) + np.maximum(x - b, 0)
    return (a <= x) & (x <= b), b - a, b - a + 2 / (1 - level) * outside


def _checked(confidence: npt.ArrayLike, right: npt.ArrayLike) -> tuple[Floats, Floats]:
    p, r = np.asarray(confidence, np.float64).ravel(), np.asarray(right, np.float64).ravel()
    if len(p) != len(r):
        raise UsageError("WSI840", f"{len(p)} confidences and {len(r)} outcomes; give one for each")
    if len(p) and not (p.min() >= 0 and p.max() <= 1):
        raise UsageError("WSI840", f"confidences lie in 0 to 1, got {p.min()} to {p.max()}")
    if not np.isin(r, (0.0, 1.0)).all():
        raise UsageError("WSI840", "outcomes are right or wrong, 1 or 0")
    return p, r


def _divide(part: Floats, whole: Floats) -> Floats:
    """NaN, without a warning, where there is nothing to divide by."""
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0))
