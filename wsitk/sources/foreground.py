"""The box of what is worth computing in a volume, found slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources.base import Source

__all__ = ["foreground"]

_SLAB_BYTES = 64 << 20
_COARSE_UM = 4000.0  # of the grid on which a body is told from a table
_COARSE_LONGEST = 256


def foreground(
    source: Source, rule: Literal["nonzero", "body"] = "nonzero", *, threshold: float = -300.0
) -> Region:
    """Return the smallest box of level-0 voxels that holds the foreground; the whole volume if there is none.

    ``nonzero`` is nnU-Net's: any channel differs from 0, with holes filled (Isensee et al. 2021). Filling
    adds nothing outside the box of what it fills, so the box needs no filling, and one pass of slabs. ``body``
    is for CT: means over cells of about 4 mm of the first channel above `threshold` HU, opened by one cell so
    that table and sheets let go, of which the largest connected part counts; with a margin of one cell.

    Memory is a slab of 64 MiB, or one slice. Raises UsageError (WSI020) for flat images and unknown rules.
    """
    if source.ndim != 3 or rule not in ("nonzero", "body"):
        raise UsageError("WSI020", f"{source.name}: {source.ndim} axes with rule {rule!r}; wanted a volume")
    whole = Region((0,) * 3, source.shape)
    found = _nonzero(source) if rule == "nonzero" else _body(source, threshold)
    return found.intersect(whole) if found is not None else whole


def _slabs(source: Source, multiple: int = 1) -> Iterator[tuple[Region, NDArray[Any]]]:
    """Yield slabs of whole slices, a multiple of them each, as (z, y, x, c)."""
    depth, height, width = source.shape
    channels = max(1, len(source.channel_names)) if "c" in source.axes else 1
    one = height * width * channels * source.dtype.itemsize * multiple
    step = max(1, _SLAB_BYTES // one) * multiple
    for z in range(0, depth, step):
        region = Region((z, 0, 0), (min(step, depth - z), height, width))
        pixels = source.read_inside(region, 0).pixels
        yield region, pixels if "c" in source.axes else pixels[..., None]


def _nonzero(source: Source) -> Region | None:
    seen = [np.zeros(n, np.bool_) for n in source.shape]
    for region, pixels in _slabs(source):
        mask = (pixels != 0).any(axis=-1)
        for axis in range(3):
            others = tuple(k for k in range(3) if k != axis)
            seen[axis][region.start[axis] : region.stop[axis]] |= mask.any(axis=others)
    return _box(seen)


def _box(seen: list[NDArray[np.bool_]]) -> Region | None:
    """Return the box between the first and the last mark along each axis; None if there are none."""
    if not all(marks.any() for marks in seen):
        return None
    ends = [np.flatnonzero(marks)[[0, -1]] for marks in seen]
    return Region.between((int(a) for a, _ in ends), (int(b) + 1 for _, b in ends))


def _body(source: Source, threshold: float) -> Region | None:
    from scipy import ndimage

    cell = _cell(source)
    mask = _coarse(source, cell) > threshold
    opened: NDArray[np.bool_] = ndimage.binary_opening(mask, iterations=1)
    label: Callable[..., Any] = ndimage.label
    parts, count = label(opened)
    if not count:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    body = parts == 1 + int(sizes.argmax())  # of equals the first in C order
    box = _box([body.any(axis=tuple(k for k in range(3) if k != axis)) for axis in range(3)])
    assert box is not None  # the largest part is not empty
    grown = box.grow((1, 1, 1))
    return Region.between(
        (a * c for a, c in zip(grown.start, cell, strict=True)),
        (b * c for b, c in zip(grown.stop, cell, strict=True)),
    )


def _cell(source: Source) -> tuple[int, ...]:
    """Return voxels per cell along each axis: about 4 mm, and at most 256 cells."""
    um = source.spacing.um if source.spacing else (1000.0,) * 3
    return tuple(
        max(1, round(_COARSE_UM / u), -(-n // _COARSE_LONGEST)) for u, n in zip(um, source.shape, strict=True)
    )


def _coarse(source: Source, cell: tuple[int, ...]) -> NDArray[np.float64]:
    """Return means of the first channel over cells, over what exists of them at the far border."""
    out = np.empty(tuple(-(-n // c) for n, c in zip(source.shape, cell, strict=True)), np.float64)
    for region, pixels in _slabs(source, cell[0]):
        values = _means(pixels[..., 0], cell)
        first = region.start[0] // cell[0]
        out[first : first + values.shape[0]] = values
    return out


def _means(values: NDArray[Any], cell: tuple[int, ...]) -> NDArray[np.float64]:
    """Return means over cells; those that the border cuts, over what is left of them."""
    padded = np.pad(values, [(0, -n % c) for n, c in zip(values.shape, cell, strict=True)])
    counts = [np.minimum(c, n - np.arange(0, n, c)) for n, c in zip(values.shape, cell, strict=True)]
    # strided sums: numpy is slow at many short ones
    across = sum(padded[:, :, k :: cell[2]].astype(np.float64) for k in range(cell[2]))
    down = sum(np.asarray(across)[:, k :: cell[1]] for k in range(cell[1]))
    total = sum(np.asarray(down)[k :: cell[0]] for k in range(cell[0]))
    return np.asarray(total / np.multiply.outer(np.multiply.outer(counts[0], counts[1]), counts[2]))
