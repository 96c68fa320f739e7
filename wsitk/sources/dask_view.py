"""A lazy view of one level, or of the image at any pixel size, in chunks worth a task each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources.base import Source
from wsitk.sources.working import WorkingImage

if TYPE_CHECKING:
    import dask.array

__all__ = ["as_dask"]

# One task costs the scheduler about a millisecond: chunks of single tiles would spend their time there.
_EDGE = 1024
_EDGE_3D = 128


def as_dask(
    source: Source, *, level: int | None = None, spacing: float | tuple[float, ...] | None = None
) -> dask.array.Array:
    """Return (spatial..., c) of one level (default 0), or of the image resampled to `spacing` micrometres.

    The axes are the source's. Chunks are whole multiples of native tiles, about 1024 pixels long. Raises
    UsageError (WSI024) if both or a missing level are asked for, SpacingError as `WorkingImage` does.
    """
    if level is not None and spacing is not None:
        raise UsageError("WSI024", "give level or spacing, not both")
    if spacing is not None:
        values = spacing if isinstance(spacing, tuple) else (float(spacing),) * source.ndim
        # Tolerance 0: who asks for an array of 0.5 µm gets 0.5 µm, to the last bit.
        working = WorkingImage(source, values, tolerance=0.0)
        edges = _edges(source.ndim, working.shape)
        return _view(source, working.shape, edges, lambda r: _keep_axes(working.read(r).pixels, source))
    number = 0 if level is None else level
    if not 0 <= number < len(source.levels):
        raise UsageError("WSI024", f"{source.name} has levels 0 to {len(source.levels) - 1}, not {number}")
    chosen = source.levels[number]
    edges = _edges(source.ndim, chosen.shape, chosen.chunk)
    return _view(source, chosen.shape, edges, lambda r: source.read(r, number))


def _keep_axes(pixels: NDArray[Any], source: Source) -> NDArray[Any]:
    """Return pixels without the channel axis where the source has none."""
    return pixels if "c" in source.axes else pixels[..., 0]


def _edges(ndim: int, shape: tuple[int, ...], native: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the chunk length along each axis: native tiles up to about 1024 pixels (128 in volumes)."""
    goal = _EDGE if ndim <= 2 else _EDGE_3D
    base = native or (1,) * ndim
    return tuple(min(n, b * max(1, -(-goal // b))) for n, b in zip(shape, base, strict=True))


def _view(
    source: Source, shape: tuple[int, ...], edges: tuple[int, ...], read: Callable[[Region], NDArray[Any]]
) -> dask.array.Array:
    """Return a dask array whose chunks are read by `read`."""
    import dask.array as da

    tail = (len(source.channel_names),) if "c" in source.axes else ()
    full, chunks = shape + tail, edges + tail

    def block(block_info: Any = None) -> NDArray[Any]:
        spans = block_info[None]["array-location"][: len(shape)]
        return read(Region(tuple(a for a, _ in spans), tuple(b - a for a, b in spans)))

    normal = da.core.normalize_chunks(chunks, full, dtype=source.dtype)
    # A token of our own: dask would make one by pickling the source, pixels and all.
    meta = np.empty((0,) * len(full), source.dtype)
    return da.map_blocks(block, chunks=normal, dtype=source.dtype, meta=meta, token=uuid4().hex)
