"""Frames of DICOM files: where they lie, and from stored bytes to numbers.

Native frames are read from their place. JPEG of all kinds goes through imagecodecs, which also knows the lossless
process that most archives use; the size in the codestream must be the header's before anything is decoded.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.sources.files import MAX_TILE_BYTES, check_pixels
from wsitk.sources.nifti import import_reader

__all__ = ["PixelStore", "read_dataset", "read_frame"]

_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}
_RLE = "1.2.840.10008.1.2.5"
_JPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70)}
_JPEG_LS = {f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)}
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)}
_HTJ2K = {f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)}
_DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, slots=True)
class PixelStore:
    """How one file keeps its frames: all of a size, one sample for each pixel."""

    path: str
    start: int
    syntax: str
    frames: int
    rows: int
    columns: int
    allocated: int
    stored: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the native type of a stored number."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest number that the stored bits can hold."""
        if self.signed:
            return -(1 << self.stored - 1), (1 << self.stored - 1) - 1
        return 0, (1 << self.stored) - 1

    @property
    def form(self) -> tuple[Any, ...]:
        """Return what all files of a series must share: rows, columns, bits, sign."""
        return self.rows, self.columns, self.allocated, self.signed


def read_dataset(path: str, name: str, tags: list[str]) -> tuple[Any, PixelStore]:
    """Return the named attributes of a file and where its pixels lie, without reading them.

    Raises SourceError: WSI100, WSI102 (pixels cut short), WSI115 (contradictions), WSI118 (colours, floats),
    WSI128 (a way of storing that nobody here reads), WSI140, WSI141, WSI149.
    """
    pydicom = import_reader(name, "pydicom")
    wanted = [*tags, *_PIXEL_TAGS]
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _refuse_deflated(path, name)
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
            _convert(dataset)
            syntax = str(dataset.file_meta.TransferSyntaxUID)
            start, length = _pixel_element(file, syntax)
            store = _store(path, syntax, start, dataset)
            file.seek(0, 2)
            available = file.tell() - start
    except SourceError:
        raise
    except OSError as error:
        raise SourceError("WSI100", f"{name}: {error.strerror or error}") from error
    except Exception as error:  # pydicom has no common base for what a damaged file makes it raise
        raise SourceError("WSI115", f"{name}: damaged DICOM header: {error}") from error
    _check(name, dataset, store, length, available)
    return dataset, store


def _convert(dataset: Any) -> None:
    """Convert every value now, where errors are caught, not when it is first asked for.

    Without validation: pydicom would quote offending values, names of patients among them, in its log.
    """
    from pydicom.config import disable_value_validation

    with disable_value_validation():
        for _ in dataset.iterall():
            pass


_PIXEL_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
]  # fmt: skip


def _refuse_deflated(path: str, name: str) -> None:
    """Refuse what would be inflated whole, without a limit, before its header could be read."""
    with open(path, "rb") as file:
        if _DEFLATED.encode() in file.read(1024):
            raise SourceError("WSI128", f"{name}: deflated DICOM is not read; save it uncompressed")


def _pixel_element(file: Any, syntax: str) -> tuple[int, int]:
    """Return where the pixels start and the length that is stated; the file stands before the element."""
    order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
    head = file.read(12)
    group, element = struct.unpack_from(order + "HH", head)
    if (group, element) != (0x7FE0, 0x0010):
        raise ValueError("no integer pixel data")
    if syntax == "1.2.840.10008.1.2":
        return file.tell() - 4, struct.unpack_from("<I", head, 4)[0]
    return file.tell(), struct.unpack_from(order + "I", head, 8)[0]


def _store(path: str, syntax: str, start: int, dataset: Any) -> PixelStore:
    return PixelStore(
        path=path,
        start=start,
        syntax=syntax,
        frames=int(dataset.get("NumberOfFrames") or 1),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        allocated=int(dataset.BitsAllocated),
        stored=int(dataset.get("BitsStored") or dataset.BitsAllocated),
        signed=bool(dataset.get("PixelRepresentation", 0)),
    )


