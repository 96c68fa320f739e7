"""NRRD: attached or detached, raw or gzipped, placed by its space directions.

A detached header may name a file beside itself and nothing else: a header is data, and data choose no paths.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.frame import Frame
from wsitk.geometry import Region, Spacing
from wsitk.sources.array import default_channels
from wsitk.sources.base import Level, Reading, Source, SourceRef
from wsitk.sources.files import check_pixels, file_identity, file_stamp, probe, reference, reopen
from wsitk.sources.nifti import import_reader, volume_chunk
from wsitk.sources.raw_volume import RawVoxels, check_length, inflate
from wsitk.sources.spacing import explicit, judge

__all__ = ["NrrdSource", "data_file"]

_HEAD_BYTES = 1 << 20
_TO_LPS = {  # signs of world x, y, z; ITK takes a space without a name as LPS, and so do we
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_UNITS_MM = {"mm": 1.0, "millimeter": 1.0, "um": 1e-3, "µm": 1e-3, "microns": 1e-3, "cm": 10.0, "m": 1000.0}
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"), "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"), "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",), "f8": ("double",),
}  # fmt: skip
_DTYPES = {word: np.dtype(code) for code, words in _TYPES.items() for word in words}


@final
class NrrdSource(Source):
    """An NRRD file as axes (z, y, x), with ``c`` last where a fourth axis has no place in space.

    Integers and single precision keep their type, double precision becomes single. Without space directions
    the axes are taken as x, y, z of the patient, `spacings` apart. Raises SourceError: WSI100, WSI101 (not
    NRRD), WSI102, WSI115, WSI116, WSI118, WSI119, WSI121 (data outside its folder), WSI140, WSI141.
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        header, behind = _header(self._path, self.name)
        stored, interleaved = _layout(self.name, header)
        dtype = _dtype(self.name, header)
        self.dtype = np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")
        shape = stored[:3] if interleaved else stored[-3:]
        count = 0 if len(stored) == 3 else stored[-1] if interleaved else stored[0]
        self.axes = ("z", "y", "x", "c") if count else ("z", "y", "x")
        self.levels = (Level(shape, (1.0, 1.0, 1.0), volume_chunk(shape)),)
        self.channel_names = default_channels(count)
        self.frame, said = _place(self.name, header)
        stated = [Spacing(self.frame.spacing_um, said)]
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 3) + stated, (), 3)
        self.bounds = Region((0, 0, 0), shape)
        self.ref: SourceRef = reference(self._path, "nrrd", mpp, name)
        detached = _detached(self._path, self.name, header)
        self._files = [self._path, detached] if detached else [self._path]
        file, offset = _open_voxels(self.name, header, detached or self._path, behind, stored, dtype)
        self._voxels = RawVoxels(self.name, file, offset, stored, dtype, interleaved=interleaved)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the region."""
        return Reading(self._voxels.read(region).astype(self.dtype, copy=False))

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a sampled sha256 of header and data."""
        return file_identity(self.name, self._files)

    def stamp(self) -> dict[str, Any]:
        """Return size and time of change of header and data."""
        return file_stamp(self.name, self._files)

    def close(self) -> None:
        """Close the file, and remove its unpacked copy."""
        self._voxels.close()


def data_file(path: str | os.PathLike[str]) -> str | None:
    """Return the file beside a detached header that holds its voxels; None if there is none, or no header."""
    name = os.path.basename(path)
    try:
        header, _ = _header(os.fspath(path), name)
        found = _detached(os.fspath(path), name, header)
    except SourceError:  # opening it will tell
        return None
    return found if found and os.path.exists(found) else None


def _header(path: str, name: str) -> tuple[dict[str, Any], int]:
    """Return the fields and the number of bytes before attached data."""
    if not probe(path, name).startswith(b"NRRD000"):
        raise SourceError("WSI101", f"{name}: not an NRRD file")
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := head.find(mark)) >= 0]
    end = min(ends, default=len(head))
    if not ends and len(head) == _HEAD_BYTES:
        raise SourceError("WSI115", f"{name}: its header has no end within {_HEAD_BYTES >> 20} MiB")
    nrrd = import_reader(name, "nrrd")
    try:
        header = dict(nrrd.read_header(io.BytesIO(head[:end])))
    except Exception as error:  # pynrrd raises its own, and whatever parsing a number raises
        raise SourceError("WSI115", f"{name}: damaged NRRD header: {error}") from error
    missing = {"type", "dimension", "sizes", "encoding"} - header.keys()
    if missing:
        raise SourceError("WSI115", f"{name}: its header lacks {', '.join(sorted(missing))}")
    return header, end


def _vectors(header: dict[str, Any]) -> NDArray[np.float64] | None:
    """Return the space directions, a row for each axis, NaN where an axis has none."""
    rows = header.get("space directions")
    if rows is None:
        return None
    width = max((len(r) for r in rows if r is not None), default=3)
    return np.array([[np.nan] * width if r is None else r for r in rows], np.float64)


def _spatial(header: dict[str, Any]) -> list[int]:
    """Return which stored axes (fastest first) lie in space."""
    vectors = _vectors(header)
    if vectors is not None:
        return [k for k, row in enumerate(vectors) if np.isfinite(row).all()]
    kinds = header.get("kinds") or ["domain"] * int(header["dimension"])
    return [k for k, kind in enumerate(kinds) if str(kind).lower() in ("domain", "space", "???", "none")]


