"""Area means and interpolation along each axis, exact in their place: the arithmetic of every working grid.

Along one axis, output pixel k is a weighted sum of a few input pixels; weights and their order depend on
k alone, never on the window that is computed. Down-sampling by a factor f takes the overlap of
``[k * f, (k + 1) * f)`` with each input pixel, divided by the part of it that lies inside the image.

`interpolate` samples instead, at ``(k + 0.5) * f - 0.5``, and the border pixel goes on for ever. Its cubic
rule is the spline through all pixels (Unser 1999, "Splines: a perfect fit for signal and image processing"):
the recursive prefilter and the B-spline behind it are one kernel, whose tails fall by 2 - sqrt(3) per pixel,
so that a few pixels on both sides say what the whole line would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rule", "Taps", "apply_taps", "halve", "interpolate", "make_taps"]

Rule = Literal["nearest", "linear", "cubic", "pick"]

_POLE = math.sqrt(3.0) - 2.0
_CUBIC_REACH = 14  # pixels on each side: what is left out weighs 2e-8


@dataclass(frozen=True)
class Taps:
    """The rule of one axis for outputs ``[low, high)``.

    `first` (m,) is the first input pixel of each output, `weights` (m, K) its weights (zero beyond the
    last one used), `total` (m,) their sum. `start` and `stop` bound the inputs that are read.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.float64]
    total: NDArray[np.float64]
    start: int
    stop: int


def make_taps(low: int, high: int, factor: float, length: int) -> Taps:
    """Return the rule for outputs ``low .. high - 1`` of an axis of `length` input pixels.

    `factor` is input pixels per output pixel: at least 1 means an area mean, less linear interpolation.
    """
    k = np.arange(low, high, dtype=np.float64)
    if factor >= 1.0:
        begin, end = k * factor, np.minimum((k + 1) * factor, length)
        first = np.minimum(np.floor(begin).astype(np.int64), length - 1)
        width = math.ceil(factor) + (0 if factor.is_integer() else 1)
        cell = first[:, None] + np.arange(width)
        overlap = np.minimum(cell + 1, end[:, None]) - np.maximum(cell, begin[:, None])
        weights = np.maximum(overlap, 0.0)
    else:
        centre = np.clip((k + 0.5) * factor - 0.5, 0.0, length - 1.0)
        first = np.minimum(np.floor(centre).astype(np.int64), max(length - 2, 0))
        share = centre - first
        weights = np.stack([1.0 - share, share], axis=1)
    used = np.where(weights > 0, first[:, None] + np.arange(weights.shape[1]) + 1, 0)
    return Taps(first, weights, weights.sum(axis=1), int(first[0]), min(int(used.max()), length))


def interpolate(low: int, high: int, factor: float, length: int, rule: Rule) -> Taps:
    """Return the rule that samples an axis of `length` pixels at ``(k + 0.5) * factor - 0.5``, k in low .. high - 1.

    What SciPy's `zoom` does with ``grid_mode=True, mode="nearest"`` and order 0, 1 or 3: `factor` is ``length /
    outputs`` there. A factor of 1 takes the pixels as they are. ``pick`` is torch's nearest instead, and PIL's of
    old: pixel k is the input's ``floor(k * factor)``, the factor rounded to float32, which decides a few pixels.
    """
    if rule == "pick":
        cells = np.floor(np.arange(low, high, dtype=np.float32) * np.float32(factor)).astype(np.int64)[
            :, None
        ]
        return _folded(cells, np.ones(cells.shape), length)
    place = (np.arange(low, high, dtype=np.float64) + 0.5) * factor - 0.5
    if factor == 1.0 or rule == "nearest":
        cells = np.floor(place + 0.5).astype(np.int64)[:, None]
        weights = np.ones((len(place), 1))
    elif rule == "linear":
        left = np.floor(place)
        cells = left.astype(np.int64)[:, None] + np.arange(2)
        weights = np.stack([left + 1.0 - place, place - left], axis=1)
    else:
        cells = np.floor(place).astype(np.int64)[:, None] + np.arange(1 - _CUBIC_REACH, 1 + _CUBIC_REACH)
        weights = _cardinal(place[:, None] - cells)
    return _folded(cells, weights, length)


