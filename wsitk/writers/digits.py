"""Coordinates as text, fast: ten times a general JSON encoder, since every number has two decimals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = ["ring_text"]

_WIDEST = 2 * 22 + 4  # two numbers of an int64 with sign and point, and "[,],"


@compiled
def _put(out: NDArray[Any], at: int, value: int) -> int:
    """Write `value` / 100 without trailing zeros at `at`; return where the next byte goes."""
    if value < 0:
        out[at] = 45
        at += 1
        value = -value
    whole, rest = value // 100, value % 100
    digits, left = 1, whole // 10
    while left:
        digits += 1
        left //= 10
    for k in range(digits - 1, -1, -1):
        out[at + k] = 48 + whole % 10
        whole //= 10
    at += digits
    if rest:
        out[at], out[at + 1] = 46, 48 + rest // 10
        at += 2
        if rest % 10:
            out[at] = 48 + rest % 10
            at += 1
    return at


@compiled
def ring_text(hundredths: NDArray[Any], stops: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return rings as ``[[x,y],...]``, one after the other (uint8), and where each ends.

    `hundredths` (M, 2) int64 are coordinates times 100; ring ``r`` holds the points ``stops[r]`` to
    ``stops[r + 1]``, and the bytes ``ends[r]`` to ``ends[r + 1]``.
    """
    out = np.empty(len(hundredths) * _WIDEST + len(stops) * 2, np.uint8)
    ends = np.zeros(len(stops), np.int64)
    at = 0
    for ring in range(len(stops) - 1):
        out[at] = 91
        at += 1
        for point in range(stops[ring], stops[ring + 1]):
            if point > stops[ring]:
                out[at] = 44
                at += 1
            out[at] = 91
            at = _put(out, at + 1, hundredths[point, 0])
            out[at] = 44
            at = _put(out, at + 1, hundredths[point, 1])
            out[at] = 93
            at += 1
        out[at] = 93
        at += 1
        ends[ring + 1] = at
    return out[:at], ends
