"""What a TIFF states, judged before anything is decoded: which pages are levels, and whether they can be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Spacing
from wsitk.sources.files import MAX_TILE_BYTES, check_pixels
from wsitk.sources.ome_xml import parse_ome
from wsitk.sources.spacing import parse_number

__all__ = [
    "LOOKED_AT",
    "TiledPage",
    "check_chain",
    "check_segments",
    "page_of",
    "pages_of_pyramid",
    "stated_spacings",
]

LOOKED_AT = ("aperio.MPP", "OME PhysicalSizeX", "tiff.XResolution")

_CODECS = {1, 5, 7, 8, 32773, 32946, 33003, 33004, 33005, 34712, 34925, 34926, 50000, 50001}
_RESOLUTION_UNIT_UM = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True)
class TiledPage:
    """One page of tiles or strips: shape in pixels, tile shape, and where each lies in the file (C order).

    `raw` is the type of stored numbers that need no decoding; None where a codec gives them.
    """

    page: Any
    shape: tuple[int, int]
    tile: tuple[int, int]
    grid: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    jpeg_tables: bytes | None
    raw: np.dtype[Any] | None = None


def page_of(page: Any, name: str, parts: int = 1) -> TiledPage:
    """Return what a tifffile page states; raises SourceError for what cannot or must not be decoded.

    A strip is a tile as wide as the image; samples stored apart are `parts` images one after the other.
    WSI140 and WSI141 for sizes beyond the limits, WSI101 for the rest (another reader may know better).
    """
    shape = (int(page.imagelength), int(page.imagewidth))
    check_pixels(name, shape)
    if int(page.compression) not in _CODECS:
        raise SourceError("WSI101", f"{name}: TIFF compression {int(page.compression)} has no decoder here")
    tile = (int(page.tilelength), int(page.tilewidth))
    if not page.is_tiled:
        tile = (min(int(page.rowsperstrip), shape[0]), shape[1])
    if min(tile) < 1 or (page.is_tiled and int(page.tiledepth) != 1):
        raise SourceError("WSI101", f"{name}: tiles of {tile} pixels; the file is damaged")
    nbytes = math.prod(tile) * int(page.samplesperpixel) * page.dtype.itemsize
    if nbytes > MAX_TILE_BYTES:
        raise SourceError(
            "WSI141", f"{name}: a tile decodes to {nbytes} bytes, the limit is {MAX_TILE_BYTES}"
        )
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    offsets, counts = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
    if len(offsets) != math.prod(grid) * parts or len(counts) != len(offsets):
        raise SourceError(
            "WSI101", f"{name}: lists {len(offsets)} tiles where {math.prod(grid) * parts} belong"
        )
    return TiledPage(page, shape, tile, grid, offsets, counts, page.jpegtables)


def check_chain(file: Any, name: str) -> None:
    """Raise SourceError if the chain of page headers leads beyond the file's end (WSI102), or back (WSI115).

    tifffile takes the pages that are left, so that a slide cut short would only lose levels.
    """
    if file.is_ndpi:  # its offsets mean something else
        return
    handle, layout = file.filehandle, file.tiff
    seen: set[int] = set()
    handle.seek(layout.offsetsize if layout.is_bigtiff else 4)
    offset = _number(handle.read(layout.offsetsize), layout)
    while offset and offset not in seen:
        seen.add(offset)
        handle.seek(offset)
        count = _number(handle.read(layout.tagnosize), layout)
        handle.seek(offset + layout.tagnosize + count * layout.tagsize)
        following = handle.read(layout.offsetsize)
        if len(following) < layout.offsetsize:
            raise SourceError(
                "WSI102",
                f"{name}: the file ends at {handle.size:,} bytes, within page headers; copy it again",
            )
        offset = _number(following, layout)
    if offset:
        raise SourceError(
            "WSI115", f"{name}: its pages lead back to byte {offset}; the header is damaged, copy it again"
        )


def _number(data: bytes, layout: Any) -> int:
    """Return an unsigned number in the byte order of the file."""
    return int.from_bytes(data, "little" if layout.byteorder == "<" else "big")


def check_segments(page: Any, level: int, size: int, name: str) -> None:
    """Raise SourceError (WSI102) if a tile or strip lies beyond the file's `size` bytes."""
    offsets, counts = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
    ends = np.where(counts > 0, offsets + counts, 0) if len(counts) else np.zeros(1, np.int64)
    worst = int(ends.argmax())
    if ends[worst] > size:
        place = f"strip {worst}"
        if page.is_tiled:
            row, column = divmod(worst, -(-int(page.imagewidth) // int(page.tilewidth)))
            place = f"tile ({row},{column})"
        raise SourceError(
            "WSI102",
            f"{name}: the file ends at {size:,} bytes but {place} of level {level} needs "
            f"{int(ends[worst]):,}; copy it again",
        )


def pages_of_pyramid(pages: Sequence[Any], aperio: bool) -> list[Any]:
    """Return full resolution first, then the pages that may be its reductions.

    SubIFDs of the first page (OME) go before later pages. Of these, tiled ones count that are marked as
    reduced or that an Aperio file holds; a later page as large as the first is another plane, not a level.
    """
    first = pages[0]
    found = [first]
    for page in first.pages if first.subifds else pages[1:]:
        # Bit 0 of NewSubfileType means reduced, bit 2 a mask. Aperio's label and macro are never tiled.
        kind = int(page.subfiletype)
        reduced = aperio or bool(kind & 1) or page.imagewidth < first.imagewidth
        alike = page.dtype == first.dtype and page.samplesperpixel == first.samplesperpixel
        if page.is_tiled and reduced and alike and not kind & 4:
            found.append(page)
    return found


def stated_spacings(page: Any, aperio: bool, ome_xml: str | None) -> list[Spacing]:
    """Return what the file states of its pixel size, the most trusted field first."""
    found: list[Spacing] = []
    description = str(page.description or "")
    if aperio:
        match = re.search(r"\|\s*MPP\s*=\s*([^|]*)", description)
        if match:
            value = parse_number(match.group(1))
            found.append(Spacing((value, value), "aperio.MPP"))
    if ome_xml:
        found += _ome_spacing(ome_xml)
    return found + _resolution_tag(page)


def _ome_spacing(xml: str) -> list[Spacing]:
    """Return the pixel size of the first image of an OME document."""
    document = parse_ome(xml)
    first = document.images[0].spacing if document and document.images else None
    return [first] if first else []


def _resolution_tag(page: Any) -> list[Spacing]:
    """Return the pixel size of XResolution and YResolution; a zero or no unit states nothing."""
    tags = page.tags
    unit = _RESOLUTION_UNIT_UM.get(int(tags.valueof(296, default=2) or 0))
    if unit is None or 282 not in tags or 283 not in tags:
        return []
    values = []
    for code in (283, 282):
        number, denominator = tags.valueof(code)
        if not number or not denominator:
            return []
        values.append(unit * denominator / number)
    return [Spacing(tuple(values), "tiff.XResolution")]
