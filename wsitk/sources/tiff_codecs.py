"""One stored tile to pixels. Codecs report less damage than they see, so streams are judged first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.sources.jpeg_check import jpeg_fault
from wsitk.sources.tiff_pages import TiledPage

__all__ = ["decode_tile"]

_JPEG = 7
_JPEG2000 = (33003, 33004, 33005, 34712)
_WEBP = 50001


def decode_tile(page: TiledPage, data: bytes, index: int) -> NDArray[Any]:
    """Return one tile (height, width, samples); tiles at the border may be stored smaller.

    Raises ValueError, or what the codec raises, if the data are damaged, cut short or larger than a tile.
    """
    expected = int(page.counts[index])
    if len(data) != expected:
        raise ValueError(f"{len(data)} of {expected} bytes, the file was cut after it was opened")
    if page.raw is not None:
        return np.frombuffer(data, page.raw).reshape(-1, page.tile[1], int(page.page.samplesperpixel))
    fault = _fault(page, data)
    if fault:
        raise ValueError(fault)
    segment, _, _ = page.page.decode(data, index, jpegtables=page.jpeg_tables)
    pixels = np.asarray(segment[0])
    pixels.setflags(write=False)  # it will be shared through the cache
    return pixels


def _fault(page: TiledPage, data: bytes) -> str:
    """Return what is wrong with the stored bytes as far as their codec would not say."""
    compression = int(page.page.compression)
    if compression == _JPEG:
        return jpeg_fault(data, page.jpeg_tables, page.tile)
    if compression in _JPEG2000:
        return _jpeg2000_fault(data, page.tile)
    if compression == _WEBP:
        return _webp_fault(data, page.tile)
    return ""


def _jpeg2000_fault(data: bytes, tile: tuple[int, int]) -> str:
    """Look for the end of the codestream (T.800, A.4.4), which OpenJPEG does not miss, and its size."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        return "no JPEG 2000 codestream"
    right, bottom, left, top = (int.from_bytes(data[at + k : at + k + 4], "big") for k in (8, 12, 16, 20))
    if bottom - top > tile[0] or right - left > tile[1]:
        return "JPEG 2000 image larger than its tile"
    if data.rstrip(b"\0")[-2:] != b"\xff\xd9":
        return "JPEG 2000 codestream without its end"
    return ""


def _webp_fault(data: bytes, tile: tuple[int, int]) -> str:
    """Compare the canvas of a WebP header with the tile, before memory is taken for it."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (int.from_bytes(data[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(data[k : k + 3], "little") + 1 for k in (24, 27))
    else:
        return "not a WebP image"
    return "WebP image larger than its tile" if height > tile[0] or width > tile[1] else ""
