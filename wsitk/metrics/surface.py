"""Distances between the surfaces of two masks, in any unit and number of axes: NSD, HD95, ASSD, boundary IoU.

Two conventions of what a surface is. `border`: the pixels of a mask with a neighbour (4 in 2-D, 6 in 3-D)
outside of it, each counted once; the image's edge counts as outside. MetricsReloaded and MONAI measure so,
and so do we if nothing else is said. `surfel`: the elements of length or area that pass between the pixels,
each counted by its size, as DeepMind's surface-distance has it (Nikolov et al., arXiv 1809.04430). The two
differ by far more than models do (0.60 and 0.42 on one pair), so that a number without its convention says
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.empties import Empty
from wsitk.metrics.overlap import AnyMask, Mask, as_masks
from wsitk.metrics.surfels import surfel_sizes

__all__ = ["SurfaceDistances", "boundary_iou", "nsd", "surface_distances"]

SurfaceKind = Literal["border", "surfel"]
Floats = npt.NDArray[np.float64]
Points = npt.NDArray[np.intp]

SLACK = 1e-9
"""Relative: three pixels of 0.1 are within a tolerance of 0.3, whatever the rounding."""


@dataclass(frozen=True)
class SurfaceDistances:
    """From each element of one surface to the nearest of the other, in the unit of the spacing.

    `from_truth` (n,) and `from_predicted` (m,) are the distances, `truth_size` and `predicted_size` the size
    of each element (1 for border pixels). A mask without pixels has no elements, and is infinitely far.
    """

    from_truth: Floats
    from_predicted: Floats
    truth_size: Floats
    predicted_size: Floats
    kind: SurfaceKind = "border"

    def nsd(self, tolerance: float, empty: Empty = Empty.SKIP) -> float:
        """Normalised surface distance: the share of both surfaces that lies within `tolerance` of the other.

        Raises UsageError WSI804 for a tolerance below 0.
        """
        if not (np.isfinite(tolerance) and tolerance >= 0):
            raise UsageError("WSI804", f"the tolerance must be a number of at least 0, got {tolerance}")
        special = empty.overlap(*self._empty, "nsd")
        if special is not None:
            return special
        reach = tolerance * (1 + SLACK)
        near = self.truth_size[self.from_truth <= reach].sum()
        near += self.predicted_size[self.from_predicted <= reach].sum()
        return float(near / (self.truth_size.sum() + self.predicted_size.sum()))

    def hausdorff(self, percentile: float = 100.0, empty: Empty = Empty.SKIP) -> float:
        """The greater of the two directed `percentile`s (95 for HD95). Raises WSI804 outside (0, 100]."""
        if not 0 < percentile <= 100:
            raise UsageError("WSI804", f"a percentile is above 0 and at most 100, got {percentile}")
        special = empty.distance(*self._empty, percentile=percentile < 100)
        if special is not None:
            return special
        one, other = (
            self._percentile(*side, percentile)
            for side in ((self.from_truth, self.truth_size), (self.from_predicted, self.predicted_size))
        )
        return max(one, other)

    def directed_averages(self, empty: Empty = Empty.SKIP) -> tuple[float, float]:
        """Mean distance from the truth to the prediction, and back."""
        special = empty.distance(*self._empty)
        if special is not None:
            return special, special
        return (
            float((self.from_truth * self.truth_size).sum() / self.truth_size.sum()),
            float((self.from_predicted * self.predicted_size).sum() / self.predicted_size.sum()),
        )

    def assd(self, empty: Empty = Empty.SKIP) -> float:
        """Average symmetric surface distance: the mean over the elements of both surfaces."""
        special = empty.distance(*self._empty)
        if special is not None:
            return special
        total = (self.from_truth * self.truth_size).sum() + (self.from_predicted * self.predicted_size).sum()
        return float(total / (self.truth_size.sum() + self.predicted_size.sum()))

    def masd(self, empty: Empty = Empty.SKIP) -> float:
        """Mean average surface distance: the mean of the two directed means, however large each surface is."""
        return sum(self.directed_averages(empty)) / 2

    @property
    def _empty(self) -> tuple[bool, bool]:
        return self.from_truth.size == 0, self.from_predicted.size == 0

    def _percentile(self, distance: Floats, size: Floats, percentile: float) -> float:
        """Interpolated over border pixels; over surfels the first distance that the share reaches."""
        if self.kind == "border":
            return float(np.percentile(distance, percentile))
        order = np.argsort(distance, kind="stable")
        share = np.cumsum(size[order]) / size.sum()
        return float(distance[order[min(int(np.searchsorted(share, percentile / 100)), order.size - 1)]])


def surface_distances(
    truth: AnyMask,
    predicted: AnyMask,
    spacing: float | Sequence[float],
    surface: SurfaceKind = "border",
) -> SurfaceDistances:
    """Measure two masks of equal shape; what is not 0 belongs to a mask.

    `spacing` is the size of a pixel, one number or one per axis in array order, and gives the unit (µm, mm)
    of all results. Memory follows the surfaces, not the image. Raises UsageError: WSI800 for different
    shapes, WSI807 for a spacing that doesn't fit, WSI805 for an unknown surface, WSI808 for surfels of other
    than 2 and 3 axes.
    """
    t, p = _cropped(*as_masks(truth, predicted))
    steps = _spacing(spacing, t.ndim)
    if surface not in get_args(SurfaceKind):
        raise UsageError("WSI805", f"no surface {surface!r}; take one of {', '.join(get_args(SurfaceKind))}")
    (t_points, t_sizes), (p_points, p_sizes) = (_elements(mask, steps, surface) for mask in (t, p))
    return SurfaceDistances(
        _nearest(t_points, p_points, steps), _nearest(p_points, t_points, steps), t_sizes, p_sizes, surface
    )


def nsd(
    truth: AnyMask,
    predicted: AnyMask,
    tolerance: float,
    spacing: float | Sequence[float],
    empty: Empty = Empty.SKIP,
    surface: SurfaceKind = "border",
) -> float:
    """Normalised surface distance at a tolerance in the unit of `spacing`; see `surface_distances`."""
    return surface_distances(truth, predicted, spacing, surface).nsd(tolerance, empty)


def boundary_iou(
    truth: AnyMask,
    predicted: AnyMask,
    width: float,
    spacing: float | Sequence[float],
    empty: Empty = Empty.SKIP,
) -> float:
    """IoU of the two masks' rims (Cheng et al. 2021): pixels of a mask less than `width` from its border pixels.

    In the unit of `spacing`; a width of one pixel leaves the border pixels alone. Raises UsageError: WSI800,
    WSI804 for a width that is not above 0, WSI807.
    """
    if not (np.isfinite(width) and width > 0):
        raise UsageError("WSI804", f"the width must be a number above 0, got {width}")
    t, p = _cropped(*as_masks(truth, predicted))
    steps = _spacing(spacing, t.ndim)
    special = empty.overlap(not t.any(), not p.any(), "biou")
    if special is not None:
        return special
    t_rim, p_rim = _rim(t, width, steps), _rim(p, width, steps)
    return np.count_nonzero(t_rim & p_rim) / np.count_nonzero(t_rim | p_rim)


def _spacing(spacing: float | Sequence[float], axes: int) -> Floats:
    steps = np.atleast_1d(np.asarray(spacing, np.float64))
    steps = np.repeat(steps, axes) if steps.size == 1 else steps
    if steps.shape != (axes,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise UsageError(
            "WSI807", f"masks have {axes} axes, spacing is {spacing}; give one number above 0 per axis"
        )
    return steps


def _cropped(truth: Mask, predicted: Mask) -> tuple[Mask, Mask]:
    """Both masks within the box around both. Beyond it all is background, and so no border is lost or won."""
    box = []
    for axis in range(truth.ndim):
        others = tuple(a for a in range(truth.ndim) if a != axis)
        filled = np.flatnonzero(truth.any(axis=others) | predicted.any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1) if filled.size else slice(0, 0))
    return truth[tuple(box)], predicted[tuple(box)]


def _elements(mask: Mask, steps: Floats, surface: SurfaceKind) -> tuple[Points, Floats]:
    """Places of the elements of a mask's surface, in whole pixels, and their sizes."""
    if surface == "surfel":
        return surfel_sizes(mask, steps)
    points = np.argwhere(_border(mask))
    return points, np.ones(len(points))


def _border(mask: Mask) -> Mask:
    """Pixels of the mask with a neighbour outside of it, or of the image."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        lines, inside = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        inside[1:] &= lines[:-1]
        inside[:-1] &= lines[1:]
        inside[:1] = False
        inside[-1:] = False
    return mask & ~inner


def _rim(mask: Mask, width: float, steps: Floats) -> Mask:
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt(~_border(mask), sampling=steps)
    return np.asarray(mask & (distance < width * (1 - SLACK)))


def _nearest(start: Points, goal: Points, steps: Floats) -> Floats:
    """Distance from each of `start` to the nearest of `goal`, all as indices of pixels."""
    from scipy.spatial import cKDTree

    if len(start) == 0 or len(goal) == 0:
        return np.full(len(start), np.inf)
    nearest = cKDTree(goal * steps).query(start * steps, workers=1)[1]
    # From whole differences, since differences of scaled coordinates would be off by their rounding.
    return np.asarray(np.sqrt((((start - goal[nearest]) * steps) ** 2).sum(axis=1)))
