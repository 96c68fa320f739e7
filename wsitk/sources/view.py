"""How a model looks at a volume: which box of it, on which grid, in which units. Found once, before any tile.

The box around what is not zero, the moments of the intensities and their extremes all need the whole input;
they are gathered slab by slab, in a fixed order and in float64, so that the same file gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, SpacingError
from wsitk.geometry import Region
from wsitk.sources.base import Source
from wsitk.sources.resample import Rule
from wsitk.sources.spacing import require_spacing
from wsitk.volumes.nnunet_rules import (
    QUANTILES,
    Affine,
    IntensityRule,
    Moments,
    Resampling,
    foreground,
    nonzero_box,
    resampling,
)
from wsitk.volumes.quantiles import Histogram

__all__ = ["View", "ViewRules", "channels_of", "foreground_of", "settled", "slabs", "survey", "voxels_of"]

_SLAB_PIXELS = 1 << 22
_MOST_PIXELS = 1 << 34
_MOST_TIMES = 1000.0  # working voxels per voxel of the input: 10 along each axis


@dataclass(frozen=True)
class ViewRules:
    """What a model asks of a view: pixel size (None: as it is), the box, the intensities and their order.

    `crop` leaves out what is zero around the input. `rules` has one entry for all channels, or one for each;
    they are applied before the input is resampled if `first`, else to what came of that. `way` is how it is
    resampled, `fit` the shape that it is brought to, whatever its own. `orientation` is where a volume's axes x, y
    and z must point, as NIfTI's letters say it ("RAS": to the right, the front, the head); empty takes any.
    """

    spacing: tuple[float, ...] | None
    crop: bool = False
    rules: tuple[IntensityRule, ...] = ()
    first: bool = False
    way: Rule = "cubic"
    fit: tuple[int, ...] = ()
    orientation: str = ""

    def each(self, channels: int) -> tuple[IntensityRule, ...]:
        """Return a rule for each channel; none at all if intensities stay as they are."""
        return self.rules * channels if len(self.rules) == 1 else self.rules

    def masks(self, channels: int) -> tuple[bool, ...]:
        """Return for each channel whether only its foreground counts."""
        return tuple(rule.masked for rule in self.each(channels))

    @property
    def need_moments(self) -> bool:
        """Tell whether the volume must be read before its first value can be normalised."""
        return any(rule.needs_moments for rule in self.rules)

    def numbers(self, channels: int, moments: Sequence[Moments] = ()) -> tuple[Affine, ...]:
        """Return what becomes of each channel's values."""
        known = moments or [Moments()] * channels
        return tuple(rule.numbers(found) for rule, found in zip(self.each(channels), known, strict=False))


@dataclass(frozen=True)
class View:
    """A working grid over a box of level 0, and what becomes of the intensities on it.

    Attributes
    ----------
    crop, shape
        The box in level-0 pixels, and the working pixels along its axes. Their outer edges coincide.
    apart
        The axis along which slices are taken as they are, each resampled by itself; None if there is none.
    low, high
        Extremes (S, C) that no interpolated value may leave, in the units in which it is interpolated; S is the
        number of slices across `apart`, or 1. None where nothing is resampled.
    intensities
        What becomes of each channel's values; `masked` where they are 0 outside of the foreground; `first`:
        before resampling.
    way
        How values between pixels are found.
    turned
        The axes along which a tile is turned round before the network sees it.
    """

    crop: Region
    shape: tuple[int, ...]
    apart: int | None = None
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    intensities: tuple[Affine, ...] = ()
    masked: tuple[bool, ...] = ()
    first: bool = False
    way: Rule = "cubic"
    turned: tuple[int, ...] = ()

    @property
    def scale(self) -> tuple[float, ...]:
        """Return level-0 pixels per working pixel along each axis."""
        return tuple(n / m for n, m in zip(self.crop.shape, self.shape, strict=True))

    @property
    def offset(self) -> tuple[float, ...]:
        """Return where working pixel 0 begins at level 0."""
        return tuple(float(a) for a in self.crop.start)

    def rules(self, rule: Rule) -> tuple[Rule, ...]:
        """Return the rule along each axis of an interpolation by `rule`."""
        return tuple("nearest" if axis == self.apart else rule for axis in range(len(self.shape)))

    def as_json(self) -> dict[str, Any]:
        """Return what the view is, in plain JSON: for the run key and the provenance."""
        return {
            "crop": [list(self.crop.start), list(self.crop.shape)],
            "shape": list(self.shape),
            "slices_apart": self.apart,
            "intensities": [[repr(v) for v in (a.shift, a.scale, a.low, a.high)] for a in self.intensities],
            "way": self.way,
            "turned": list(self.turned),
        }


