"""Slides that OpenSlide reads: a pool of handles, none of which outlives an error.

An OpenSlide handle that has failed once fails for ever (its errors are sticky), so it is closed and a new
one opened. Handles are not shared between threads at the same time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region, Spacing
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.files import (
    check_pixels,
    closed,
    consistent_levels,
    file_identity,
    file_stamp,
    make_levels,
    over_white,
    probe,
    reference,
    reopen,
)
from wsitk.sources.spacing import explicit, judge, parse_number

__all__ = ["OpenSlideSource"]

_CACHE_BYTES = 64 << 20
_CELL = 1024


@final
class OpenSlideSource(Source):
    """A slide read through OpenSlide 4; RGB on white, `absent` where the file holds nothing.

    Raises SourceError on opening: WSI100 (the system refuses), WSI101 (OpenSlide refuses), WSI140 (too
    many pixels).
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._closed = False
        self._cells: OrderedDict[tuple[int, ...], NDArray[np.uint8]] = OrderedDict()
        handle = self._open()
        try:
            properties = dict(handle.properties)
            found = _levels_of(handle, properties)
            native = tuple(float(d) for d in handle.level_downsamples)
        except Exception as error:
            raise SourceError("WSI101", f"{self.name}: OpenSlide: {error}") from error
        check_pixels(self.name, found[0][0])
        self._native_level = consistent_levels(self.name, found)
        self._native_downsample = native
        self.levels = make_levels([found[i] for i in self._native_level])
        self.axes = ("y", "x", "c")
        self.dtype = np.dtype(np.uint8)
        self.channel_names = ("red", "green", "blue")
        self.bounds = _bounds_of(properties, self.levels[0].shape)
        stated = explicit(mpp, 2) + _stated(properties)
        looked_at = ("openslide.mpp-x", "openslide.mpp-y")
        self.spacing, self.spacing_error = judge(self.name, stated, looked_at)
        self.vendor = str(properties.get("openslide.vendor", ""))
        self._series = str(properties.get("dicom.SeriesInstanceUID", ""))
        self.ref: SourceRef = reference(self._path, "openslide", mpp, name)
        self._give_back(handle)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return RGB (h, w, 3) uint8 and the pixels whose alpha is zero; retries once with a new handle."""
        native = self._native_downsample[self._native_level[level]]
        # OpenSlide takes level-0 coordinates: where a level's downsample is not whole, a window's pixels
        # shift by a fraction that depends on the window. Fixed cells make them depend on the place only.
        rgba = self._read(region, level) if native.is_integer() else self._read_cells(region, level)
        return Reading(*over_white(rgba))

    def _read_cells(self, region: Region, level: int) -> NDArray[np.uint8]:
        """Return a region assembled from aligned cells, the last few of which are kept."""
        out = np.empty((*region.shape, 4), np.uint8)
        spans = [range(a // _CELL, -(-b // _CELL)) for a, b in zip(region.start, region.stop, strict=True)]
        frame = Region((0, 0), self.levels[level].shape)
        for y, x in product(*spans):
            cell = Region((y * _CELL, x * _CELL), (_CELL, _CELL)).intersect(frame)
            common = cell.intersect(region)
            pixels = self._cell(cell, level, (level, y, x))
            out[common.slices(region.start)] = pixels[common.slices(cell.start)]
        return out

    def _cell(self, cell: Region, level: int, key: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return one cell from the cache, or read it."""
        with self._lock:
            if key in self._cells:
                self._cells.move_to_end(key)
                return self._cells[key]
        pixels = self._read(cell, level)
        with self._lock:
            self._cells[key] = pixels
            while len(self._cells) * _CELL * _CELL * 4 > _CACHE_BYTES:
                self._cells.popitem(last=False)
        return pixels

    def _read(self, region: Region, level: int) -> NDArray[np.uint8]:
        """Return straight RGBA of a region, trying a second handle where the first one fails."""
        number = self._native_level[level]
        scale = self._native_downsample[number]
        (y, x), (height, width) = region.start, region.shape
        if region.size == 0:
            return np.empty((height, width, 4), np.uint8)
        corner = (round(x * scale), round(y * scale))
        reason: Exception | None = None
        for _ in range(2):
            handle = self._take()
            try:
                pixels = np.asarray(handle.read_region(corner, number, (width, height)))
            except Exception as error:  # OpenSlideError, MemoryError of ctypes, Pillow's ValueError
                reason = error
                handle.close()
            else:
                self._give_back(handle)
                return pixels
        place = f"level {level}, rows {y} to {y + height}, columns {x} to {x + width}"
        raise SourceError("WSI111", f"{self.name}: {place} cannot be decoded: {reason}") from reason

    def _open(self) -> Any:
        """Return a new handle; raises SourceError (WSI101) in OpenSlide's words."""
        import openslide

        probe(self._path, self.name)  # OpenSlide calls a stale handle an unsupported file
        try:
            handle = openslide.OpenSlide(self._path)
            handle.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        except Exception as error:
            raise SourceError("WSI101", f"{self.name}: OpenSlide: {error}") from error
        return handle

    def _take(self) -> Any:
        """Return an idle handle or a new one."""
        with self._lock:
            if self._closed:
                raise closed(self.name)
            if self._idle:
                return self._idle.pop()
        return self._open()

    def _give_back(self, handle: Any) -> None:
        """Keep a healthy handle for the next read."""
        with self._lock:
            if not self._closed:
                self._idle.append(handle)
                return
        handle.close()

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a sampled sha256 over every file that the slide consists of."""
        from wsitk.sources.discover import companions

        return file_identity(self.name, companions(Path(self._path)))

    def stamp(self) -> dict[str, Any]:
        """Return size and times of those files."""
        from wsitk.sources.discover import companions

        return file_stamp(self.name, companions(Path(self._path)))

    def close(self) -> None:
        """Close the idle handles; one that is being read from closes when its read ends."""
        with self._lock:
            self._closed = True
            handles, self._idle = self._idle, []
            self._cells.clear()
        for handle in handles:
            handle.close()


def _levels_of(handle: Any, properties: dict[str, str]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (shape, chunk) of each level as OpenSlide states them, in array order."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for index, (width, height) in enumerate(handle.level_dimensions):
        prefix = f"openslide.level[{index}].tile-"
        chunk = tuple(int(properties.get(prefix + side, 256)) for side in ("height", "width"))
        found.append(((int(height), int(width)), chunk))
    return found


def _bounds_of(properties: dict[str, str], shape: tuple[int, ...]) -> Region:
    """Return the scanned area, the whole image where the file states none or nonsense."""
    frame = Region((0, 0), shape)
    keys = [f"openslide.bounds-{k}" for k in ("y", "x", "height", "width")]
    try:
        y, x, height, width = (int(properties[k]) for k in keys)
        inside = Region((y, x), (height, width)).intersect(frame)
    except (KeyError, ValueError):
        return frame
    return inside if inside.size else frame


def _stated(properties: dict[str, str]) -> list[Spacing]:
    """Return the pixel size that OpenSlide took from the vendor's fields, if it found one."""
    values = [properties.get(f"openslide.mpp-{axis}") for axis in ("y", "x")]
    if values[0] is None and values[1] is None:
        return []
    both = tuple(parse_number(v) for v in values if v is not None)
    return [Spacing(both * (3 - len(both)), "openslide.mpp-x")]
