"""The contract of a source: something with pixels, levels and a pixel size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from wsitk.frame import Frame
from wsitk.geometry import Region, Spacing

if TYPE_CHECKING:
    import dask.array
    import zarr

__all__ = ["Level", "Reading", "SourceRef", "Source"]


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution: spatial shape, level-0 pixels per pixel along each axis, native chunk shape."""

    shape: tuple[int, ...]
    downsample: tuple[float, ...]
    chunk: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """Pixels (spatial axes first, channels last) and which of them the file does not hold.

    `absent` is a boolean array over the spatial axes, or None when everything is there. Absent pixels and
    pixels beyond the image are filled; only the former count as absent.
    """

    pixels: NDArray[Any]
    absent: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class SourceRef:
    """How to open a source again, in any process: a path and plain options. Picklable."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Source(ABC):
    """Something with pixels. Thread-safe for reading; close it or use it as a context manager.

    Attributes
    ----------
    name
        What a person calls it: the file name, extension kept.
    axes
        Spatial axes first, then ``c`` if there are channels: ``("y", "x", "c")``.
    levels
        Finest first. `levels[0].downsample` is all ones.
    spacing
        Pixel size at level 0, or None if unknown (`spacing_error` then says why).
    bounds
        The scanned area in level-0 pixels (OpenSlide's bounds), the whole image if the file has none.
    frame
        Where a volume lies in the patient; None for slides and other flat images.
    warnings
        What a reader of the results should know of the file, one coded line each.
    """

    name: str
    axes: tuple[str, ...]
    levels: tuple[Level, ...]
    dtype: np.dtype[Any]
    channel_names: tuple[str, ...]
    spacing: Spacing | None
    spacing_error: str
    bounds: Region
    ref: SourceRef | None
    frame: Frame | None = None
    warnings: tuple[str, ...] = ()

    @property
    @final
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return len(self.axes) - ("c" in self.axes)

    @property
    @final
    def shape(self) -> tuple[int, ...]:
        """Return the spatial shape of level 0."""
        return self.levels[0].shape

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this input from another: name, size and a hash; plain JSON, no paths."""

    def stamp(self) -> dict[str, Any] | None:
        """Return size and times of the input's files; None where there is no file."""
        return None

    @abstractmethod
    def read_inside(self, region: Region, level: int) -> Reading:
        """Return a region that lies wholly inside level `level`, in that level's pixels.

        Raises SourceError (WSI111) if it cannot be decoded. Called from several threads at once.
        """

    def read_channels(self, region: Region, level: int, channels: Sequence[int]) -> Reading:
        """Return some channels of a region, in this order; an image without a channel axis has channel 0.

        Sources that store channels apart read no others.
        """
        reading = self.read_inside(region, level)
        pixels = reading.pixels if "c" in self.axes else reading.pixels[..., None]
        return Reading(np.ascontiguousarray(pixels[..., list(channels)]), reading.absent)

    @abstractmethod
    def close(self) -> None:
        """Release handles; reading afterwards is an error."""

    @final
    def read(self, region: Region, level: int = 0, *, fill: int = 255) -> NDArray[Any]:
        """Return `region` (in pixels of `level`) in the source's axes order; `fill` beyond the image."""
        frame = Region((0,) * self.ndim, self.levels[level].shape)
        inside = region.intersect(frame)
        if inside == region:
            return self.read_inside(region, level).pixels
        tail = (len(self.channel_names),) if "c" in self.axes else ()
        out = np.full(region.shape + tail, fill, self.dtype)
        if inside.size:
            out[inside.slices(region.start)] = self.read_inside(inside, level).pixels
        return out

    @final
    def as_zarr(self) -> zarr.Group:
        """Return the pyramid as a read-only zarr v3 group with NGFF 0.5 metadata, decoded on demand."""
        from wsitk.sources.zarr_view import as_zarr

        return as_zarr(self)

    @final
    def as_dask(
        self, *, level: int | None = None, spacing: float | tuple[float, ...] | None = None
    ) -> dask.array.Array:
        """Return a lazy view of one level, or of the image resampled to `spacing` micrometres."""
        from wsitk.sources.dask_view import as_dask

        return as_dask(self, level=level, spacing=spacing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
