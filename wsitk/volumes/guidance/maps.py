"""Maps of clicks: disks, heatmaps, Euclidean, geodesic and exponential geodesic distances, adaptive heatmaps.

After Marinov et al. 2023, "Guiding the Guidance" (MICCAI), each in [0, 1]. Two modes:

- ``compatible`` repeats the published code, on which networks were trained. Its distance maps are non-zero
  only *inside* the disks: everything outside is a seed. Its adaptive heatmap takes the largest sigma for a
  click nearer than nine voxels to the volume's first planes.
- ``textbook`` measures the distance *from* the disks, and clips the adaptive map's window at the border.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsitk.errors import UsageError
from wsitk.volumes.guidance.geodesic import geodesic_distance

__all__ = ["AUTOPET_STEPS", "Guidance", "KINDS", "SPLEEN_STEPS", "guidance_map"]

Steps = Sequence[tuple[float, float]]

AUTOPET_STEPS: Steps = ((0.0304, 13.0), (0.0223, 9.0), (0.0164, 5.0), (0.0121, 1.0))
"""The adaptive heatmap's sigma (second) where the mean distance exceeds the first; else 0. For AutoPET."""

SPLEEN_STEPS: Steps = ((0.0518, 13.0), (0.0484, 9.0), (0.0453, 5.0), (0.0423, 1.0))
"""The same for the spleen of the Medical Segmentation Decathlon."""

DISK = 0.1
"""A disk is where a heatmap exceeds this."""

TRUNCATED = 4.0
"""Standard deviations at which the Gaussian is cut off."""

BEFORE, BEHIND = 9, 9
"""The adaptive map's window around a click: from 9 voxels before it to 8 behind."""


@dataclass(frozen=True)
class Guidance:
    """How clicks become a map.

    Attributes
    ----------
    kind
        ``disk``, ``gaussian``, ``edt``, ``geodesic``, ``exponential`` or ``adaptive``.
    sigma
        Width of disks and heatmaps in voxels; 0 is the click's voxel alone.
    percentile
        Of the distances above 0: ``edt`` and ``geodesic`` are zero up to it. None keeps all.
    steps
        Mean distance and sigma of the adaptive heatmap, the largest first; one entry fixes sigma.
    mode
        ``compatible`` or ``textbook``.
    """

    kind: Literal["disk", "gaussian", "edt", "geodesic", "exponential", "adaptive"] = "gaussian"
    sigma: float = 1.0
    percentile: float | None = 10.0
    steps: Steps = AUTOPET_STEPS
    mode: Literal["compatible", "textbook"] = "compatible"

    def __post_init__(self) -> None:
        known = self.kind in KINDS and self.mode in ("compatible", "textbook")
        if not known or not 0 <= self.sigma <= 1000 or not 0 <= (self.percentile or 0) <= 100:
            raise UsageError(
                "WSI081",
                f"guidance {self.kind!r}, sigma {self.sigma}, percentile {self.percentile}, mode {self.mode!r}; "
                f"wanted one of {', '.join(KINDS)}, 0 to 1000, 0 to 100, compatible or textbook",
            )


def guidance_map(
    clicks: ArrayLike, image: ArrayLike, spacing: Sequence[float], guidance: Guidance
) -> NDArray[np.float32]:
    """Return the map of `clicks` (N, axes; whole voxels) on the grid of `image`, in [0, 1]; 0 without clicks.

    `spacing` is the voxel's size along each axis. Raises UsageError: WSI080 for shapes or a spacing that make
    no sense, WSI082 for clicks outside of the image.
    """
    values = np.asarray(image, np.float32)
    points = np.asarray(clicks, np.int64).reshape(-1, values.ndim)
    if ((points < 0) | (points >= values.shape)).any():
        bad = points[((points < 0) | (points >= values.shape)).any(1)][0].tolist()
        raise UsageError("WSI082", f"click {bad} lies outside of the image {values.shape}; wanted (z, y, x)")
    if not len(points):
        return np.zeros(values.shape, np.float32)
    return KINDS[guidance.kind](points, values, spacing, guidance)


