"""Volumes of one patient as channels of one: the others are interpolated on the first one's grid, when read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.files import reopen

__all__ = ["ChannelSource", "open_channels"]

Array = NDArray[Any]

_BLOCK = 64  # voxels along each axis that are interpolated at a time
_WHOLE = 1e-3  # of a voxel: grids that differ by less are one grid


@final
class ChannelSource(Source):
    """Several co-registered volumes as one with axes (z, y, x, c), on the grid of the first.

    Channels are the first volume's, then those of each further one. A volume on another grid is interpolated
    trilinearly at the places that both frames name; beyond its border its channels are `fill`. Where all
    grids and types agree, the type stays; otherwise it is float32. The sources are closed with this one.

    Raises SourceError: WSI144 for an input without a frame, WSI145 for one that lies wholly elsewhere.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        name: str | None = None,
        fill: float = 0.0,
        ref: SourceRef | None = None,
    ) -> None:
        first = sources[0]
        self.name = name or first.name
        self._sources = tuple(sources)
        self._fill = fill
        frames = [_frame_of(self.name, s) for s in sources]
        self.frame = frames[0]
        self._maps = tuple(
            _grid_map(self.name, first, s, frames[0], f) for s, f in zip(sources, frames, strict=True)
        )
        self.axes = ("z", "y", "x", "c")
        self.levels = first.levels[:1]
        kinds = {s.dtype for s in sources}
        as_stored = len(kinds) == 1 and all(m is None for m in self._maps)
        self.dtype = first.dtype if as_stored else np.dtype(np.float32)
        self.channel_names = tuple(n for s in sources for n in _names(s))
        self.spacing, self.spacing_error = first.spacing, first.spacing_error
        self.bounds = first.bounds
        self.warnings = tuple(w for s in sources for w in s.warnings)
        self.ref = ref

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the region of all channels."""
        out = np.empty((*region.shape, len(self.channel_names)), self.dtype)
        at = 0
        for source, grid_map in zip(self._sources, self._maps, strict=True):
            count = len(_names(source))
            part = out[..., at : at + count]
            if grid_map is None:
                part[...] = _with_channels(source, region)
            else:
                _interpolate(source, grid_map, region, part, self._fill)
            at += count
        return Reading(out)

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the files are opened again where it arrives."""
        if self.ref is None:
            raise TypeError("a ChannelSource over open sources cannot be pickled; open it by its paths")
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return the name, and the identity of every input in order."""
        return {"name": self.name, "inputs": [s.identity() for s in self._sources]}

    def stamp(self) -> dict[str, Any] | None:
        """Return size and time of change of each file."""
        files = [f for s in self._sources for f in (s.stamp() or {}).get("files", [])]
        return {"files": files} if files else None

    def close(self) -> None:
        """Close all inputs."""
        for source in self._sources:
            source.close()


def open_channels(
    path: str,
    also: Sequence[str | os.PathLike[str]],
    *,
    mpp: float | Sequence[float] | None = None,
    name: str | None = None,
    reader: str | None = None,
) -> ChannelSource:
    """Open a volume and its companions; `mpp` and `reader` are the first one's."""
    from wsitk.sources import open_source

    opened: list[Source] = []
    try:
        opened.append(open_source(path, mpp=mpp, name=name, reader=reader))
        opened += [open_source(other) for other in also]
        options = {"mpp": mpp, "name": name, "reader": reader}
        kept = {k: v for k, v in options.items() if v is not None}
        further = [os.path.abspath(os.fspath(other)) for other in also]
        return ChannelSource(opened, ref=SourceRef(os.path.abspath(path), {**kept, "also": further}))
    except BaseException:
        for source in opened:
            source.close()
        raise


def _names(source: Source) -> tuple[str, ...]:
    """Return a source's channels, each called by its file where the file gives them no names."""
    stem = source.name
    for suffix in (".gz", ".nii", ".nrrd", ".nhdr", ".dcm"):
        stem = stem.removesuffix(suffix)
    return tuple(f"{stem} {n}" for n in source.channel_names) if "c" in source.axes else (stem,)


def _frame_of(name: str, source: Source) -> Frame:
    if source.frame is None:
        raise SourceError(
            "WSI144",
            f"{name}: {source.name} does not say where it lies; channels must be volumes with a frame",
        )
    return source.frame


def _grid_map(
    name: str, first: Source, other: Source, frame: Frame, its: Frame
) -> NDArray[np.float64] | None:
    """Return the map from indices of `first` to those of `other`; None where they are the same.

    Raises SourceError (WSI145) if the two boxes do not meet.
    """
    if first.shape == other.shape and frame.same_grid(its, first.shape, _WHOLE):
        return None
    matrix = frame.index_map(its)
    corners = np.array(list(product(*([-0.5, n - 0.5] for n in first.shape))))
    places = corners @ matrix[:3, :3].T + matrix[:3, 3]
    apart = (places.max(axis=0) < -0.5) | (places.min(axis=0) > np.array(other.shape) - 0.5)
    if apart.any():
        raise SourceError(
            "WSI145", f"{name}: {other.name} lies wholly outside {first.name}; are they of one examination?"
        )
    return matrix


def _with_channels(source: Source, region: Region) -> Array:
    pixels = source.read_inside(region, 0).pixels
    return pixels if "c" in source.axes else pixels[..., None]


def _interpolate(
    source: Source, matrix: NDArray[np.float64], region: Region, out: Array, fill: float
) -> None:
    """Fill `out` (z, y, x, c) with values of `source` at the mapped places, block by block."""
    # blocks are cut on multiples of their size, though a voxel's value depends on its own place alone
    for corner in product(
        *(range(a - a % _BLOCK, b, _BLOCK) for a, b in zip(region.start, region.stop, strict=True))
    ):
        block = Region(corner, (_BLOCK,) * 3).intersect(region)
        out[block.slices(region.start)] = _block(source, matrix, block, fill)


def _block(source: Source, matrix: NDArray[np.float64], block: Region, fill: float) -> Array:
    from scipy.ndimage import map_coordinates

    places = _places(matrix, block)
    upper = np.array(source.shape, np.float64)
    # half a voxel around the outer centres belongs to the volume: its border value is held there
    inside = np.ones(block.shape, np.bool_)
    for place, length in zip(places, upper, strict=True):
        inside &= (place >= -0.5) & (place <= length - 0.5)
    out = np.full((*block.shape, len(_names(source))), fill, np.float32)
    if not inside.any():
        return out
    held = [np.clip(p, 0, n - 1) for p, n in zip(places, upper, strict=True)]
    window = Region.between(
        (int(np.floor(p[inside].min())) for p in held),
        (min(int(np.floor(p[inside].max())) + 2, int(n)) for p, n in zip(held, upper, strict=True)),
    )
    pixels = _with_channels(source, window)
    at = np.stack([p[inside] - a for p, a in zip(held, window.start, strict=True)])
    for channel in range(out.shape[-1]):
        values = map_coordinates(pixels[..., channel].astype(np.float64), at, order=1, mode="nearest")
        out[..., channel][inside] = values
    return out


def _places(matrix: NDArray[np.float64], block: Region) -> list[NDArray[np.float64]]:
    """Return, along each axis of the other grid, the indices of every voxel of `block`."""
    z, y, x = np.ogrid[block.slices()]
    return [
        np.asarray(matrix[k, 0] * z + matrix[k, 1] * y + matrix[k, 2] * x + matrix[k, 3]) for k in range(3)
    ]
