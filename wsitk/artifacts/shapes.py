"""Connected pieces of a mask and their shapes, in micrometres."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pieces", "along_lines", "closed", "filled", "grown", "held", "opened", "smooth", "thinner"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """The 8-connected pieces of a mask, one row each.

    `area_um2` is a piece's area, `length_um` the diagonal of its box: for a band that is straight, or bent less
    than a half circle, about its length. `width_um` is area over length.
    """

    labels: NDArray[np.int32]
    area_um2: NDArray[np.float64]
    length_um: NDArray[np.float64]

    @classmethod
    def of(cls, mask: Mask, um: float) -> Pieces:
        """Return the pieces of a mask whose pixels measure `um`."""
        import cv2

        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        sides = stats[1:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].astype(np.float64)
        return cls(labels, stats[1:, cv2.CC_STAT_AREA] * um**2, np.hypot(sides[:, 0], sides[:, 1]) * um)

    @property
    def width_um(self) -> NDArray[np.float64]:
        """Return the mean width of each piece."""
        return self.area_um2 / self.length_um

    def keep(self, wanted: NDArray[np.bool_]) -> Mask:
        """Return the mask of the pieces that are wanted."""
        return np.asarray(np.concatenate([[False], wanted])[self.labels], np.bool_)


def held(weak: Mask, strong: Mask) -> Mask:
    """Return the pieces of `weak` that hold a pixel of `strong`: hysteresis."""
    pieces = Pieces.of(weak, 1.0)
    wanted = np.zeros(len(pieces.area_um2) + 1, np.bool_)
    wanted[pieces.labels[strong & weak]] = True
    return pieces.keep(wanted[1:])


def _element(radius: float) -> Array:
    """Return a disk; where it would be large, a square, whose cost does not grow with its size."""
    import cv2

    side = 2 * max(1, round(radius)) + 1
    return np.asarray(
        cv2.getStructuringElement(cv2.MORPH_ELLIPSE if side < 10 else cv2.MORPH_RECT, (side,) * 2)
    )


def grown(mask: Mask, radius: float) -> Mask:
    """Return the mask dilated by `radius` pixels, at least one."""
    import cv2

    return np.asarray(cv2.dilate(mask.astype(np.uint8), _element(radius)), np.bool_)


def _morphed(mask: Mask, operation: int, radius: float) -> Mask:
    import cv2

    return np.asarray(cv2.morphologyEx(mask.astype(np.uint8), operation, _element(radius)), np.bool_)


def opened(mask: Mask, radius: float) -> Mask:
    """Return where what reaches `radius` pixels to each side fits into the mask."""
    import cv2

    return _morphed(mask, cv2.MORPH_OPEN, radius)


def closed(mask: Mask, radius: float) -> Mask:
    """Return the mask and the gaps into which that does not fit."""
    import cv2

    return _morphed(mask, cv2.MORPH_CLOSE, radius)


def thinner(plane: Array, width: float) -> Array:
    """Return what stands out of a plane and is narrower than `width` pixels: the white top-hat."""
    import cv2

    return np.asarray(cv2.morphologyEx(plane, cv2.MORPH_TOPHAT, _element(width / 2)))


def smooth(plane: Array, sigma: float) -> Array:
    """Return a Gaussian blur; `sigma` in pixels."""
    import cv2

    return np.asarray(cv2.GaussianBlur(plane, (0, 0), max(0.3, sigma)))


def filled(mask: Mask, wanted: Callable[[Array], bool]) -> Mask:
    """Return the outer outlines of the mask's holes for which `wanted` says yes, filled.

    A hole is given as its outline, (N, 1, 2) whole pixels (x, y).
    """
    import cv2

    out = np.zeros(mask.shape, np.uint8)
    outlines, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for outline, (_, _, _, parent) in zip(outlines, tree[0] if tree is not None else (), strict=True):
        if parent >= 0 and wanted(outline):
            cv2.drawContours(out, [outline], -1, 1, cv2.FILLED)
    return out.astype(np.bool_)


def along_lines(plane: Array, length: float, width: float, angles: int = 12) -> Array:
    """Return, for each pixel, the greatest mean over a straight bar through it; sizes in pixels.

    Bands keep their value whatever their direction, specks are thinned out.
    """
    import cv2

    side = 2 * round(length / 2) + 1
    middle = side // 2
    best = np.full(plane.shape, -np.inf, np.float32)
    for angle in np.arange(angles) * np.pi / angles:
        reach = np.array([np.cos(angle), np.sin(angle)]) * middle
        ends = [tuple(np.rint(np.array([middle, middle]) + s * reach).astype(int).tolist()) for s in (-1, 1)]
        bar = cv2.line(np.zeros((side, side), np.float32), ends[0], ends[1], 1.0, max(1, round(width)))
        np.maximum(best, cv2.filter2D(plane, cv2.CV_32F, bar / bar.sum()), out=best)
    return best
