"""Where artifacts lie: one byte for each pixel of a coarse grid, a bit for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.geometry import Region

__all__ = ["KINDS", "OTHER", "ArtifactMask", "check_kinds"]

KINDS = ("fold", "bubble", "blur", "pen", "dust", "coverslip")
"""What a detector looks for."""

OTHER = "other"
"""What a person has drawn without saying what it is."""

MAX_KINDS = 8  # the bits of a byte


def check_kinds(kinds: Sequence[str], known: Sequence[str] = (*KINDS, OTHER)) -> tuple[str, ...]:
    """Return `kinds` in the order of `known`; raises UsageError (WSI660) for one that isn't there."""
    for kind in kinds:
        if kind not in known:
            raise UsageError("WSI660", f"no kind of artifact {kind!r}; there are {', '.join(known)}")
    return tuple(kind for kind in known if kind in kinds)


@dataclass(frozen=True)
class ArtifactMask:
    """Artifacts over level 0, on a grid of pixels that may be coarser than level 0 and may cover a part of it.

    Attributes
    ----------
    kinds
        What was looked for, or drawn; at most 8.
    codes
        (y, x) uint8: bit k is set where there is `kinds[k]`. Kinds may overlap.
    scale
        Level-0 pixels per mask pixel along each axis (y, x).
    corner
        Where the first mask pixel begins, in level-0 pixels (y, x). Nothing is marked beyond the grid.
    um
        Micrometres per level-0 pixel (y, x), or None if unknown.
    warnings
        What a reader should know, one coded line each.
    """

    kinds: tuple[str, ...]
    codes: NDArray[np.uint8]
    scale: tuple[float, float]
    corner: tuple[float, float] = (0.0, 0.0)
    um: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_kinds(
        cls, found: Mapping[str, NDArray[np.bool_]], scale: tuple[float, float], **more: Any
    ) -> Self:
        """Return a mask from a boolean array (y, x) for each kind; `more` is as the other attributes."""
        if not found or len(found) > MAX_KINDS:
            raise ValueError(f"a mask holds 1 to {MAX_KINDS} kinds, got {len(found)}")
        codes = np.zeros(next(iter(found.values())).shape, np.uint8)
        for bit, marked in enumerate(found.values()):
            codes |= marked.astype(np.uint8) << np.uint8(bit)
        return cls(tuple(found), codes, scale, **more)

    def of(self, kind: str) -> NDArray[np.bool_]:
        """Return the grid (y, x) of one kind; raises UsageError (WSI660) if it was not looked for."""
        return np.asarray((self.codes & self._bits((kind,))) != 0, np.bool_)

    def any(self, region: Region, kinds: Sequence[str] | None = None) -> bool:
        """Tell whether anything is marked in `region` (level-0 pixels), of `kinds` or of any."""
        return bool(self.over(region, (1,) * region.ndim, kinds).any()) if region.size else False

    def over(
        self, region: Region, shape: tuple[int, ...] | None = None, kinds: Sequence[str] | None = None
    ) -> NDArray[np.bool_]:
        """Return `region` (level-0 pixels) as a boolean array of `shape`, by default a pixel for each.

        A pixel is marked if it shares any area with a marked pixel of the grid, however the two grids lie:
        nothing marked is lost, whatever the scale.
        """
        return np.asarray((self.codes_over(region, shape) & self._bits(kinds)) != 0, np.bool_)

    def codes_over(self, region: Region, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
        """Return what `over` does with the bits of all kinds, as in `codes`."""
        rows, columns = shape or region.shape
        part = self.codes
        for axis, count in ((0, rows), (1, columns)):
            step = region.shape[axis] / max(1, count)
            edges = region.start[axis] + step * np.arange(count + 1, dtype=np.float64)
            part = _gather(part, (edges - self.corner[axis]) / self.scale[axis], axis)
        return part

    def area_um2(self, kind: str | None = None) -> float:
        """Return the marked area in µm², of one kind or of all together.

        Raises UsageError (WSI661) if the pixel size is unknown.
        """
        if self.um is None:
            raise UsageError("WSI661", "the image states no pixel size, so areas have no unit; give --mpp")
        bits = self._bits(None if kind is None else (kind,))
        marked = np.count_nonzero(self.codes & bits)
        return float(marked * prod(self.scale) * prod(self.um))

    def _bits(self, kinds: Sequence[str] | None) -> np.uint8:
        wanted = self.kinds if kinds is None else check_kinds(kinds, self.kinds)
        return np.uint8(sum(1 << self.kinds.index(kind) for kind in wanted))


def _gather(codes: NDArray[np.uint8], edges: NDArray[Any], axis: int) -> NDArray[np.uint8]:
    """Return the union of the grid's pixels that lie between neighbouring `edges`, along one axis.

    An edge that misses a border of the grid by rounding alone is on it.
    """
    edges = np.where(np.abs(edges - np.rint(edges)) < 1e-6, np.rint(edges), edges)
    low = np.clip(np.floor(edges[:-1]), 0, codes.shape[axis]).astype(np.intp)
    high = np.clip(np.ceil(edges[1:]), 0, codes.shape[axis]).astype(np.intp)
    first, last = (int(low.min()), int(high.max())) if len(low) else (0, 0)
    window = codes[first:last] if axis == 0 else codes[:, first:last]
    # reduceat takes what lies between two entries, and for none the first of them: that is padding then
    empty, count = high <= low, window.shape[axis]
    pairs = np.stack([np.where(empty, count, low - first), np.where(empty, count + 1, high - first)], 1)
    padded = np.pad(window, [(0, 2) if a == axis else (0, 0) for a in range(2)])
    if not len(low):
        return np.take(padded, np.empty(0, np.intp), axis)
    return np.asarray(np.bitwise_or.reduceat(padded, pairs.ravel(), axis)).take(2 * np.arange(len(low)), axis)
