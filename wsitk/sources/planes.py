"""Fluorescence TIFFs: any number of channels, as pages or interleaved, in tiles or strips; the wells of plates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import product
from pathlib import PurePosixPath
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.files import (
    consistent_levels,
    file_identity,
    file_stamp,
    make_levels,
    probe,
    reference,
    reopen,
)
from wsitk.sources.plane_pages import Found, Plane, find_planes
from wsitk.sources.plate import split_path
from wsitk.sources.spacing import explicit, judge
from wsitk.sources.tiff_store import CACHE_BYTES, TileStore

__all__ = ["PlanesSource"]

LOOKED_AT = ("OME PhysicalSizeX", "imagej.unit", "tiff.XResolution")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HASHED_BYTES = 64 << 20


@final
class PlanesSource(Source):
    """An image of a TIFF as channels: what OME-XML, ImageJ or the pages themselves say they are.

    `path` may name one image of many, ``plate.ome.tiff#A01``. Channels without a name are called c0, c1 and
    so on. Pixels are as stored, of 8, 16 or 32 bits; tiles that the file does not hold are 0 and `absent`.
    `stacked` says that pages of one size which the file does not explain are channels.

    Raises SourceError on opening: WSI100, WSI101 (grey, colour or unexplained pages: another reader's),
    WSI102 (cut short), WSI130 (a stack along z or t, or values that are no intensities), WSI140, WSI141,
    WSI170 (many images and none named), WSI172, WSI173 (planes or wells that contradict each other);
    UsageError WSI084 for an image that is not there.
    """

    def __init__(
        self,
        path: str,
        *,
        mpp: float | Sequence[float] | None = None,
        name: str | None = None,
        stacked: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._path, self._key = split_path(str(path))
        whole = PurePosixPath(self._path).name
        self.name = name or (f"{whole}/{self._key}" if self._key else whole)
        if probe(self._path, self.name)[:4] not in _TIFF:
            raise SourceError("WSI101", f"{self.name}: not a TIFF")
        found = find_planes(self._path, self.name, self._key, stacked)
        self._whole_file = found.whole_file
        self._planes = _kept(self.name, found)
        pages = [level[0].page for level in self._planes]
        self.levels = make_levels([(p.shape, p.tile) for p in pages])
        self.axes = ("y", "x", "c")
        self.dtype = np.dtype(pages[0].page.dtype)
        self.channel_names = found.channel_names
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 2) + found.stated, LOOKED_AT)
        self.bounds = Region((0, 0), self.levels[0].shape)
        self.ref: SourceRef = reference(str(path), "planes", mpp, name)
        self._store = TileStore(self._path, self.name, cache_bytes)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return pixels (h, w, c) assembled from decoded tiles, and where any channel has none."""
        return self.read_channels(region, level, range(len(self.channel_names)))

    def read_channels(self, region: Region, level: int, channels: Sequence[int]) -> Reading:
        """Return some channels of a region; no others are read."""
        planes = [self._planes[level][k] for k in channels]
        out = np.zeros((*region.shape, len(planes)), self.dtype)
        missing: NDArray[np.bool_] | None = None
        tile_shape = planes[0].page.tile  # that of all: see `_kept`
        spans = zip(region.start, region.stop, tile_shape, strict=True)
        for row, column in product(*(range(a // t, -(-b // t)) for a, b, t in spans)):
            tile = Region((row * tile_shape[0], column * tile_shape[1]), tile_shape)
            common = tile.intersect(region)
            where = common.slices(region.start)
            for channel, plane in enumerate(planes):
                pixels = self._tile(plane, level, row, column)
                if pixels is None:
                    missing = np.zeros(region.shape, np.bool_) if missing is None else missing
                    missing[where] = True
                else:
                    out[where][..., channel] = pixels[common.slices(tile.start)][..., plane.sample]
        if planes[0].inverted:
            out = np.invert(out)
        return Reading(out, missing)

    def _tile(self, plane: Plane, level: int, row: int, column: int) -> NDArray[Any] | None:
        """Return one decoded tile with all samples that are stored in it."""
        index = plane.first + row * plane.page.grid[1] + column
        return self._store.get(plane.page, plane.key, index, f"level {level} tile ({row},{column})")

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a hash: of the file, or of this image's own planes where it holds many."""
        if self._whole_file:
            return file_identity(self.name, [self._path])
        name = PurePosixPath(self.name).name
        size = sum(int(p.counts[i]) for p, i in self._segments())
        return {"name": name, "image": self._key, "size": size, "sha256_planes": self._digest(size)}

    def _segments(self) -> list[tuple[Any, int]]:
        """Return (page, index) of every tile or strip of level 0, each once."""
        pages = {(p.key, p.first): p for p in self._planes[0]}.values()
        return [(p.page, p.first + k) for p in pages for k in range(math.prod(p.page.grid))]

    def _digest(self, size: int) -> str:
        """Hash the layout, every length, and the stored bytes: all of them, or of 64 MiB evenly spread tiles."""
        segments = self._segments()
        step = max(1, -(-size // _HASHED_BYTES))
        layout = [self.levels[0].shape, self.levels[0].chunk, self.dtype.str, self.channel_names]
        digest = hashlib.sha256(repr(layout).encode())
        digest.update(np.array([p.counts[i] for p, i in segments], np.int64).tobytes())
        for page, index in segments[::step]:
            if page.offsets[index] > 0:
                digest.update(self._store.stored(page, index))
        return digest.hexdigest()

    def stamp(self) -> dict[str, Any]:
        """Return size and time of change of the file."""
        return file_stamp(self.name, [self._path])

    def close(self) -> None:
        """Close the file and forget decoded tiles."""
        self._store.close()


def _kept(name: str, found: Found) -> tuple[tuple[Plane, ...], ...]:
    """Return the planes of each level that is a true reduction; all planes of a level have one layout."""
    for level in found.levels:
        if len({(p.page.shape, p.page.tile, p.page.page.dtype) for p in level}) > 1:
            raise SourceError(
                "WSI173", f"{name}: its channels differ in size, tiles or type; write the file again"
            )
    firsts = [level[0].page for level in found.levels]
    return tuple(found.levels[i] for i in consistent_levels(name, [(p.shape, p.tile) for p in firsts]))