def _cardinal(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cubic spline that is 1 at 0 and 0 at all other whole numbers, at `x`."""
    gain = -6.0 * _POLE / (1.0 - _POLE * _POLE)  # of the inverse of the samples (1, 4, 1) / 6
    total = np.zeros_like(x)
    for k in range(-2, 3):  # the B-spline reaches two pixels around the nearest coefficients
        cell = np.rint(x) + k
        total += gain * _POLE ** np.abs(cell) * _bspline(np.abs(x - cell))
    return total


def _bspline(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cubic B-spline at distances `x`."""
    near = 2.0 / 3.0 - x * x * (1.0 - x / 2.0)
    far = np.clip(2.0 - x, 0.0, None) ** 3 / 6.0
    return np.where(x < 1.0, near, far)


def _folded(cells: NDArray[np.int64], weights: NDArray[np.float64], length: int) -> Taps:
    """Return taps whose cells (m, K) beyond the axis weigh on its first or last pixel."""
    inside = cells.clip(0, length - 1)
    first = inside[:, 0].copy()
    folded = np.zeros_like(weights)
    rows = np.broadcast_to(np.arange(len(cells))[:, None], cells.shape)
    np.add.at(folded, (rows, inside - first[:, None]), weights)
    used = np.where(folded != 0, first[:, None] + np.arange(folded.shape[1]) + 1, 0)
    return Taps(first, folded, folded.sum(axis=1), int(first[0]), int(used.max()))


def apply_taps(
    pixels: NDArray[Any], taps: tuple[Taps, ...], dtype: np.dtype[Any], *, wide: bool = True
) -> NDArray[Any]:
    """Return the weighted means of `pixels` (spatial..., C) under one rule per spatial axis.

    `pixels` holds exactly the inputs ``[taps.start, taps.stop)`` of each axis. Integers are rounded half up,
    so that a whole factor gives ``(2 * sum + n) // (2 * n)`` of the n pixels of a block. Not `wide`: in float32.
    """
    # Sums of bytes are exact in float32 up to 2**24; anything else is summed in float64.
    heaviest = math.prod(float(t.total.max()) for t in taps)
    narrow = not wide or (pixels.dtype == np.uint8 and heaviest * 255 < 2**24)
    work = np.float32 if narrow else np.float64
    summed: NDArray[Any] = np.ascontiguousarray(pixels)
    for axis, rule in enumerate(taps):
        summed = _along(summed, axis, rule, work)
    total = np.ones((), work)
    for axis, rule in enumerate(taps):
        shape = [1] * summed.ndim
        shape[axis] = len(rule.total)
        total = total * rule.total.astype(work).reshape(shape)
    mean = summed / total
    if np.issubdtype(dtype, np.integer):
        mean = np.floor(mean + work(0.5))
    return mean.astype(dtype)


def _along(pixels: NDArray[Any], axis: int, rule: Taps, work: type[np.floating[Any]]) -> NDArray[Any]:
    """Return the weighted sums along one axis."""
    from wsitk.sources.resample_loop import add_up  # numba takes half a second to import

    shape = pixels.shape
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    out = np.zeros((outer, len(rule.first), inner), work)
    weights = np.ascontiguousarray(rule.weights.astype(work))
    add_up(pixels.reshape(outer, shape[axis], inner), rule.first - rule.start, weights, out)
    return out.reshape(*shape[:axis], len(rule.first), *shape[axis + 1 :])


def halve(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the means of 2 x 2 blocks of (2h, 2w, C) bytes, rounded half up; the common case, in SIMD."""
    import cv2

    height, width, channels = pixels.shape
    small = cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8).reshape(height // 2, width // 2, channels)
