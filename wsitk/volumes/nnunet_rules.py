"""nnU-Net's conventions as pure functions: where tiles start, how they weigh, how volumes become tensors.

Numbers in, numbers out: no I/O and no torch. Axes are in array order (z, y, x); spacings may be in any unit.
Isensee et al. 2021, "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 18, 203-211, and its supplement; checked against vectors recorded from 1.7.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil, inf, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region

__all__ = [
    "ANISOTROPIC",
    "Affine",
    "IntensityRule",
    "Moments",
    "QUANTILES",
    "Resampling",
    "foreground",
    "gaussian",
    "gaussian_axis",
    "nonzero_box",
    "region_labels",
    "resampled_shape",
    "resampling",
    "separate_axis",
    "tile_starts",
]

QUANTILES = (0.01, 0.5, 0.998)
"""What the scheme ``background`` asks of a channel: its darkest pixels, its typical, and its brightest."""

ANISOTROPIC = 3.0
"""Ratio of the largest to the smallest spacing above which the coarse axis is resampled by itself."""

Numbers = Sequence[float]


# --- tiles ---------------------------------------------------------------------------------------------


def tile_starts(size: Sequence[int], patch: Sequence[int], step: float = 0.5) -> tuple[tuple[int, ...], ...]:
    """Return, for each axis, where tiles begin: evenly spread, at most ``step * patch`` apart.

    n = ceil((size - patch) / (patch * step)) + 1 tiles, the i-th at round(i * ((size - patch) / (n - 1))), half
    to even. An axis shorter than the patch has one tile, which begins before it: of an odd excess, the larger
    half lies behind.
    """
    return tuple(_starts(n, p, step) for n, p in zip(size, patch, strict=True))


def _starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    room = size - patch
    if room <= 0:
        return (-(-room // 2),)
    intervals = ceil(room / (patch * step))
    apart = room / intervals  # rounded before it is multiplied, as upstream does: it decides some ties
    return tuple(round(i * apart) for i in range(intervals + 1))


def gaussian_axis(patch: int) -> NDArray[np.float64]:
    """Return the weights along one axis: a Gaussian of sigma patch / 8 about the pixel ``patch // 2``, there 1.

    Upstream filters a single 1 and replaces the zeros beyond the filter's reach; it reaches every pixel of a
    patch, so there are none, and the product over the axes is its window.
    """
    offset = np.arange(patch) - patch // 2
    weights: NDArray[np.float64] = np.exp(-0.5 * (offset / (patch / 8)) ** 2)
    return weights


def gaussian(patch: Sequence[int]) -> NDArray[np.float32]:
    """Return the window of a whole tile, float32, 1 at its middle."""
    return reduce(np.multiply.outer, [gaussian_axis(n) for n in patch]).astype(np.float32)


# --- the box that is looked at -------------------------------------------------------------------------


def foreground(volume: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel of (C, Z, Y, X) is not zero, with enclosed holes filled: bool (Z, Y, X)."""
    from scipy.ndimage import binary_fill_holes

    filled: NDArray[np.bool_] = binary_fill_holes((volume != 0).any(axis=0))
    return filled


def nonzero_box(mask: NDArray[Any]) -> Region | None:
    """Return the smallest box around all that is not zero in (Z, Y, X); None if there is nothing.

    Filling holes never changes it, so it can be gathered block by block.
    """
    start, stop = [], []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        found = np.flatnonzero(mask.any(axis=others))
        if not found.size:
            return None
        start.append(int(found[0]))
        stop.append(int(found[-1]) + 1)
    return Region.between(start, stop)


# --- resampling ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resampling:
    """How a volume gets another shape; pixel centres map as ``(i + 0.5) * old / new - 0.5``, edges repeat.

    `order` is the spline order, with values clipped to those of the input. Where `axis` is not None, each slice
    across it is resampled with `order`, and then the axis itself with `axis_order` (0: the nearest slice).
    """

    shape: tuple[int, ...]
    order: int
    axis: int | None = None
    axis_order: int = 0


def resampled_shape(shape: Sequence[int], spacing: Numbers, target: Numbers) -> tuple[int, ...]:
    """Return ``round(spacing / target * shape)`` along each axis, half to even."""
    return tuple(round(s / t * n) for n, s, t in zip(shape, spacing, target, strict=True))


def separate_axis(spacing: Numbers, target: Numbers) -> int | None:
    """Return the axis that is resampled by itself, or None.

    The given spacing decides if it is anisotropic (ratio above `ANISOTROPIC`), otherwise the target does. Two
    equally coarse axes are no reason.
    """
    for each in (spacing, target):
        if max(each) / min(each) > ANISOTROPIC:
            return _coarsest(each)
    return None


def _coarsest(spacing: Numbers) -> int | None:
    coarse = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
    return coarse[0] if len(coarse) == 1 else None


