"""Quantiles of values that come block by block, from counts: the same values, the same bits, in any order."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Histogram"]

BINS = 1 << 16


@final
class Histogram:
    """Counts of values between `low` and `high`, their extremes.

    Whole numbers of at most 16 bits are counted one by one and their quantiles are exact; those of others are
    exact to a 65536th of the range.
    """

    def __init__(self, low: float, high: float, dtype: np.dtype[Any]) -> None:
        self._low = low
        whole = dtype.kind in "iub" and high - low < BINS
        self._width = 1.0 if whole else max((high - low) / (BINS - 1), np.finfo(np.float64).tiny)
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count values, all of which lie between the extremes."""
        places = ((values.ravel().astype(np.float64) - self._low) / self._width).astype(np.int64)
        self._counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    def quantile(self, share: float) -> float:
        """Return the smallest value that at least a share of all values do not exceed; NaN of no values."""
        total = int(self._counts.sum())
        if not total:
            return float("nan")
        wanted = max(share * total, 1.0)
        return self._low + float(np.searchsorted(np.cumsum(self._counts), wanted)) * self._width