def _heatmap(points: NDArray[np.int64], shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
    """Return the clicks blurred by a Gaussian, integrated over each voxel, from 0 to 1."""
    from scipy.ndimage import correlate1d

    heat = np.zeros(shape, np.float32)
    heat[tuple(points.T)] = 1
    if sigma:
        kernel = _kernel(sigma)
        for axis in range(heat.ndim):
            heat = correlate1d(heat, kernel, axis, mode="constant")
    return _from_0_to_1(heat)


def _kernel(sigma: float) -> NDArray[np.float64]:
    from scipy.special import erf

    tail = int(max(sigma * TRUNCATED, 0.5) + 0.5)
    edges = (np.arange(-tail, tail + 2) - 0.5) / (np.sqrt(2.0) * sigma)
    kernel: NDArray[np.float64] = np.diff(erf(edges)) / 2
    return kernel


def _from_0_to_1(values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros_like(values)
    scaled: NDArray[np.float32] = (values - low) / (high - low)
    return scaled


def _disks(points: NDArray[np.int64], shape: tuple[int, ...], sigma: float) -> NDArray[np.bool_]:
    return _heatmap(points, shape, sigma) > DISK


def _distance(
    points: NDArray[np.int64],
    image: NDArray[np.float32],
    spacing: Sequence[float],
    guidance: Guidance,
    weight: float,
) -> NDArray[np.float32]:
    """Return the normalised distance from the disks, or inside of them."""
    disks = _disks(points, image.shape, guidance.sigma)
    seeds = ~disks if guidance.mode == "compatible" else disks
    if not seeds.any():
        return np.zeros(image.shape, np.float32)
    return _from_0_to_1(geodesic_distance(image, seeds, spacing, weight=weight, iterations=4))


def _above(distance: NDArray[np.float32], percentile: float | None) -> NDArray[np.float32]:
    """Return the distances that exceed a percentile of those above 0, and 0 elsewhere."""
    some = distance[distance > 0]
    if percentile is None or not some.size:
        return distance
    return np.where(distance > np.percentile(some, percentile), distance, np.float32(0))


def _disk(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    return _disks(p, i.shape, g.sigma).astype(np.float32)


def _gaussian(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    return _heatmap(p, i.shape, g.sigma)


def _edt(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    return _above(_distance(p, i, s, g, 0.0), g.percentile)


def _geodesic(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    return _above(_distance(p, i, s, g, 1.0), g.percentile)


def _exponential(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    return -np.expm1(-_distance(p, i, s, g, 1.0))


def _adaptive(
    p: NDArray[np.int64], i: NDArray[np.float32], s: Sequence[float], g: Guidance
) -> NDArray[np.float32]:
    """Return heatmaps whose width grows with the intensity's change around each click, added up."""
    distance = _geodesic(p, i, s, g)
    total = np.zeros(i.shape, np.float32)
    for point in p:
        total += _heatmap(point[None], i.shape, _sigma(distance, point, g))
    return _from_0_to_1(total)


def _sigma(distance: NDArray[np.float32], point: NDArray[np.int64], g: Guidance) -> float:
    start = point - BEFORE
    if g.mode == "compatible" and (start < 0).any():
        return g.steps[0][1]
    mean = distance[tuple(slice(max(0, a), b) for a, b in zip(start, point + BEHIND, strict=True))].mean()
    return next((sigma for least, sigma in g.steps if mean > least), 0.0)


KINDS: Mapping[
    str,
    Callable[[NDArray[np.int64], NDArray[np.float32], Sequence[float], Guidance], NDArray[np.float32]],
] = MappingProxyType(
    {
        "disk": _disk,
        "gaussian": _gaussian,
        "edt": _edt,
        "geodesic": _geodesic,
        "exponential": _exponential,
        "adaptive": _adaptive,
    }
)
"""What makes each kind of map."""