def _layout(name: str, header: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
    """Return the stored shape in C order, and whether channels lie within each voxel."""
    sizes = [int(n) for n in np.atleast_1d(header["sizes"])]
    if len(sizes) != int(header["dimension"]):
        raise SourceError("WSI115", f"{name}: {len(sizes)} sizes for {header['dimension']} dimensions")
    spatial = _spatial(header)
    if spatial not in ([0, 1, 2], [1, 2, 3]) or len(sizes) not in (3, 4) or max(spatial) >= len(sizes):
        raise SourceError(
            "WSI118",
            f"{name}: {' x '.join(map(str, sizes))} with axes {spatial} in space; wanted three, and at most "
            "one of channels before or behind them",
        )
    stored = tuple(reversed(sizes))
    check_pixels(name, stored)
    return stored, spatial[0] == 1


def _dtype(name: str, header: dict[str, Any]) -> np.dtype[Any]:
    word = str(header["type"]).lower()
    if word not in _DTYPES:
        raise SourceError("WSI118", f"{name}: voxels of type {word!r}; save real numbers")
    dtype = _DTYPES[word]
    order = str(header.get("endian", "")).lower()
    if dtype.itemsize > 1 and order not in ("little", "big"):
        raise SourceError("WSI115", f"{name}: its header names no byte order")
    return dtype.newbyteorder(">" if order == "big" else "<")


def _place(name: str, header: dict[str, Any]) -> tuple[Frame, str]:
    """Return the frame, and the field that states the voxel size."""
    space = str(header.get("space", "")).lower()
    if space not in _TO_LPS:
        raise SourceError(
            "WSI118", f"{name}: space {space!r}; wanted one of {', '.join(filter(None, _TO_LPS))}"
        )
    units = {_UNITS_MM.get(str(u).strip('"').lower()) for u in header.get("space units", ["mm"])}
    if len(units) != 1 or None in units:
        raise SourceError("WSI118", f"{name}: space units {header.get('space units')}; wanted mm")
    unit = float(units.pop() or 1.0)
    vectors, spatial = _vectors(header), _spatial(header)
    try:
        if vectors is not None:
            signs = np.array(_TO_LPS[space], np.float64)
            matrix = np.eye(4)
            matrix[:3, :3] = (vectors[spatial[::-1]] * signs).T * unit
            matrix[:3, 3] = np.asarray(header.get("space origin", (0, 0, 0)), np.float64) * signs * unit
            return Frame.from_matrix(matrix), "nrrd.space directions"
        sizes = np.asarray(header.get("spacings", [np.nan] * 4), np.float64)[spatial[::-1]]
        return Frame.from_axes((0, 0, 0), np.eye(3)[:, ::-1], sizes * unit), "nrrd.spacings"
    except (ValueError, IndexError, TypeError) as error:
        raise SourceError("WSI115", f"{name}: its place in space cannot be true: {error}") from error


def _detached(path: str, name: str, header: dict[str, Any]) -> str | None:
    """Return the data file that a header names; raises SourceError (WSI121) if it lies anywhere but beside it."""
    stated = header.get("data file", header.get("datafile"))
    if stated is None:
        return None
    text = str(stated).strip()
    if text.upper().startswith("LIST") or "%" in text:
        raise SourceError("WSI118", f"{name}: its voxels are spread over several files; save it as one")
    folder = os.path.dirname(os.path.abspath(path))
    found = os.path.join(folder, text)
    plain = text not in ("", ".", "..") and not set(text) & set("/\\:\0")
    # a link could still lead out of the folder
    if not plain or os.path.dirname(os.path.realpath(found)) != os.path.realpath(folder):
        raise SourceError(
            "WSI121", f"{name}: names its voxels as {text!r}; a header may only name a file beside itself"
        )
    return found


def _open_voxels(
    name: str, header: dict[str, Any], path: str, behind: int, stored: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[BinaryIO, int]:
    """Return a file, unpacked if need be, and where its first voxel lies."""
    encoding = str(header["encoding"]).lower()
    lines, skip = (int(header.get(f"{k} skip", header.get(f"{k}skip", 0))) for k in ("line", "byte"))
    if encoding not in ("raw", "gzip", "gz") or lines or skip < -1 or (skip == -1 and encoding != "raw"):
        raise SourceError(
            "WSI118",
            f"{name}: encoding {encoding!r}, line skip {lines}, byte skip {skip}; save it as raw or gzip",
        )
    start = 0 if header.keys() & {"data file", "datafile"} else behind
    wanted = prod(stored) * dtype.itemsize
    try:
        file = open(path, "rb")  # noqa: SIM115  (kept open)
    except OSError as error:
        raise SourceError("WSI100", f"{name}: {os.path.basename(path)}: {error.strerror or error}") from error
    try:
        if encoding == "raw":
            length = file.seek(0, io.SEEK_END)
            offset = max(start, length - wanted) if skip == -1 else start + skip
            check_length(name, length, offset, stored, dtype.itemsize)
            return file, offset
        file.seek(start)
        unpacked = inflate(name, file, skip + wanted)
    except BaseException:
        file.close()
        raise
    file.close()
    return unpacked, skip
