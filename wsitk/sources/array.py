"""Arrays in memory (NumPy), or lazy ones (dask, zarr), as a source of one level."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources.base import Level, Reading, Source
from wsitk.sources.files import closed
from wsitk.sources.spacing import explicit, judge

__all__ = ["ArraySource", "guess_axes"]

_SPATIAL = ("z", "y", "x")
_CHUNK = 512
_HASH_WHOLE = 1 << 30
_HASH_SLABS = 16


def guess_axes(shape: Sequence[int]) -> tuple[str, ...]:
    """Return the axes of an array of two or three dimensions; three with at most 4 last are colours.

    Raises UsageError (WSI020) where only the caller can know.
    """
    if len(shape) == 2:
        return ("y", "x")
    if len(shape) == 3:
        return ("y", "x", "c") if shape[-1] <= 4 else _SPATIAL
    raise UsageError("WSI020", f"an array of shape {tuple(shape)} needs axes, e.g. axes='zyxc'")


def _check_axes(axes: Sequence[str], ndim: int) -> tuple[str, ...]:
    """Return `axes` as a tuple; raises UsageError (WSI020) unless they are z, y, x in order, and c once."""
    names = tuple(axes)
    spatial = tuple(a for a in names if a != "c")
    if len(names) != ndim or len(set(names)) != ndim or spatial not in (_SPATIAL, _SPATIAL[1:]):
        raise UsageError(
            "WSI020", f"axes {''.join(names)!r} do not fit {ndim} dimensions; wanted yx or zyx, with c or not"
        )
    return names


@final
class ArraySource(Source):
    """A source over an array that the caller keeps; channels are moved last if they are elsewhere.

    Parameters
    ----------
    array
        Anything with `shape`, `dtype` and slicing: NumPy, dask or zarr. It is read, never changed.
    axes
        One letter for each dimension out of z, y, x, c; guessed for two and three dimensions.
    spacing
        Micrometres per pixel, one number or one for each spatial axis in array order.
    channel_names
        One for each channel; ``red, green, blue`` for three channels unless given.
    """

    def __init__(
        self,
        array: Any,
        *,
        axes: Sequence[str] | None = None,
        spacing: float | Sequence[float] | None = None,
        name: str | None = None,
        channel_names: Sequence[str] | None = None,
    ) -> None:
        stored = tuple(int(n) for n in array.shape)
        names = _check_axes(axes if axes is not None else guess_axes(stored), len(stored))
        if any(n == 0 for n in stored):
            raise UsageError("WSI020", f"the array is empty: shape {stored}")
        spatial = tuple(a for a in names if a != "c")
        self._array: Any = array
        self._channel_axis = names.index("c") if "c" in names else None
        self.name = name or "array"
        self.axes = (*spatial, "c") if "c" in names else spatial
        shape = tuple(n for a, n in zip(names, stored, strict=True) if a != "c")
        chunks = tuple(c for a, c in zip(names, _chunk_of(array, stored), strict=True) if a != "c")
        self.levels = (Level(shape, (1.0,) * len(shape), chunks),)
        self.dtype = np.dtype(array.dtype)
        count = stored[self._channel_axis] if self._channel_axis is not None else 0
        self.channel_names = tuple(channel_names) if channel_names else default_channels(count)
        if len(self.channel_names) != count:
            raise UsageError("WSI020", f"{len(self.channel_names)} channel names for {count} channels")
        self.spacing, self.spacing_error = judge(
            self.name, explicit(spacing, len(shape)), ("spacing",), len(shape)
        )
        self.bounds = Region((0,) * len(shape), shape)
        self.ref = None

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return a copy of the region."""
        if self._array is None:
            raise closed(self.name)
        where: list[slice] = list(region.slices())
        if self._channel_axis is not None:
            where.insert(self._channel_axis, slice(None))
        pixels = _load(self._array[tuple(where)])
        if self._channel_axis is not None:
            pixels = np.moveaxis(pixels, self._channel_axis, -1)
        return Reading(np.array(pixels, order="C"))

    def identity(self) -> dict[str, Any]:
        """Return name, shape, type and a sha256 of the pixels; of more than 1 GiB, of 16 slabs."""
        if self._array is None:
            raise closed(self.name)
        length = int(self._array.shape[0])
        nbytes = prod(int(n) for n in self._array.shape) * self.dtype.itemsize
        digest = hashlib.sha256()
        step = max(1, int((64 << 20) * length / max(nbytes, 1)))
        starts = range(0, length, step)
        if nbytes > _HASH_WHOLE:
            starts = range(0, length, max(step, -(-length // _HASH_SLABS)))
        for start in starts:
            slab = _load(self._array[start : start + step])
            digest.update(np.ascontiguousarray(slab).tobytes())
        return {
            "name": self.name,
            "shape": [int(n) for n in self._array.shape],
            "dtype": self.dtype.str,
            "sha256": digest.hexdigest(),
        }

    def close(self) -> None:
        """Let go of the array."""
        self._array = None


def default_channels(count: int) -> tuple[str, ...]:
    """Return names for `count` channels."""
    if count == 3:
        return ("red", "green", "blue")
    return tuple(f"channel {i}" for i in range(count))


def _chunk_of(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a lazy array's chunk shape, or a handy window of an array in memory."""
    chunks = getattr(array, "chunks", None)
    if not chunks:
        return tuple(min(_CHUNK, n) for n in shape)
    return tuple(int(c[0] if isinstance(c, tuple) else c) for c in chunks)


def _load(part: Any) -> NDArray[Any]:
    """Return a slice as NumPy; a dask slice is computed in the calling thread, which is one of a pool."""
    return np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)
