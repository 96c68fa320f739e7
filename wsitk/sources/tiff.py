"""Tiled TIFF, OME-TIFF and SVS of one grey or colour image, decoded directly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region, Spacing
from wsitk.sources.array import default_channels
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.files import (
    consistent_levels,
    file_identity,
    file_stamp,
    make_levels,
    over_white,
    probe,
    reference,
    reopen,
)
from wsitk.sources.spacing import explicit, judge
from wsitk.sources.tiff_pages import (
    LOOKED_AT,
    TiledPage,
    check_chain,
    check_segments,
    page_of,
    pages_of_pyramid,
    stated_spacings,
)
from wsitk.sources.tiff_store import CACHE_BYTES, TileStore

__all__ = ["TiffSource", "read_plain_tiff"]

_DIRECT_VENDORS = ("aperio", "generic-tiff", "")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@final
class TiffSource(Source):
    """A pyramid of tiled pages. Grey stays one channel and 16 bits stay 16; alpha is composited on white.

    Tiles that the file does not hold (offset or length zero) are white and `absent`. Raises SourceError on
    opening: WSI100, WSI101 (not ours: another reader may take it), WSI102 (cut short), WSI130 (colours or
    planes without one meaning in RGB), WSI140, WSI141 (sizes beyond the limits).
    """

    def __init__(
        self,
        path: str,
        *,
        mpp: float | Sequence[float] | None = None,
        name: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        if probe(self._path, self.name)[:4] not in _TIFF:
            raise SourceError("WSI101", f"{self.name}: not a TIFF")
        pages, stated = self._parse()
        kept = consistent_levels(self.name, [(p.shape, p.tile) for p in pages])
        self._pages = tuple(pages[i] for i in kept)
        self.levels = make_levels([(p.shape, p.tile) for p in self._pages])
        samples = int(pages[0].page.samplesperpixel)
        self._alpha = samples in (2, 4)
        self.axes = ("y", "x", "c")
        self.dtype = np.dtype(pages[0].page.dtype)
        self.channel_names = default_channels(samples - self._alpha)
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 2) + stated, LOOKED_AT)
        self.bounds = Region((0, 0), self.levels[0].shape)
        self.ref: SourceRef = reference(self._path, "tiff", mpp, name)
        self._store = TileStore(self._path, self.name, cache_bytes)
        self._cache = self._store.cache

    def _parse(self) -> tuple[list[TiledPage], list[Spacing]]:
        """Return the pages that may be levels, and the stated pixel sizes."""
        import tifffile

        try:
            with tifffile.TiffFile(self._path) as file:
                check_chain(file, self.name)
                first = file.pages.first
                aperio = str(first.description or "").startswith("Aperio")
                _check_kind(first, self.name)
                pages = [page_of(p, self.name) for p in pages_of_pyramid(list(file.pages), aperio)]
                # Only now that no size is absurd: OpenSlide takes the memory that a header claims.
                _leave_to_openslide(self._path, self.name)
                _check_planes(first, file, self.name)
                for level, page in enumerate(pages):
                    check_segments(page.page, level, file.filehandle.size, self.name)
                _ = [p.page.decode for p in pages]  # builds the decoders while the file is open
                return pages, stated_spacings(first, aperio, file.ome_metadata if file.is_ome else None)
        except SourceError:
            raise
        except Exception as error:  # a damaged header gives any of twenty types
            raise SourceError("WSI101", f"{self.name}: TIFF: {type(error).__name__}: {error}") from error

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return pixels (h, w, c) assembled from decoded tiles, and where the file holds none."""
        page = self._pages[level]
        out = np.empty((*region.shape, self._samples), self.dtype)
        missing: NDArray[np.bool_] | None = None
        spans = zip(region.start, region.stop, page.tile, strict=True)
        for row, column in product(*(range(a // t, -(-b // t)) for a, b, t in spans)):
            place = (row, column)
            tile = Region((place[0] * page.tile[0], place[1] * page.tile[1]), page.tile)
            common = tile.intersect(region)
            where = common.slices(region.start)
            pixels = self._tile(page, level, place)
            if pixels is None:
                missing = np.zeros(region.shape, np.bool_) if missing is None else missing
                missing[where] = True
                out[where] = np.iinfo(self.dtype).max if self.dtype.kind == "u" else 0
            else:
                out[where] = pixels[common.slices(tile.start)]
        if not self._alpha:
            return Reading(out, missing)
        colour, clear = over_white(out)
        if missing is not None:
            clear = missing if clear is None else clear | missing
        return Reading(colour, clear)

    @property
    def _samples(self) -> int:
        """Return the number of stored samples per pixel."""
        return len(self.channel_names) + self._alpha

    def _tile(self, page: TiledPage, level: int, place: tuple[int, int]) -> NDArray[Any] | None:
        """Return one decoded tile, None where the file holds none."""
        words = f"level {level} tile ({place[0]},{place[1]})"
        return self._store.get(page, level, place[0] * page.grid[1] + place[1], words)

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size, and sha256 of samples and of all headers of the file."""
        return file_identity(self.name, [self._path])

    def stamp(self) -> dict[str, Any]:
        """Return size and time of change of the file."""
        return file_stamp(self.name, [self._path])

    def close(self) -> None:
        """Close the file and forget decoded tiles."""
        self._store.close()


def _leave_to_openslide(path: str, name: str) -> None:
    """Raise SourceError (WSI101) for vendors whose tiles overlap or hide: OpenSlide knows their rules."""
    import openslide

    vendor = openslide.OpenSlide.detect_format(path) or ""
    if vendor not in _DIRECT_VENDORS:
        raise SourceError("WSI101", f"{name}: {vendor} is left to OpenSlide")


def _check_kind(first: Any, name: str) -> None:
    """Raise SourceError (WSI101) unless the first page is tiled, and interleaved grey or RGB."""
    if not first.is_tiled:
        raise SourceError("WSI101", f"{name}: its first page has no tiles")
    photometric, samples = int(first.photometric), int(first.samplesperpixel)
    colour = (photometric in (2, 6) and samples in (3, 4)) or (photometric == 1 and samples in (1, 2))
    depth = first.dtype is not None and (
        first.dtype.kind == "u" or (first.dtype.kind == "f" and samples in (1, 3))
    )
    if not colour or not depth or int(first.planarconfig) != 1:
        text = (
            f"{samples} samples of {first.dtype}, photometric {photometric}, planar {int(first.planarconfig)}"
        )
        raise SourceError("WSI101", f"{name}: {text}: not interleaved grey or RGB")


def _check_planes(first: Any, file: Any, name: str) -> None:
    """Raise SourceError (WSI130) if several pages are as large as the first: a stack, or channels."""
    planes = sum(1 for p in file.pages if p.is_tiled and p.shape == first.shape)
    if planes > 1:
        raise SourceError(
            "WSI130",
            f"{name}: {planes} planes of one size: name some as --channels 0,1 if that is what they are",
        )


def read_plain_tiff(path: str, name: str) -> tuple[NDArray[Any], list[Spacing], Sequence[str]]:
    """Return the only page of a TIFF whole (y, x, c), its stated pixel size, and where that was looked for.

    Raises SourceError: WSI130 for a stack or colours other than grey, RGB and palette; WSI141 if too large.
    """
    import tifffile

    from wsitk.sources.image import check_whole

    try:
        with tifffile.TiffFile(path) as file:
            check_chain(file, name)
            first = file.pages.first
            if sum(1 for p in file.pages if p.shape == first.shape) > 1:
                raise SourceError(
                    "WSI130",
                    f"{name}: several planes of one size: name some as --channels 0,1 if that is what they are",
                )
            check_whole(name, int(first.size) * first.dtype.itemsize)
            check_segments(first, 0, file.filehandle.size, name)
            stated = stated_spacings(first, False, file.ome_metadata if file.is_ome else None)
            return _meaning(np.asarray(first.asarray()), first, name), stated, LOOKED_AT
    except SourceError:
        raise
    except Exception as error:  # a damaged header gives any of twenty types
        raise SourceError("WSI101", f"{name}: TIFF: {type(error).__name__}: {error}") from error


def _meaning(pixels: NDArray[Any], page: Any, name: str) -> NDArray[Any]:
    """Return stored numbers as grey or colour (y, x, c), by the page's photometric interpretation."""
    photometric = int(page.photometric)
    if photometric == 3 and page.colormap is not None:
        table = np.asarray(page.colormap).T
        if table.max() > 255:  # entries are 16-bit by definition; some writers fill 8 bits only
            table = table >> 8
        return np.asarray(table.astype(np.uint8)[pixels])
    if photometric not in (0, 1, 2, 6):
        raise SourceError(
            "WSI130", f"{name}: photometric interpretation {photometric} is neither grey nor RGB"
        )
    if int(page.planarconfig) == 2 and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if photometric == 0:
        pixels = np.invert(pixels)
    return pixels