def _check(name: str, dataset: Any, store: PixelStore, length: int, available: int) -> None:
    """Raise SourceError for what cannot be true, or cannot be read."""
    grey = int(dataset.get("SamplesPerPixel", 1)) == 1
    if not grey or not str(dataset.get("PhotometricInterpretation", "")).startswith("MONOCHROME"):
        raise SourceError("WSI118", f"{name}: a DICOM image in colour; wanted one grey value for each pixel")
    if store.allocated not in (8, 16, 32) or not 1 <= store.stored <= store.allocated:
        raise SourceError("WSI118", f"{name}: {store.stored} bits in {store.allocated}; wanted 8, 16 or 32")
    shape = (store.frames, store.rows, store.columns)
    if min(shape) < 1:
        raise SourceError("WSI115", f"{name}: claims a shape of {shape}; the file is damaged")
    check_pixels(name, shape)
    frame_bytes = store.rows * store.columns * store.allocated // 8
    if frame_bytes > MAX_TILE_BYTES:
        raise SourceError(
            "WSI141", f"{name}: one frame takes {frame_bytes >> 20} MiB, limit {MAX_TILE_BYTES >> 20}"
        )
    if store.syntax in _NATIVE and min(length, available) < frame_bytes * store.frames:
        raise SourceError(
            "WSI102",
            f"{name}: {min(length, available)} bytes of pixels, {frame_bytes * store.frames} are needed",
        )
    if store.syntax not in {*_NATIVE, *_decoders(), _RLE}:
        raise SourceError(
            "WSI128", f"{name}: transfer syntax {store.syntax} is not read; convert it, e.g. gdcmconv --raw"
        )


def _decoders() -> dict[str, str]:
    """Return transfer syntaxes and the imagecodecs function for each."""
    kinds = {"jpeg8": _JPEG, "jpegls": _JPEG_LS, "jpeg2k": _JPEG_2000, "htj2k": _HTJ2K}
    return {syntax: f"{kind}_decode" for kind, syntaxes in kinds.items() for syntax in syntaxes}


def read_frame(store: PixelStore, index: int, name: str) -> NDArray[Any]:
    """Return frame `index` as (y, x) of `store.dtype`; raises SourceError (WSI111)."""
    try:
        if store.syntax in _NATIVE:
            values = _native(store, index)
        elif store.syntax == _RLE:
            values = _run_length(store, index)
        else:
            values = _coded(store, index)
        if values.shape != (store.rows, store.columns):
            raise ValueError(f"decodes to {values.shape}, the header says {(store.rows, store.columns)}")
    except SourceError:
        raise
    except Exception as error:  # each codec has an exception type of its own
        raise SourceError("WSI111", f"{name}: frame {index}: {error}") from error
    return _significant(values, store)


def _native(store: PixelStore, index: int) -> NDArray[Any]:
    size = store.rows * store.columns * store.allocated // 8
    with open(store.path, "rb") as file:
        file.seek(store.start + index * size)
        data = file.read(size)
    if len(data) < size:
        raise ValueError("the file ends within its pixels")
    stored = store.dtype.newbyteorder(">" if store.syntax == "1.2.840.10008.1.2.2" else "<")
    return np.frombuffer(data, stored).reshape(store.rows, store.columns)


def _run_length(store: PixelStore, index: int) -> NDArray[Any]:
    from pydicom.pixels import pixel_array

    return np.asarray(pixel_array(store.path, index=index, raw=True))


def _coded(store: PixelStore, index: int) -> NDArray[Any]:
    """Return a JPEG, JPEG-LS or JPEG 2000 frame, once its stated size is the header's."""
    import imagecodecs
    from pydicom.encaps import get_frame

    with open(store.path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of padding behind the last fragment
        file.seek(store.start)
        data = get_frame(file, index, number_of_frames=store.frames)
    size = _stated_size(data)
    if size != (store.rows, store.columns):
        raise ValueError(f"its codestream is {size}, the header says {(store.rows, store.columns)}")
    decode: Callable[[bytes], Any] = getattr(imagecodecs, _decoders()[store.syntax])
    return np.asarray(decode(data))


def _stated_size(data: bytes) -> tuple[int, int]:
    """Return (rows, columns) that a codestream states: SIZ of JPEG 2000, SOF of the JPEGs."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at >= 0:
        right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
        return bottom - top, right - left
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", data, at + 5)
        at += 1 if marker == 0xFF else 2 + length
    raise ValueError("no size in its codestream")


def _significant(values: NDArray[Any], store: PixelStore) -> NDArray[Any]:
    """Return numbers of the stored bits alone, sign extended; the others may hold overlays."""
    same = values.astype(store.dtype.newbyteorder("="), copy=False)
    spare = store.allocated - store.stored
    return np.asarray((same << spare) >> spare) if spare else np.asarray(same)
