"""Whether doubt finds errors: risk against coverage, and detection of what is wrong by how doubtful it is.

All is computed from how many right and how many wrong items have each level of doubt. Ties are therefore exact:
items of equal doubt stand in no order, and figures are the expectation over all of their orders. A slide's worth of
items is a few hundred levels, and draws of the bootstrap are matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError

__all__ = [
    "Graded",
    "aurc",
    "error_auprc",
    "error_auroc",
    "excess_aurc",
    "levels_of",
    "precision_recall",
    "risk_coverage",
    "roc",
]

Floats = npt.NDArray[np.float64]


@final
@dataclass(frozen=True)
class Graded:
    """How many items are right and how many are wrong at each level of doubt.

    Attributes
    ----------
    doubt : float64 (K,)
        Ascending, each value once.
    right, wrong : float64 (K,)
        Whole numbers.
    """

    doubt: Floats
    right: Floats
    wrong: Floats

    @classmethod
    def of(cls, doubt: npt.ArrayLike, wrong: npt.ArrayLike) -> Graded:
        """Count items (N,) by their doubt. Raises UsageError (WSI842) for lengths that differ, or NaN."""
        d, w = np.asarray(doubt, np.float64).ravel(), np.asarray(wrong, bool).ravel()
        if len(d) != len(w) or np.isnan(d).any():
            raise UsageError(
                "WSI842", f"{len(d)} doubts and {len(w)} outcomes; give one number for each item"
            )
        values, place = np.unique(d, return_inverse=True)
        return cls(values, *counts_at(place, w, len(values)))

    @property
    def items(self) -> float:
        """Return how many items there are."""
        return float(self.right.sum() + self.wrong.sum())

    @property
    def errors(self) -> float:
        """Return how many of them are wrong."""
        return float(self.wrong.sum())


def counts_at(
    place: npt.NDArray[np.intp], wrong: npt.NDArray[np.bool_], levels: int
) -> tuple[Floats, Floats]:
    """Return how many right and how many wrong items stand at each of `levels` places."""
    lost = np.bincount(place[wrong], minlength=levels).astype(np.float64)
    return np.bincount(place, minlength=levels) - lost, lost


def levels_of(doubt: npt.ArrayLike, most: int) -> Floats:
    """Return the upper ends of at most `most` levels that hold about equally many items; values are never split.

    ``np.searchsorted(levels, doubt)`` is each item's level. With no more distinct values than `most` each has a level
    of its own, and nothing is lost.
    """
    values, count = np.unique(np.asarray(doubt, np.float64).ravel(), return_counts=True)
    if len(values) <= most:
        return values
    place = ((np.cumsum(count) - count / 2) * most / count.sum()).astype(np.int64)
    return np.asarray(values[np.append(np.flatnonzero(np.diff(place) > 0), len(values) - 1)])


def aurc(right: npt.ArrayLike, wrong: npt.ArrayLike) -> Floats:
    """Area under the risk-coverage curve of counts (..., K) in ascending doubt; NaN without items.

    The mean, over all coverages ``k / n``, of the share of errors among the ``k`` least doubtful items (Geifman &
    El-Yaniv 1705.08500; 1805.08206, eq. 3). Of ``m`` items that tie, ``w`` of them wrong, after ``N`` items with
    ``E`` errors, the ``j``-th cut holds ``E + w j / m`` errors in expectation; the sum over ``j`` has a closed form in
    harmonic numbers, so that no item is looked at alone.
    """
    r, w = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    m = r + w
    before, errors = np.cumsum(m, axis=-1) - m, np.cumsum(w, axis=-1) - w
    slope = np.divide(w, m, out=np.zeros(m.shape), where=m > 0)
    area = w + (errors - slope * before) * (_harmonic(before + m) - _harmonic(before))
    return _divide(area.sum(axis=-1), m.sum(axis=-1))


def excess_aurc(right: npt.ArrayLike, wrong: npt.ArrayLike) -> Floats:
    """How much worse the AURC is than that of a doubt that ranks every error last (E-AURC, 1805.08206, eq. 5).

    Against the exact optimum of that many items, not its approximation for many.
    """
    r, w = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    good, bad = r.sum(axis=-1), w.sum(axis=-1)
    best = bad - good * (_harmonic(good + bad) - _harmonic(good))
    return aurc(r, w) - _divide(best, good + bad)


def error_auroc(right: npt.ArrayLike, wrong: npt.ArrayLike) -> Floats:
    """Chance that a wrong item is more doubtful than a right one, ties as one half; NaN without either."""
    r, w = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    below = np.cumsum(r, axis=-1) - r / 2
    return _divide((w * below).sum(axis=-1), w.sum(axis=-1) * r.sum(axis=-1))


def error_auprc(right: npt.ArrayLike, wrong: npt.ArrayLike) -> Floats:
    """Average precision of finding wrong items by doubt, most doubtful first; NaN without errors.

    The sum of precision times the step in recall over the thresholds; items that tie share one. A doubt that knows
    nothing has the share of errors.
    """
    r, w = (np.asarray(v, np.float64)[..., ::-1] for v in (right, wrong))
    found, shown = np.cumsum(w, axis=-1), np.cumsum(r + w, axis=-1)
    precision = np.divide(found, shown, out=np.zeros(shown.shape), where=shown > 0)
    return _divide((w * precision).sum(axis=-1), w.sum(axis=-1))


def risk_coverage(graded: Graded, points: int = 200) -> tuple[Floats, Floats]:
    """Return coverage and expected risk where a level of doubt ends, and at `points` places evenly between.

    Within a level items stand in no order, so that the errors among the first ``t`` grow evenly with ``t``. Taken at
    ``t = 1 .. n`` the mean risk is the AURC. Empty without items.
    """
    m = graded.right + graded.wrong
    held = m > 0
    ends, errors = np.cumsum(m)[held], np.cumsum(graded.wrong)[held]
    if not len(ends):
        return np.zeros(0), np.zeros(0)
    taken = np.unique(np.concatenate([ends, np.linspace(1, ends[-1], points)]))
    found = np.interp(taken, np.append(0, ends), np.append(0, errors))
    return taken / ends[-1], found / taken


def roc(graded: Graded) -> tuple[Floats, Floats]:
    """Return the share of right and of wrong items that are at least as doubtful as each level, from (0, 0) on."""
    shares = []
    for counts in (graded.right, graded.wrong):
        found = np.cumsum(counts[::-1])
        shares.append(np.concatenate([[0.0], found / max(1.0, float(counts.sum()))]))
    return shares[0], shares[1]


def precision_recall(graded: Graded) -> tuple[Floats, Floats]:
    """Return recall and precision of finding errors where the most doubtful levels are shown, (K,).

    Between two of them precision is no straight line; the steps at the later one's precision have the AUPRC as area.
    """
    w, m = graded.wrong[::-1], (graded.right + graded.wrong)[::-1]
    held = m > 0
    found, shown = np.cumsum(w)[held], np.cumsum(m)[held]
    return found / max(1.0, float(w.sum())), found / shown


def _harmonic(n: Floats) -> Floats:
    """Return 1 + 1/2 + ... + 1/n, but for a constant that differences lose."""
    from scipy.special import digamma

    return np.asarray(digamma(n + 1.0))


def _divide(part: Floats, whole: Floats) -> Floats:
    """NaN, without a warning, where there is nothing to divide by."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))