def settled(source: Source, rules: ViewRules) -> ViewRules:
    """Return the rules with nothing left open that the kind of input decides."""
    # what a radiograph's look-up tables give is no picture of bytes, even where it fits into them
    picture = source.dtype == np.uint8 and source.channel_names != ("intensity",)
    shown: Literal["byte", "unit"] = "byte" if picture else "unit"
    return replace(
        rules, rules=tuple(replace(r, scheme=shown) if r.scheme == "shown" else r for r in rules.rules)
    )


def survey(source: Source, rules: ViewRules) -> View:
    """Return the view of an open source, of whose intensities only those are known that the input itself tells.

    Where the moments are those of the resampled volume (``rules.first`` is false), `intensities` stay empty; see
    `view_of`. Reads the whole input, at most three times. Raises SpacingError (WSI201, WSI202, WSI205) and SourceError
    (WSI111; WSI114 if everything is zero).
    """
    crop = foreground_of(source) if rules.crop else Region((0,) * source.ndim, source.shape)
    plan = _resampling(source, crop, rules)
    changes = plan.shape != crop.shape
    view = View(
        crop,
        plan.shape,
        plan.axis if changes else None,
        masked=rules.masks(channels_of(source)),
        way=rules.way,
        turned=_turned(source, rules.orientation),
    )
    bounded = changes and rules.way == "cubic"  # other ways never overshoot
    if not bounded and not rules.need_moments:
        first = rules.first or not changes
        return replace(view, intensities=rules.numbers(channels_of(source)), first=first)
    mask = voxels_of(source, crop) if any(view.masked) else None
    moments, low, high = _gather(source, view, mask)
    if any(rule.needs_quantiles for rule in rules.rules):
        moments = _with_quantiles(source, view, mask, moments)
    first = rules.first or not changes
    known = first or not rules.need_moments
    numbers = rules.numbers(channels_of(source), moments) if known else ()
    if not changes:
        return replace(view, intensities=numbers, first=True)
    if first and numbers:
        low, high = _converted(low, high, numbers, view.masked)
    return replace(view, intensities=numbers, first=first, low=low, high=high)


def channels_of(source: Source) -> int:
    """Return the number of channels; 1 for a source without that axis."""
    return len(source.channel_names) if "c" in source.axes else 1


