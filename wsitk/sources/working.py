"""The image at a model's pixel size: one value for each place, whichever window asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product
from math import floor, prod
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SpacingError, UsageError
from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source
from wsitk.sources.resample import Taps, apply_taps, halve, make_taps
from wsitk.sources.spacing import require_spacing

__all__ = ["WorkingGrid", "WorkingImage"]

MAX_UPSAMPLING = 2.5
_PIECE_PIXELS = 1 << 24


class WorkingGrid(ABC):
    """Pixels on a grid of `shape`, and what lies beyond it; subclasses say what lies inside.

    `border` is the image's mirror (without repeating the border pixel), `fill`, or nothing: with ``clip`` a
    region is cut to the image, as a network padded with zeros in each layer wants it.
    """

    source: Source
    border: Literal["reflect", "constant", "clip"]
    fill: float
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def _inside(self, region: Region) -> Reading:
        """Return a region that lies inside the grid."""

    def read(self, region: Region) -> Reading:
        """Return pixels (spatial..., C) of `dtype` over `region` in working pixels.

        The region may reach beyond the image. `absent` marks working pixels inside the image of which
        more than half is missing from the file. Raises SourceError (WSI111).
        """
        frame = Region((0,) * len(self.shape), self.shape)
        if frame.contains(region):
            return self._inside(region)
        common = region.intersect(frame)
        if self.border == "clip":
            return self._inside(common)
        places = [self._places(*axis) for axis in zip(region.start, region.stop, self.shape, strict=True)]
        if self.border == "constant":
            return self._on_fill(region, common)
        box = Region.between((p.min() for p in places), (p.max() + 1 for p in places))
        inside = self._inside(box)
        index = np.ix_(*(p - a for p, a in zip(places, box.start, strict=True)))
        absent = None
        if inside.absent is not None and common.size:
            absent = np.zeros(region.shape, np.bool_)
            absent[common.slices(region.start)] = inside.absent[common.slices(box.start)]
        return Reading(inside.pixels[index], _or_none(absent))

    def _on_fill(self, region: Region, common: Region) -> Reading:
        """Return what lies inside the image on a ground of `fill`."""
        pixels = np.full((*region.shape, self.channels), self.fill, self.dtype)
        if not common.size:
            return Reading(pixels)
        inside = self._inside(common)
        pixels[common.slices(region.start)] = inside.pixels
        absent = None
        if inside.absent is not None:
            absent = np.zeros(region.shape, np.bool_)
            absent[common.slices(region.start)] = inside.absent
        return Reading(pixels, absent)

    @staticmethod
    def _places(low: int, high: int, length: int) -> NDArray[np.int64]:
        """Return, for each coordinate of one axis, the one inside the image that it mirrors."""
        period = max(1, 2 * (length - 1))
        folded = np.arange(low, high, dtype=np.int64) % period
        return np.minimum(folded, period - folded) if length > 1 else folded

    @property
    def channels(self) -> int:
        """Return the length of the last axis of what `read` returns."""
        return len(self.source.channel_names) if "c" in self.source.axes else 1


@final
class WorkingImage(WorkingGrid):
    """A source resampled to `spacing` micrometres: the grid that tiles, objects and fields live on.

    It reads the coarsest level that is still as fine as `spacing`, and takes exact area means of it: a
    factor within `tolerance` (relative) of a whole number becomes that number, so that 0.2457 to 0.5 µm
    is a mean of 2 x 2 pixels, and 0.499 to 0.5 leaves the pixels alone. A coarser source is interpolated
    linearly up to 2.5 times, with a warning. Working pixel k covers ``[k * scale, (k + 1) * scale)`` of
    level 0; at the far border the mean is over the part that lies inside.

    Parameters
    ----------
    spacing
        Micrometres per pixel along each axis; None takes level 0 as it is.
    border, fill
        What lies beyond the image: its mirror (without repeating the border pixel), `fill`, or nothing: with
        ``clip`` a region is cut to the image, as a network padded with zeros in each layer wants it.

    Attributes
    ----------
    level, factor
        The level that is read, and its pixels per working pixel along each axis.
    scale
        Level-0 pixels per working pixel along each axis.
    shape
        Working pixels along each axis: those of which at least half lies inside the image.
    spacing
        Micrometres per working pixel after rounding `factor`; None if the source's is unknown.
    warnings
        What a reader of the results should know, one line each.

    Raises
    ------
    SpacingError
        WSI201, WSI202 if the source has no usable pixel size; WSI203 if it is more than 2.5 times coarser.
    """

    def __init__(
        self,
        source: Source,
        spacing: tuple[float, ...] | None,
        *,
        tolerance: float = 0.05,
        border: Literal["reflect", "constant", "clip"] = "reflect",
        fill: float = 255,
    ) -> None:
        if spacing is not None and len(spacing) != source.ndim:
            raise UsageError("WSI021", f"{source.name}: {len(spacing)} spacings for {source.ndim} axes")
        if border not in ("reflect", "constant", "clip"):
            raise UsageError("WSI021", f"border must be 'reflect', 'constant' or 'clip', got {border!r}")
        self.source = source
        self.border = border
        self.fill = fill
        self.dtype = source.dtype
        self.warnings: tuple[str, ...] = ()
        self.level, self.factor = 0, (1.0,) * source.ndim
        if spacing is not None:
            self.level, self.factor = self._fit(spacing, tolerance)
        chosen = source.levels[self.level]
        self.scale = tuple(f * d for f, d in zip(self.factor, chosen.downsample, strict=True))
        self.shape = tuple(max(1, floor(n / f + 0.5)) for n, f in zip(chosen.shape, self.factor, strict=True))
        known = source.spacing
        self.spacing = tuple(u * s for u, s in zip(known.um, self.scale, strict=True)) if known else None

    def _fit(self, spacing: tuple[float, ...], tolerance: float) -> tuple[int, tuple[float, ...]]:
        """Return the level to read and its pixels per working pixel."""
        um = require_spacing(self.source).um
        chosen, factor = 0, tuple(t / u for t, u in zip(spacing, um, strict=True))
        for number, level in enumerate(self.source.levels):
            wanted = tuple(t / (u * d) for t, u, d in zip(spacing, um, level.downsample, strict=True))
            if min(wanted) >= 1 - tolerance:
                chosen, factor = number, wanted
        factor = tuple(_settle(f, tolerance) for f in factor)
        if min(factor) < 1:
            self._judge_upsampling(1 / min(factor), um, spacing)
        return chosen, factor

    def _judge_upsampling(self, times: float, um: tuple[float, ...], spacing: tuple[float, ...]) -> None:
        """Warn of interpolation; raises SpacingError (WSI203) beyond 2.5 times."""
        have, want = (" x ".join(f"{v:.4g}" for v in values) for values in (um, spacing))
        text = f"{self.source.name}: its pixels are {have} µm, the model wants {want} µm"
        if times > MAX_UPSAMPLING:
            raise SpacingError(
                "WSI203",
                f"{text}: enlarging {times:.2f} times invents detail (limit {MAX_UPSAMPLING}); "
                "use a finer scan or a model for coarser pixels",
            )
        self.warnings = (f"WSI204 {text}: enlarged {times:.2f} times by linear interpolation",)

    def _inside(self, region: Region) -> Reading:
        """Return a region inside the image, computed in pieces that bound the memory."""
        rules = [
            make_taps(a, b, f, n) if b > a else None
            for a, b, f, n in zip(
                region.start, region.stop, self.factor, self.source.levels[self.level].shape, strict=True
            )
        ]
        taps = tuple(r for r in rules if r is not None)
        if len(taps) < len(rules):
            return Reading(np.empty((*region.shape, self.channels), self.source.dtype))
        if prod(t.stop - t.start for t in taps) <= _PIECE_PIXELS:
            return self._piece(region, taps)
        pixels = np.empty((*region.shape, self.channels), self.source.dtype)
        absent = np.zeros(region.shape, np.bool_)
        for part in self._pieces(region):
            got = self._inside(part)
            pixels[part.slices(region.start)] = got.pixels
            if got.absent is not None:
                absent[part.slices(region.start)] = got.absent
        return Reading(pixels, _or_none(absent))

    def _pieces(self, region: Region) -> Iterator[Region]:
        """Yield parts of `region` that read about a quarter of the limit each, or single pixels."""
        edge = (_PIECE_PIXELS / 4) ** (1 / region.ndim)
        sides = [max(1, int(edge / max(f, 1.0))) for f in self.factor]
        spans = zip(region.start, region.stop, sides, strict=True)
        for corner in product(*(range(a, b, s) for a, b, s in spans)):
            yield Region(corner, tuple(sides)).intersect(region)

    def _piece(self, region: Region, taps: tuple[Taps, ...]) -> Reading:
        """Return a region inside the image from one read of the level."""
        window = Region.between((t.start for t in taps), (t.stop for t in taps))
        raw = self.source.read_inside(window, self.level)
        pixels = raw.pixels if "c" in self.source.axes else raw.pixels[..., None]
        if all(f == 1 for f in self.factor):
            return Reading(pixels, raw.absent)
        absent = None
        if raw.absent is not None:
            share = apply_taps(raw.absent[..., None].astype(np.uint8), taps, np.dtype(np.float64))
            absent = _or_none(share[..., 0] > 0.5)
        if self._is_halving(region, window, pixels):
            return Reading(halve(np.ascontiguousarray(pixels)), absent)
        return Reading(apply_taps(pixels, taps, self.source.dtype), absent)

    def _is_halving(self, region: Region, window: Region, pixels: NDArray[Any]) -> bool:
        """Tell whether the piece is whole 2 x 2 blocks of bytes."""
        whole = tuple(2 * n for n in region.shape) == window.shape
        return (
            whole and pixels.dtype == np.uint8 and self.factor == (2.0, 2.0) and pixels.shape[2] in (1, 3, 4)
        )


def _settle(factor: float, tolerance: float) -> float:
    """Return the nearest whole number of at least 1 if `factor` is within `tolerance` of it."""
    whole = max(1, floor(factor + 0.5))
    return float(whole) if abs(factor - whole) <= tolerance * whole else factor


def _or_none(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return a mask that marks something, else None."""
    return mask if mask is not None and mask.any() else None
