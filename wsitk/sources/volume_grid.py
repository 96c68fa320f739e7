"""A volume as a model sees it: cropped, resampled and normalised, one window at a time.

Every voxel of the grid has one value, whichever window asks for it; a window of the source with a margin wide
enough for the spline is read for each, so that no resampled copy of the volume exists anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source
from wsitk.sources.resample import Rule, Taps, apply_taps, interpolate
from wsitk.sources.view import View, ViewRules, channels_of, settled, slabs, survey, voxels_of
from wsitk.sources.working import WorkingGrid
from wsitk.volumes.nnunet_rules import Moments

__all__ = ["VolumeGrid", "view_of"]

_PIECE_VALUES = 1 << 24


@final
class VolumeGrid(WorkingGrid):
    """A source as `view` shows it, by cubic splines unless that says otherwise. `fill` is in normalised units.

    Values are those of nnU-Net's preprocessing of the whole volume (skimage's `resize` of order 3, slice by slice
    where the view sets an axis apart), to about 1e-7 of their range.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        border: Literal["reflect", "constant", "clip"] = "constant",
        fill: float = 0.0,
    ) -> None:
        self.source, self.view = source, view
        self.border, self.fill = border, fill
        self.shape, self.scale = view.shape, view.scale
        self._changes = view.shape != view.crop.shape
        self.dtype = np.dtype(np.float32) if self._changes or view.intensities else source.dtype
        known = source.spacing
        self.spacing = tuple(u * s for u, s in zip(known.um, self.scale, strict=True)) if known else None
        self.warnings: tuple[str, ...] = ()
        self._mask: NDArray[np.bool_] | None = None
        self._lock = threading.Lock()

    def _inside(self, region: Region) -> Reading:
        """Return a region inside the grid, computed in pieces that bound the memory."""
        if not region.size:
            return Reading(np.empty((*region.shape, self.channels), self.dtype))
        taps = self._taps(region, self.view.way)
        if self.channels * prod(t.stop - t.start for t in taps) <= _PIECE_VALUES or region.size == 1:
            return self._piece(region, taps)
        pixels = np.empty((*region.shape, self.channels), self.dtype)
        absent = np.zeros(region.shape, np.bool_)
        for part in _halves(region):
            got = self._inside(part)
            pixels[part.slices(region.start)] = got.pixels
            if got.absent is not None:
                absent[part.slices(region.start)] = got.absent
        return Reading(pixels, absent if absent.any() else None)

    def _taps(self, region: Region, rule: Rule) -> tuple[Taps, ...]:
        lengths, rules = self.view.crop.shape, self.view.rules(rule)
        spans = zip(region.start, region.stop, self.scale, lengths, rules, strict=True)
        return tuple(interpolate(a, b, f, n, r) for a, b, f, n, r in spans)

    def _piece(self, region: Region, taps: tuple[Taps, ...]) -> Reading:
        """Return a region inside the grid from one read of the source."""
        window = Region.between((t.start for t in taps), (t.stop for t in taps))
        corner = tuple(a + b for a, b in zip(window.start, self.view.crop.start, strict=True))
        raw = self.source.read_inside(Region(corner, window.shape), 0)
        pixels = raw.pixels if "c" in self.source.axes else raw.pixels[..., None]
        if self.view.first:
            pixels = self._normalised(pixels, window, None)
        absent = raw.absent
        if self._changes:
            pixels = self._clipped(apply_taps(pixels, taps, np.dtype(np.float64)), taps)
            if absent is not None:
                share = apply_taps(absent[..., None].astype(np.float64), taps, np.dtype(np.float64))
                absent = share[..., 0] > 0.5
        if not self.view.first:
            pixels = self._normalised(pixels, window, region)
        return Reading(pixels, absent if absent is not None and absent.any() else None)

    def _clipped(self, values: NDArray[np.float64], taps: tuple[Taps, ...]) -> NDArray[np.float32]:
        """Return interpolated values, none beyond the extremes of the volume, or of its own slice."""
        low, high, apart = self.view.low, self.view.high, self.view.apart
        if low is None or high is None:  # no way but splines overshoots
            return values.astype(np.float32)
        if apart is not None:
            shape = [1] * len(taps) + [self.channels]
            shape[apart] = len(taps[apart].first)
            low, high = (v[taps[apart].first].reshape(shape) for v in (low, high))
        else:
            low, high = low[0], high[0]
        return np.clip(values, low, high).astype(np.float32)

    def _normalised(self, pixels: NDArray[Any], window: Region, region: Region | None) -> NDArray[Any]:
        """Return pixels in the units that the network reads; `region` is where they lie once resampled."""
        if not self.view.intensities:
            return pixels
        out = np.empty(pixels.shape, np.float32)
        mask = self._foreground(window, region) if any(self.view.masked) else None
        for k, becomes in enumerate(self.view.intensities):
            out[..., k] = becomes(pixels[..., k])
            if mask is not None and self.view.masked[k]:
                out[..., k][~mask] = 0.0
        return out

    def _foreground(self, window: Region, region: Region | None) -> NDArray[np.bool_]:
        """Return the foreground of a window of the source, or as it is on the working grid."""
        with self._lock:
            if self._mask is None:
                self._mask = voxels_of(self.source, self.view.crop)
        if region is None or not self._changes:
            return self._mask[window.slices()]
        taps = self._taps(region, "linear")
        part = self._mask[tuple(slice(t.start, t.stop) for t in taps)]
        share = apply_taps(part[..., None].astype(np.float64), taps, np.dtype(np.float64))
        return np.asarray(share[..., 0] >= 0.5)

    def moments(self) -> list[Moments]:
        """Return each channel's moments on the grid as it is now; of the foreground, where that counts."""
        found = [Moments()] * self.channels
        frame = Region((0,) * len(self.shape), self.shape)
        for slab in slabs(self.shape, self.channels):
            pixels = self._inside(slab.intersect(frame)).pixels
            mask = self._foreground(slab, slab) if any(self.view.masked) else None
            for k in range(self.channels):
                known = mask is None or not self.view.masked[k]
                values = pixels[..., k] if known or mask is None else pixels[..., k][mask]
                found[k] = found[k] + Moments.of(values)
        return found


def view_of(source: Source, rules: ViewRules) -> View:
    """Return how a model sees an open source, everything known. Reads all of it, up to three times.

    Raises what `survey` raises.
    """
    rules = settled(source, rules)
    view = survey(source, rules)
    if not rules.rules or view.intensities:
        return view
    numbers = rules.numbers(channels_of(source), VolumeGrid(source, view).moments())
    return replace(view, intensities=numbers)


def _halves(region: Region) -> Iterator[Region]:
    """Yield the parts of a region cut in the middle of each axis."""
    cuts = []
    for a, n in zip(region.start, region.shape, strict=True):
        cuts.append([(a, n)] if n == 1 else [(a, n // 2), (a + n // 2, n - n // 2)])
    for spans in product(*cuts):
        yield Region(tuple(a for a, _ in spans), tuple(n for _, n in spans))