def resampling(
    shape: Sequence[int],
    spacing: Numbers,
    target: Numbers,
    *,
    order: int = 3,
    axis_order: int = 0,
    separate: bool | None = None,
) -> Resampling:
    """Return how a volume of `shape` goes from `spacing` to `target`.

    Order 3 is for images; class scores go back with order 1, onto the shape they came from. `separate` overrules
    the anisotropy that is otherwise looked at.
    """
    axis = separate_axis(spacing, target)
    if separate is not None:
        axis = _coarsest(spacing) if separate else None
    return Resampling(resampled_shape(shape, spacing, target), order, axis, axis_order)


# --- intensities ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean, sum of squared deviations, and extremes of some values; parts add up (Chan et al. 1979).

    Added in a fixed order, the same blocks give the same bits. `quantiles` (`QUANTILES`) are those of a whole, and
    are lost when it is added to something.
    """

    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    low: float = inf
    high: float = -inf
    quantiles: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Return the moments of all `values`, in float64."""
        if not values.size:
            return cls()
        whole = values.astype(np.float64, copy=False)
        mean = float(whole.mean())
        square = float(np.square(whole - mean).sum())
        return cls(values.size, mean, square, float(whole.min()), float(whole.max()))

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * other.count / count,
            self.square + other.square + apart * apart * self.count * other.count / count,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @property
    def std(self) -> float:
        """Return the standard deviation of the population (divisor: the count)."""
        return sqrt(self.square / self.count) if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Affine:
    """What becomes of one value: clipped to ``low .. high``, then ``(value - shift) / scale``."""

    shift: float = 0.0
    scale: float = 1.0
    low: float = -inf
    high: float = inf

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Return the values normalised, float32."""
        clipped = np.clip(values.astype(np.float32), np.float32(self.low), np.float32(self.high))
        return (clipped - np.float32(self.shift)) / np.float32(self.scale)


@dataclass(frozen=True, slots=True)
class IntensityRule:
    """How one channel's intensities are normalised.

    Attributes
    ----------
    scheme
        ``zscore`` (by the volume's own moments), ``ct`` (clipped to, and scaled by, numbers of the training
        data), ``unit`` (the volume's range to 0..1), ``byte`` (0..255 to 0..1), ``shown`` (``byte`` for
        pictures of bytes, ``unit`` for all else; settled once the input is known), ``background`` or ``none``. The
        scheme ``background`` is for fluorescence, where most pixels show none: the first percentile becomes 0, the
        median 1, so that values count the spread of the background; where that is nothing (an image cut at
        black), 1 is at least a 50th of the 99.8th percentile, and a 1000th of the range.
    masked
        Moments are those of the foreground, and what lies outside of it becomes (``zscore``, v1's ``ct``) 0.
    shift, scale, low, high
        For ``ct``: mean, standard deviation, and the percentiles 0.5 and 99.5 of the training data.
    added
        Divides by std + 1e-8 and not, as version 2, by max(std, 1e-8).
    """

    scheme: Literal["zscore", "ct", "unit", "byte", "shown", "background", "none"]
    masked: bool = False
    shift: float = 0.0
    scale: float = 1.0
    low: float = -inf
    high: float = inf
    added: bool = False

    @property
    def needs_moments(self) -> bool:
        """Return whether the whole volume must be read before its first value can be normalised."""
        return self.scheme in ("zscore", "unit", "background")

    @property
    def needs_quantiles(self) -> bool:
        """Return whether it must be read once more, for `QUANTILES`."""
        return self.scheme == "background"

    def numbers(self, moments: Moments | None = None) -> Affine:
        """Return what happens to a value; `moments` are those of the volume (or its foreground).

        Raises ValueError if they are needed and missing, or the scheme isn't settled.
        """
        if self.scheme == "shown":
            raise ValueError("the scheme 'shown' becomes 'byte' or 'unit' once the input is known")
        if self.scheme == "none":
            return Affine()
        if self.scheme == "byte":
            return Affine(scale=255.0)
        if self.scheme == "ct":
            return Affine(self.shift, self._divisor(self.scale), self.low, self.high)
        if moments is None or not moments.count:
            raise ValueError(f"the scheme {self.scheme!r} needs the moments of the volume")
        if self.scheme == "unit":
            return Affine(moments.low, max(moments.high - moments.low, 1e-8))
        if self.scheme == "background":
            if not moments.quantiles:
                raise ValueError("the scheme 'background' needs the quantiles of the input as it is")
            dark, usual, bright = moments.quantiles
            least = max((bright - dark) / 50, (moments.high - moments.low) / 1000, 1e-8)
            return Affine(dark, max(usual - dark, least))
        return Affine(moments.mean, self._divisor(moments.std))

    def _divisor(self, std: float) -> float:
        return std + 1e-8 if self.added else max(std, 1e-8)


# --- labels --------------------------------------------------------------------------------------------


def region_labels(scores: NDArray[Any], order: Sequence[int]) -> NDArray[np.uint8]:
    """Return labels (*shape) from the logits (R, *shape) of regions that may overlap.

    Each region of which a logit is above 0 (probability above 1/2) writes its label of `order`, later ones over
    earlier ones; where there is none, 0.
    """
    labels = np.zeros(scores.shape[1:], np.uint8)
    for each, label in zip(scores, order, strict=True):
        labels[each > 0] = label
    return labels
