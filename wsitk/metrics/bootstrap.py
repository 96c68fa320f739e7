"""Confidence intervals by drawing whole slides or patients again: tiles of one slide are no independent facts.

Every statistic here is a function of sums over items (counts; values and how many there are), and so a draw
of groups is a weighted sum of the groups' sums: thousands of draws are one product of two small matrices,
pooled figures included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.counts import Counts

__all__ = [
    "Interval",
    "bootstrap",
    "bootstrap_mean",
    "count_columns",
    "group_means",
    "pooled_f1",
    "pooled_pq",
    "pooled_precision",
    "pooled_recall",
    "pooled_sq",
]

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""(draws, columns) of sums -> (draws,); NaN where a draw holds nothing to divide by."""

DRAW_CELLS = 2_000_000
"""Draws are made in blocks of so many group numbers (16 MB)."""


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval, and what it rests on.

    `low` and `high` are NaN with fewer than two groups: one slide says nothing about the next. `undefined`
    counts draws on which the statistic is not defined; they are left out.
    """

    value: float
    low: float
    high: float
    level: float
    groups: int
    draws: int
    undefined: int = 0


def bootstrap(
    sums: npt.ArrayLike,
    groups: Sequence[object] | npt.NDArray[np.generic],
    statistic: Statistic,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a statistic of sums, over groups drawn with replacement.

    `sums` (items, columns) are what each item adds, `groups` (items,) names the slide or patient of each. The
    result hangs on neither the order of the items nor the threads, and is the same for the same seed.
    Raises UsageError WSI809 for lengths that differ, no item, sums that are not finite, fewer than 100 draws
    or a level outside (0, 1).
    """
    table = np.asarray(sums, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    _check(table, len(groups), draws, level)
    per_group = _group_sums(table, groups)
    value = float(statistic(per_group.sum(axis=0, keepdims=True))[0])
    count = len(per_group)
    if count < 2:
        return Interval(value, float("nan"), float("nan"), level, count, draws)
    drawn = np.concatenate([statistic(block) for block in _draw(per_group, draws, seed)])
    defined = drawn[~np.isnan(drawn)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if defined.size else (np.nan,) * 2
    return Interval(value, float(low), float(high), level, count, draws, int(draws - defined.size))


def bootstrap_mean(
    values: npt.ArrayLike,
    groups: Sequence[object] | npt.NDArray[np.generic],
    strata: Sequence[object] | npt.NDArray[np.generic] | None = None,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over items, NaN left out; or with `strata`, of the mean of the strata's means.

    `strata` (items,) names the tissue of each item, which gives PanNuke's mPQ. For a mean over slides, in
    which every slide weighs the same, pass `group_means`. If a value is infinite, so is the mean, and there
    is no interval. Raises as `bootstrap` does.
    """
    array = np.asarray(values, np.float64).ravel()
    layers = np.zeros(array.size, np.intp) if strata is None else _codes(strata)
    if layers.size != array.size:
        raise UsageError("WSI809", f"{array.size} values and {layers.size} strata; give one for each value")
    if np.isinf(array).any():
        _check(np.zeros((array.size, 1)), len(groups), draws, level)
        return Interval(float("inf"), float("nan"), float("nan"), level, len(set(_names(groups))), draws)
    count = int(layers.max()) + 1 if layers.size else 1
    present = ~np.isnan(array)
    columns = np.zeros((array.size, 2 * count))
    columns[present, layers[present]] = array[present]
    columns[present, count + layers[present]] = 1.0
    return bootstrap(columns, groups, _stratum_mean, draws=draws, level=level, seed=seed)


def group_means(
    values: npt.ArrayLike, groups: Sequence[object] | npt.NDArray[np.generic]
) -> tuple[list[str], Floats]:
    """The groups' names in order, and the mean of each, NaN left out (NaN for a group of nothing else)."""
    array = np.asarray(values, np.float64).ravel()
    if array.size != len(groups):
        raise UsageError("WSI809", f"{array.size} values and {len(groups)} groups; give one for each value")
    present = ~np.isnan(array)
    sums = _group_sums(np.stack([np.where(present, array, 0.0), present], axis=1), groups)
    return sorted(set(_names(groups))), _divide(sums[:, 0], sums[:, 1])


def count_columns(counts: Sequence[Counts]) -> Floats:
    """Counts of items as (items, 4) sums for `bootstrap`: TP, FP, FN, sum of IoU."""
    return np.array([[c.tp, c.fp, c.fn, c.iou_sum] for c in counts], np.float64).reshape(-1, 4)


def pooled_f1(sums: Floats) -> Floats:
    """F1 of summed counts, in the columns of `count_columns`."""
    return _divide(2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2])


def pooled_precision(sums: Floats) -> Floats:
    """Precision of summed counts, in the columns of `count_columns`."""
    return _divide(sums[:, 0], sums[:, 0] + sums[:, 1])


def pooled_recall(sums: Floats) -> Floats:
    """Recall of summed counts, in the columns of `count_columns`."""
    return _divide(sums[:, 0], sums[:, 0] + sums[:, 2])


def pooled_sq(sums: Floats) -> Floats:
    """Mean IoU of all matched objects, in the columns of `count_columns`."""
    return _divide(sums[:, 3], sums[:, 0])


def pooled_pq(sums: Floats) -> Floats:
    """Panoptic quality of summed counts, in the columns of `count_columns`."""
    return _divide(sums[:, 3], sums[:, 0] + (sums[:, 1] + sums[:, 2]) / 2)


def _check(table: Floats, groups: int, draws: int, level: float) -> None:
    if table.ndim != 2 or len(table) != groups or groups == 0:
        raise UsageError(
            "WSI809", f"{len(table)} items and {groups} groups; give one group for each, and some"
        )
    if not np.isfinite(table).all():
        raise UsageError("WSI809", "sums must be finite; leave out items that have no value")
    if draws < 100 or not 0 < level < 1:
        raise UsageError(
            "WSI809", f"wanted 100 draws or more and a level within (0, 1), got {draws} and {level}"
        )


def _group_sums(table: Floats, groups: Sequence[object] | npt.NDArray[np.generic]) -> Floats:
    """Sums of each group, groups in the order of their names; items are sorted, so that order says nothing."""
    codes = _codes(groups)
    order = np.lexsort((*table.T, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return np.asarray(np.add.reduceat(table[order], starts, axis=0))


def _names(groups: Sequence[object] | npt.NDArray[np.generic]) -> list[str]:
    return [str(group) for group in groups]


def _codes(groups: Sequence[object] | npt.NDArray[np.generic]) -> npt.NDArray[np.intp]:
    """Each item's group as its place among the sorted names."""
    return np.asarray(np.unique(np.array(_names(groups), dtype=str), return_inverse=True)[1])


def _draw(per_group: Floats, draws: int, seed: int) -> list[Floats]:
    """Sums of `draws` draws of as many groups as there are, in blocks."""
    random = np.random.Generator(np.random.PCG64(seed))
    count = len(per_group)
    size = max(1, DRAW_CELLS // count)
    blocks = []
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        chosen = random.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        weights = np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count)
        # einsum adds in one order; a BLAS product's last bits may hang on its threads.
        blocks.append(np.einsum("dg,gk->dk", weights.astype(np.float64), per_group))
    return blocks


def _stratum_mean(sums: Floats) -> Floats:
    """Mean over strata of their means: the first half of the columns are sums, the second the numbers."""
    totals, numbers = np.split(sums, 2, axis=1)
    present = numbers > 0
    means = _divide(totals, numbers)
    return _divide(np.where(present, means, 0.0).sum(axis=1), present.sum(axis=1).astype(np.float64))


def _divide(part: Floats, whole: Floats) -> Floats:
    """NaN, without a warning, where there is nothing to divide by."""
    quotient = np.full(part.shape, np.nan)
    np.divide(part, whole, out=quotient, where=whole > 0)
    return quotient
