"""Plain images, read whole: PNG, JPEG, JPEG 2000, and TIFF without tiles."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region, Spacing
from wsitk.sources.array import default_channels
from wsitk.sources.base import Level, Reading, Source, SourceRef
from wsitk.sources.files import (
    MAX_WHOLE_BYTES,
    closed,
    file_identity,
    file_stamp,
    over_white,
    probe,
    reference,
    reopen,
)
from wsitk.sources.jpeg_check import jpeg_fault
from wsitk.sources.spacing import explicit, judge

__all__ = ["ImageSource"]

_CHUNK = 512


@final
class ImageSource(Source):
    """An image small enough to hold in memory; one level, as many channels as the file has.

    Grey stays one channel, a palette becomes colour, alpha is composited on white; 16-bit data stay 16-bit.
    The orientation that a camera notes in EXIF is not applied. Raises SourceError: WSI100, WSI101, WSI130
    (colours that have no one meaning in RGB), WSI141 (more than 512 MiB once decoded).
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        head = probe(self._path, self.name)
        pixels, stated, looked_at = _decode(self._path, self.name, head)
        colour, self._absent = _as_colour(pixels, self.name)
        self._pixels: NDArray[Any] | None = colour
        shape = (int(colour.shape[0]), int(colour.shape[1]))
        self.axes = ("y", "x", "c")
        self.levels = (Level(shape, (1.0, 1.0), (min(_CHUNK, shape[0]), min(_CHUNK, shape[1]))),)
        self.dtype = colour.dtype
        self.channel_names = default_channels(int(colour.shape[2]))
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 2) + stated, looked_at)
        self.bounds = Region((0, 0), shape)
        self.ref: SourceRef = reference(self._path, "image", mpp, name)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return a copy of the region."""
        if self._pixels is None:
            raise closed(self.name)
        where = region.slices()
        absent = self._absent[where] if self._absent is not None else None
        return Reading(self._pixels[where].copy(), absent if absent is not None and absent.any() else None)

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a sampled sha256 of the file."""
        return file_identity(self.name, [self._path])

    def stamp(self) -> dict[str, Any]:
        """Return the file's size and time."""
        return file_stamp(self.name, [self._path])

    def close(self) -> None:
        """Free the pixels."""
        self._pixels = None


def _decode(path: str, name: str, head: bytes) -> tuple[NDArray[Any], list[Spacing], Sequence[str]]:
    """Return pixels, the pixel size the file states, and the fields it was looked for in."""
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        from wsitk.sources.tiff import read_plain_tiff

        return read_plain_tiff(path, name)
    kind = _kind(head)
    if not kind:
        raise SourceError("WSI101", f"{name}: not a PNG, JPEG, JPEG 2000 or TIFF image")
    import imagecodecs

    decode: dict[str, Any] = {
        "png": imagecodecs.png_decode,
        "jpeg": imagecodecs.jpeg8_decode,
        "jp2": imagecodecs.jpeg2k_decode,
    }
    try:
        data = Path(path).read_bytes()
        shape, stated = _header(kind, data)
        check_whole(name, prod(shape))
        _check_stream(kind, data, shape, name)
        pixels = np.asarray(decode[kind](data))
    except SourceError:
        raise
    except OSError as error:
        raise SourceError("WSI100", f"{name}: {error.strerror or error}") from error
    except Exception as error:  # imagecodecs has an exception type per codec
        raise SourceError("WSI101", f"{name}: {kind} decoder: {error}") from error
    return pixels, stated, {"png": ("png.pHYs",), "jpeg": ("jfif.density",), "jp2": ()}[kind]


def _check_stream(kind: str, data: bytes, shape: tuple[int, ...], name: str) -> None:
    """Raise SourceError for damage that the codec would hide (WSI102), or CMYK (WSI130)."""
    if kind == "jpeg":
        if shape[2] == 4:
            raise SourceError("WSI130", f"{name}: a JPEG of four inks (CMYK); convert it to RGB")
        fault = jpeg_fault(data, None, (shape[0], shape[1]))
        if fault:
            raise SourceError("WSI102", f"{name}: {fault}; copy it again")
    if kind == "jp2" and b"\xff\xd9" not in data[-64:]:
        raise SourceError("WSI102", f"{name}: JPEG 2000 codestream without its end; copy it again")


def check_whole(name: str, nbytes: int) -> None:
    """Raise SourceError (WSI141) if an image is too large to be held whole."""
    if nbytes > MAX_WHOLE_BYTES:
        raise SourceError(
            "WSI141",
            f"{name}: decodes to {nbytes / 2**20:.0f} MiB in one piece, limit {MAX_WHOLE_BYTES >> 20}; "
            "save it as a tiled TIFF, e.g. vips tiffsave IN OUT --tile --pyramid",
        )


def _kind(head: bytes) -> str:
    """Return the format by its first bytes, empty if it is none of ours."""
    signatures = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"\xff\x4f\xff\x51": "jp2"}
    signatures[b"\0\0\0\x0cjP  \r\n\x87\n"] = "jp2"
    return next((kind for start, kind in signatures.items() if head.startswith(start)), "")


def _header(kind: str, data: bytes) -> tuple[tuple[int, ...], list[Spacing]]:
    """Return (height, width, bytes per pixel) and the stated pixel size, from the header alone."""
    return {"png": _png_header, "jpeg": _jpeg_header, "jp2": _jp2_header}[kind](data)


def _png_header(data: bytes) -> tuple[tuple[int, ...], list[Spacing]]:
    """Read IHDR, and pHYs where its unit is the metre."""
    width, height, depth = struct.unpack(">IIB", data[16:25])
    stated: list[Spacing] = []
    at = data.find(b"pHYs", 25, data.find(b"IDAT"))
    if at > 0:
        x, y, unit = struct.unpack(">IIB", data[at + 4 : at + 13])
        if unit == 1 and x and y:
            stated = [Spacing((1e6 / y, 1e6 / x), "png.pHYs")]
    return (height, width, 4 * max(1, depth // 8)), stated


def _jpeg_header(data: bytes) -> tuple[tuple[int, ...], list[Spacing]]:
    """Walk the markers up to the frame header; read the JFIF density where it has a unit."""
    stated: list[Spacing] = []
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            raise ValueError(f"no marker at byte {at}")
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding before a marker
            at += 1
            continue
        if marker == 0xE0 and data[at + 4 : at + 9] == b"JFIF\0":
            unit, x, y = struct.unpack(">BHH", data[at + 11 : at + 16])
            if unit in (1, 2) and x and y:
                inch = (25_400.0, 10_000.0)[unit - 1]
                stated = [Spacing((inch / y, inch / x), "jfif.density")]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, count = struct.unpack(">HHB", data[at + 5 : at + 10])
            return (height, width, count), stated
        at += 2 + length
    raise ValueError("no frame header")


def _jp2_header(data: bytes) -> tuple[tuple[int, ...], list[Spacing]]:
    """Read the SIZ marker of the codestream."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise ValueError("no codestream")
    right, bottom, left, top = struct.unpack(">IIII", data[at + 8 : at + 24])
    (count,) = struct.unpack(">H", data[at + 40 : at + 42])
    return (bottom - top, right - left, 2 * count), []


def _as_colour(pixels: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return (y, x, c) with one or three channels, and where alpha is zero."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] > 4 or pixels.dtype.kind not in "uf":
        raise SourceError(
            "WSI130", f"{name}: shape {pixels.shape} of {pixels.dtype} is not a grey or RGB image"
        )
    if pixels.shape[2] in (2, 4):
        return over_white(pixels)
    return np.ascontiguousarray(pixels), None