def slabs(shape: tuple[int, ...], channels: int) -> Iterator[Region]:
    """Yield boxes across the first axis that fill `shape`, each of a few million values."""
    thick = max(1, _SLAB_PIXELS // max(1, prod(shape[1:]) * channels))
    for start in range(0, shape[0], thick):
        yield Region((start, *(0,) * (len(shape) - 1)), (min(thick, shape[0] - start), *shape[1:]))


def foreground_of(source: Source) -> Region:
    """Return the smallest box around everything that is not zero in some channel, slab by slab.

    Raises SourceError: WSI114 if there is nothing.
    """
    boxes = []
    for slab in slabs(source.shape, channels_of(source)):
        found = nonzero_box((_voxels(source, slab) != 0).any(axis=-1))
        if found is not None:
            boxes.append(
                Region(tuple(a + b for a, b in zip(found.start, slab.start, strict=True)), found.shape)
            )
    if not boxes:
        raise SourceError("WSI114", f"{source.name}: every voxel is zero; nothing to find in it")
    starts, stops = zip(*((b.start, b.stop) for b in boxes), strict=True)
    return Region.between(
        (min(a) for a in zip(*starts, strict=True)), (max(b) for b in zip(*stops, strict=True))
    )


def voxels_of(source: Source, crop: Region) -> NDArray[np.bool_]:
    """Return the foreground of a box: not zero in some channel, holes filled; a byte per voxel."""
    mask = np.empty(crop.shape, np.bool_)
    for slab in slabs(crop.shape, channels_of(source)):
        place = Region(tuple(a + b for a, b in zip(slab.start, crop.start, strict=True)), slab.shape)
        mask[slab.slices()] = (_voxels(source, place) != 0).any(axis=-1)
    return foreground(mask[None])


def _turned(source: Source, orientation: str) -> tuple[int, ...]:
    """Return the axes, of (z, y, x), that run against `orientation`.

    Raises SourceError (WSI135) for a volume whose axes stand in another order than x, y, z. What doesn't say how
    it lies is taken as it is.
    """
    if not orientation or source.frame is None:
        return ()
    # columns are the axes z, y, x; rows are x, y, z of LPS
    cosines = source.frame.directions[:, ::-1]
    if (np.abs(cosines).argmax(axis=0) != np.arange(3)).any():
        raise SourceError(
            "WSI135",
            f"{source.name}: its slices are not axial, and the model was trained on volumes in the order "
            f"{orientation}; reorient it first (nibabel.as_closest_canonical, SimpleITK.DICOMOrient)",
        )
    against = zip("LPS", np.diag(cosines), orientation, strict=True)
    return tuple(
        sorted(2 - k for k, (plus, way, wanted) in enumerate(against) if (way > 0) != (plus == wanted))
    )


def _resampling(source: Source, crop: Region, rules: ViewRules) -> Resampling:
    if rules.fit:
        return Resampling(rules.fit, 3)
    if rules.spacing is None:
        return Resampling(crop.shape, 3)
    um = require_spacing(source).um
    plan = resampling(crop.shape, um, rules.spacing)
    if rules.way != "cubic":  # slices apart are nnU-Net's idea
        plan = replace(plan, axis=None)
    times = prod(plan.shape) / crop.size
    if min(plan.shape) < 1 or prod(plan.shape) > _MOST_PIXELS or times > _MOST_TIMES:
        have, want, old, new = (
            " x ".join(f"{v:g}" for v in values) for values in (um, rules.spacing, crop.shape, plan.shape)
        )
        raise SpacingError(
            "WSI205",
            f"{source.name}: {old} voxels of {have} µm would become {new} of {want} µm; check the voxel size, or "
            "use a model for such images",
        )
    return plan


def _voxels(source: Source, region: Region) -> NDArray[Any]:
    """Return (*region.shape, C) of level 0."""
    pixels = source.read_inside(region, 0).pixels
    return pixels if "c" in source.axes else pixels[..., None]


Extremes = NDArray[np.float64]


def _gather(
    source: Source, view: View, mask: NDArray[np.bool_] | None
) -> tuple[list[Moments], Extremes, Extremes]:
    """Return each channel's moments (of the foreground, where masked), and its extremes (S, C)."""
    crop, apart, channels = view.crop, view.apart, channels_of(source)
    count = 1 if apart is None else crop.shape[apart]
    moments = [Moments()] * channels
    low, high = np.full((count, channels), np.inf), np.full((count, channels), -np.inf)
    for slab in slabs(crop.shape, channels):
        place = Region(tuple(a + b for a, b in zip(slab.start, crop.start, strict=True)), slab.shape)
        pixels = _voxels(source, place)
        for k in range(channels):
            values = pixels[..., k]
            known = mask is None or not view.masked[k]
            inside = values if known or mask is None else values[mask[slab.slices()]]
            moments[k] = moments[k] + Moments.of(_finite(inside, source))
        across = tuple(a for a in range(len(crop.shape)) if a != apart)
        rows = slab.slices()[apart] if apart is not None else slice(0, 1)
        low[rows] = np.minimum(low[rows], pixels.min(axis=across))
        high[rows] = np.maximum(high[rows], pixels.max(axis=across))
    return moments, low, high


def _with_quantiles(
    source: Source, view: View, mask: NDArray[np.bool_] | None, moments: Sequence[Moments]
) -> list[Moments]:
    """Return each channel's moments with its quantiles, for which the input is read once more."""
    counted = [Histogram(m.low, m.high, source.dtype) for m in moments]
    for slab in slabs(view.crop.shape, len(counted)):
        place = Region(tuple(a + b for a, b in zip(slab.start, view.crop.start, strict=True)), slab.shape)
        pixels = _voxels(source, place)
        for k, histogram in enumerate(counted):
            known = mask is None or not view.masked[k]
            histogram.add(pixels[..., k] if known or mask is None else pixels[..., k][mask[slab.slices()]])
    each = zip(moments, counted, strict=True)
    return [replace(m, quantiles=tuple(map(h.quantile, QUANTILES))) for m, h in each]


def _finite(values: NDArray[Any], source: Source) -> NDArray[Any]:
    """Return values that are numbers: a single NaN would spread over the whole volume."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise SourceError("WSI114", f"{source.name}: some voxels are not finite numbers; replace them first")
    return values


def _converted(
    low: Extremes, high: Extremes, numbers: tuple[Affine, ...], masked: Sequence[bool]
) -> tuple[Extremes, Extremes]:
    """Return extremes (S, C) in normalised units; what is masked may be 0, too."""
    both = []
    for values in (low, high):
        new = np.stack([a(values[:, k]).astype(np.float64) for k, a in enumerate(numbers)], axis=1)
        both.append(new)
    zero = np.asarray(masked)
    return np.where(zero, np.minimum(both[0], 0), both[0]), np.where(zero, np.maximum(both[1], 0), both[1])
