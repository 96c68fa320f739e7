"""What is asked of an input where it can be read: its pixels with the restored ones laid over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import Origin, borrowed
from wsitk.sources.base import Source
from wsitk.sources.restored import RestoredSource

__all__ = ["UNREADABLE", "before_and_after", "restored_pixels"]

UNREADABLE = 128
"""What stands for pixels that can't be decoded; their number is in the provenance."""

_SMALLEST = 64  # pixels on a side of what is given up as a whole; stored tiles are multiples of it


def restored_pixels(origin: Origin, folder: str, region: Region) -> tuple[NDArray[Any], int]:
    """Return a level-0 region (C, h, w) with the restored pixels in it, and how many could not be read."""
    with borrowed(origin) as source:
        over = RestoredSource(source, folder)
        out = np.empty((*region.shape, len(over.channel_names)), over.dtype)
        lost = _fill(over, region, out)
    return np.ascontiguousarray(np.moveaxis(out, -1, 0)), lost


def _fill(source: Source, region: Region, out: NDArray[Any], level: int = 0) -> int:
    """Read a region of a level into `out`; what can't be decoded is found by halving, and grey. Returns its pixels."""
    try:
        out[:] = source.read(region, level)
    except SourceError as error:
        if error.code == "WSI684":  # the restoration's own files
            raise
        if max(region.shape) <= _SMALLEST:
            out[:] = UNREADABLE
            return region.size
    else:
        return 0
    axis = int(np.argmax(region.shape))
    # on a line between stored tiles, if their sides are what they usually are
    middle = round((region.start[axis] + region.shape[axis] / 2) / _SMALLEST) * _SMALLEST - region.start[axis]
    parts: list[tuple[slice, ...]] = [
        (slice(None),) * axis + (s,) for s in (slice(middle), slice(middle, None))
    ]
    first = [middle if k == axis else n for k, n in enumerate(region.shape)]
    start = [a + middle if k == axis else a for k, a in enumerate(region.start)]
    halves = Region(region.start, tuple(first)), Region.between(start, region.stop)
    return sum(_fill(source, half, out[part], level) for half, part in zip(halves, parts, strict=True))


def before_and_after(
    origin: Origin, folder: str, region: Region, side: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a level-0 region as it was and as it became, at the coarsest level that is still `side` pixels long."""
    with borrowed(origin) as source:
        level = max(
            (k for k, v in enumerate(source.levels) if max(region.shape) / max(v.downsample) >= side),
            default=0,
        )
        factors = source.levels[level].downsample
        reduced = Region.between(
            (int(a / f) for a, f in zip(region.start, factors, strict=True)),
            (int(np.ceil(b / f)) for b, f in zip(region.stop, factors, strict=True)),
        ).intersect(Region((0, 0), source.levels[level].shape))
        pair = []
        for shown in (source, RestoredSource(source, Path(folder))):
            pixels = np.empty((*reduced.shape, len(source.channel_names)), source.dtype)
            _fill(shown, reduced, pixels, level)
            pair.append(pixels)
    return pair[0], pair[1]
