"""How densely objects lie: counted in coarse bins, smoothed, and read at any resolution."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region

__all__ = ["DensityMap"]

BIN_UM = 16.0
"""Side of a counting bin: about a nucleus and its cytoplasm."""

SIGMA_UM = 48.0
"""Standard deviation of the smoothing: density of a neighbourhood, not of single cells."""


@final
class DensityMap:
    """Objects per mm² over an extent. `add` anchors, `freeze`, then `read`.

    Memory is a float32 for each bin of 16 µm: 4 MB for a slide of 16 × 16 mm.
    """

    sigma_um = SIGMA_UM

    def __init__(self, extent: Region, spacing_um: tuple[float, ...]) -> None:
        self._extent = extent
        self._step = tuple(max(1, round(BIN_UM / um)) for um in spacing_um)
        self._bin_mm2 = float(np.prod([s * um / 1e3 for s, um in zip(self._step, spacing_um, strict=True)]))
        self._sigma = [SIGMA_UM / (s * um) for s, um in zip(self._step, spacing_um, strict=True)]
        shape = (-(-n // s) for n, s in zip(extent.shape, self._step, strict=True))
        self._bins = np.zeros(tuple(shape), np.float32)
        self.full_scale_per_mm2 = 0.0

    def add(self, anchor: NDArray[np.float64]) -> None:
        """Count objects by their anchors (N, d), in working pixels."""
        place = ((anchor - self._extent.start) / self._step).astype(np.int64)
        place = np.clip(place, 0, np.array(self._bins.shape) - 1)
        np.add.at(self._bins, tuple(place.T), 1)

    def freeze(self) -> None:
        """Smooth the counts and fix the scale: the densest place is full scale."""
        from scipy import ndimage

        self._bins = ndimage.gaussian_filter(self._bins / self._bin_mm2, self._sigma, mode="constant")
        self.full_scale_per_mm2 = float(self._bins.max())

    def read(self, region: Region, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return `region` (working pixels from the extent's corner), 0 to full scale over `dtype`'s range.

        Interpolated linearly between the centres of bins, by absolute position.
        """
        values = self._bins
        spans = zip(region.start, region.shape, self._step, self._bins.shape, strict=True)
        for axis, (start, count, step, bins) in enumerate(spans):
            place = np.clip((start + np.arange(count) + 0.5) / step - 0.5, 0, bins - 1)
            low = np.minimum(place.astype(np.int64), max(0, bins - 2))
            part = (place - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
            high = np.minimum(low + 1, bins - 1)
            values = values.take(low, axis) * (1 - part) + values.take(high, axis) * part
        share = values / (self.full_scale_per_mm2 or 1.0)
        return np.asarray(np.rint(share * np.iinfo(dtype).max), dtype)
