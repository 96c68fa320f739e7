"""From foreground probability and HV maps to labelled nuclei: local, in micrometres, the same in any tile.

HoVer-Net (Graham et al. 2019) predicts for each pixel its horizontal and vertical offset from the centre of
its nucleus, scaled to -1 .. 1. Across the border between two nuclei the offset falls from +1 to -1, so the
slope of the maps shows where to cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.models.cellvit import joining, watershed
from wsitk.models.cellvit.hover_upstream import segment_upstream

__all__ = ["HoverSettings", "segment"]

Array = NDArray[Any]

SPECK_UM2 = 0.5
"""Pieces below this are dropped before any are joined."""


@dataclass(frozen=True)
class HoverSettings:
    """How nuclei are cut out of the maps; lengths and areas in micrometres.

    The defaults were chosen on the training labels of CoNSeP and MoNuSeg, made into maps with the blur, the
    flatness and the noise of a network, at 0.25 and 0.5 µm/px. A network whose HV maps are flat wants a lower
    `edge_per_um`.

    Attributes
    ----------
    threshold
        Least foreground probability of a nucleus' pixel.
    slope_sigma_um
        Standard deviation of the Gaussian whose derivative measures the slope of the HV maps.
    edge_per_um
        Fall of an HV map per micrometre from which a pixel counts as border rather than inside.
    open_um
        Radius of the disc that must fit into a marker; rounded to whole pixels.
    min_marker_um2, min_object_um2
        Smaller markers seed nothing; smaller objects are dropped.
    join_solidity, join_gain
        Pieces that the watershed cut are joined again (see `joining`) if together they fill at least
        `join_solidity` of their convex hull and the mean squared misfit of the HV maps falls by more than
        `join_gain`. A `join_solidity` of 1 or more joins nothing.
    min_probability
        Objects whose mean foreground probability is lower are dropped.
    mode
        ``upstream`` does as CellViT 1.0.9 instead, whose sizes are pixels and fixed: all of the above is
        then ignored.
    """

    threshold: float = 0.5
    slope_sigma_um: float = 0.4
    edge_per_um: float = 0.08
    open_um: float = 0.25
    min_marker_um2: float = 1.5
    min_object_um2: float = 3.0
    join_solidity: float = 1.0
    join_gain: float = 0.02
    min_probability: float = 0.0
    mode: Literal["default", "upstream"] = "default"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.slope_sigma_um <= 0:
            raise UsageError(
                "WSI062",
                f"threshold {self.threshold} and slope_sigma_um {self.slope_sigma_um}: "
                "the one must lie between 0 and 1, the other above 0",
            )


def segment(
    prob: Array, hv: Array, spacing_um: float, settings: HoverSettings | None = None
) -> NDArray[np.int32]:
    """Return a label image (H, W): 0 = background, nuclei 1 .. N in raster order of their first pixel.

    `prob` is the foreground probability, float32 (H, W); `hv` float32 (2, H, W) with x first. Each label is
    one 4-connected component without holes.

    Why not as upstream: there each map is stretched to the minimum and maximum of the tile, so that one
    steep border elsewhere changes a nucleus; sizes are pixels of 40x, whatever the magnification; and a
    nucleus without a marker is lost. Here slopes are absolute (per micrometre), every size follows
    `spacing_um`, and a nucleus without a marker is kept. Shifting the maps shifts the result to the last
    pixel: the filters add whole numbers, exact in any order, and ties are broken by raster order within
    each connected piece of the mask. Nothing outside a piece, and the width of the filter, can change it.
    """
    chosen = settings or HoverSettings()
    if hv.shape != (2, *prob.shape):
        raise UsageError("WSI063", f"hv must be (2, H, W) for prob {prob.shape}, got {hv.shape}")
    if chosen.mode == "upstream":
        binary = (prob > 0.5).astype(np.uint8)
        return segment_upstream(binary, binary, hv)[0]
    pixel_area = spacing_um**2
    slopes, unit = _slopes(hv, chosen.slope_sigma_um / spacing_um)
    unit /= spacing_um
    mask, inside, height = watershed.prepare(
        np.ascontiguousarray(prob, np.float32),
        *slopes,
        chosen.threshold,
        chosen.edge_per_um / unit,
        64.0 * unit,
    )
    markers = _markers(inside, round(chosen.open_um / spacing_um))
    labels = watershed.seed(mask, _components(mask, 4), markers, ceil(chosen.min_marker_um2 / pixel_area))
    watershed.flood(labels, height)
    if chosen.join_solidity < 1:
        watershed.number(labels, ceil(SPECK_UM2 / pixel_area))
        whole = watershed.quantise(np.ascontiguousarray(hv, np.float32), watershed.HV_STEPS)
        joining.join(labels, whole, float(watershed.HV_STEPS), chosen.join_gain, chosen.join_solidity)
    watershed.number(labels, ceil(chosen.min_object_um2 / pixel_area))
    watershed.fill_holes(labels, _components((labels == 0).astype(np.uint8), 8))
    return _likely(np.ascontiguousarray(labels[1:-1, 1:-1]), prob, chosen.min_probability)


def _likely(labels: NDArray[np.int32], prob: Array, least: float) -> NDArray[np.int32]:
    """Return the labels whose mean probability is at least `least`, numbered anew."""
    if least <= 0:
        return labels
    sizes = np.bincount(labels.ravel(), minlength=1)
    sums = watershed.sum_by_label(labels, np.ascontiguousarray(prob[None], np.float32), len(sizes) - 1)
    keep = np.concatenate([[False], sums[:, 0] >= least * sizes[1:]])
    return np.asarray(np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels])


def _slopes(hv: Array, sigma: float) -> tuple[tuple[Array, Array], float]:
    """Return d hv[0] / dx and d hv[1] / dy as whole numbers in float32, and what one step is per pixel.

    Vectorised floating sums differ in their last bits with the position in the row. Whole numbers below
    2^24 do not: at most 512 (the map) x 130 (the smoothing) x 130 (the derivative).
    """
    reach = max(1, ceil(3 * sigma))
    x = np.arange(-reach, reach + 1)
    bell = np.exp(-(x**2) / (2 * sigma**2))
    smooth = np.rint(127 * bell / bell.sum()).astype(np.float32)
    rise = x * bell
    rise = np.rint(127 * rise / np.abs(rise).sum()).astype(np.float32)
    whole = watershed.quantise(np.ascontiguousarray(hv, np.float32), watershed.HV_STEPS)
    slopes = (
        cv2.sepFilter2D(whole[0], cv2.CV_32F, rise, smooth),
        cv2.sepFilter2D(whole[1], cv2.CV_32F, smooth, rise),
    )
    return slopes, 1.0 / (watershed.HV_STEPS * float(smooth.sum()) * float((x * rise).sum()))


def _markers(inside: Array, radius: int) -> Array:
    """Return the components of `inside` after opening by a disc, numbered from 1."""
    if radius > 0:
        y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
        disc = (x**2 + y**2 <= radius**2).astype(np.uint8)
        inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, disc)
    return _components(inside, 4)


def _components(mask: Array, connectivity: int) -> Array:
    return np.asarray(cv2.connectedComponents(mask, connectivity=connectivity, ltype=cv2.CV_32S)[1])
