"""Voxels that lie one after another in a file: rows are read from their place, nothing is mapped or kept.

A mapped file that shrinks kills its reader; `pread` says what happened, and needs no lock between threads.
Compressed voxels are unpacked once, when the file is opened: into memory if they are few, otherwise into a
temporary file without a name, which is gone when it is closed.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
import zlib
from math import prod
from typing import Any, BinaryIO, cast, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources.files import closed

__all__ = ["KEPT_BYTES", "RawVoxels", "check_length", "inflate"]

KEPT_BYTES = 256 << 20
"""Unpacked voxels up to this size stay in memory."""

_SLACK_BYTES = 64 << 20  # that may follow the voxels in a compressed stream
_PIECE = 1 << 20
_MAX_RATIO = 1032  # of deflate: 258 bytes from two bits
_MAX_UNPACKED = 64 << 30


@final
class RawVoxels:
    """Voxels of a C-ordered array of `stored` shape at `offset` of a file; its last three axes are z, y, x.

    An axis before those holds channels one volume after another, an axis behind them (`interleaved`) holds
    the channels of each voxel. Owns `file`.
    """

    def __init__(
        self,
        name: str,
        file: BinaryIO,
        offset: int,
        stored: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        interleaved: bool = False,
    ) -> None:
        self._name, self._file, self._offset = name, file, offset
        self._dtype, self._interleaved = dtype, interleaved
        self._planar = stored[0] if len(stored) == 4 and not interleaved else 0
        self._inner = stored[-1] if interleaved else 1
        self.shape: tuple[int, ...] = stored[:3] if interleaved else stored[-3:]
        # a file object over memory has no descriptor to read from
        self._descriptor = _descriptor(file)
        self._lock = threading.Lock()

    def read(self, region: Region) -> NDArray[Any]:
        """Return (z, y, x) or (z, y, x, c) of `region` in native byte order.

        Raises SourceError: WSI111 if the file ends early or cannot be read, WSI112 after `close`.
        """
        tail = (self._inner,) if self._interleaved else ()
        count = max(self._planar, 1)
        out = np.empty((count, *region.shape, *tail), self._dtype.newbyteorder("="))
        if region.size:
            for channel in range(count):
                for z in range(region.shape[0]):
                    out[channel, z] = self._rows(region, channel, region.start[0] + z)
        if self._planar:
            return np.ascontiguousarray(np.moveaxis(out, 0, -1))
        return np.asarray(out[0])

    def _rows(self, region: Region, channel: int, z: int) -> NDArray[Any]:
        """Return the part of one slice: whole rows are read, in one piece."""
        depth, height, width = self.shape
        y, x = region.start[1:]
        rows, columns = region.shape[1:]
        row_bytes = width * self._inner * self._dtype.itemsize
        first = ((channel * depth + z) * height + y) * row_bytes
        data = self._bytes(self._offset + first, rows * row_bytes)
        plane = np.frombuffer(data, self._dtype).reshape(rows, width, self._inner)[:, x : x + columns]
        return plane if self._interleaved else plane[..., 0]

    def _bytes(self, start: int, length: int) -> bytes:
        if self._file.closed:
            raise closed(self._name)
        try:
            if self._descriptor is not None and hasattr(os, "pread"):
                data = _pread(self._descriptor, start, length)
            else:
                with self._lock:
                    self._file.seek(start)
                    data = self._file.read(length)
        except OSError as error:
            raise SourceError("WSI111", f"{self._name}: {error.strerror or error}") from error
        if len(data) < length:
            raise SourceError("WSI111", f"{self._name}: the file ends at byte {start + len(data)}")
        return data

    def close(self) -> None:
        """Close the file, and with it the temporary copy."""
        self._file.close()


def _descriptor(file: BinaryIO) -> int | None:
    try:
        return file.fileno()
    except OSError:  # io.UnsupportedOperation: the bytes are in memory
        return None


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Return `length` bytes, fewer only at the end of the file; one call gives at most 2 GiB."""
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(descriptor, min(length, 1 << 30), start)
        if not part:
            break
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_length(name: str, available: int, offset: int, stored: tuple[int, ...], itemsize: int) -> None:
    """Raise SourceError (WSI102) if a file of `available` bytes cannot hold the voxels its header claims."""
    wanted = offset + prod(stored) * itemsize
    if available < wanted:
        shape = " x ".join(map(str, stored))
        raise SourceError(
            "WSI102",
            f"{name}: {available} bytes, {wanted} are needed for {shape} voxels; the copy is cut short, or "
            "its header is wrong: copy it again",
        )


def inflate(name: str, packed: BinaryIO, wanted: int, keep: int | None = None) -> BinaryIO:
    """Unpack `wanted` bytes of gzip from `packed` into a new file object, and check what follows them.

    More than 64 MiB beyond `wanted` is a bomb or another file than its header says. Raises SourceError:
    WSI102 if the stream is too short for what it should hold, WSI115 if it holds much more, WSI116 if it is
    damaged, WSI119 if there is no room for a temporary file, WSI141 if it unpacks to more than 64 GiB.
    """
    _check_claim(name, packed, wanted)
    in_memory = wanted <= (KEPT_BYTES if keep is None else keep)
    target: BinaryIO = io.BytesIO() if in_memory else _temporary(name, wanted)
    try:
        _inflate_into(name, packed, wanted, target)
    except BaseException:
        target.close()
        raise
    return target


def _check_claim(name: str, packed: BinaryIO, wanted: int) -> None:
    """Refuse what the stream cannot hold, before a byte of it is unpacked."""
    here = packed.tell()
    length = packed.seek(0, os.SEEK_END) - here
    packed.seek(here)
    if wanted > length * _MAX_RATIO:
        raise SourceError(
            "WSI102", f"{name}: {length} compressed bytes cannot hold the {wanted} that its header claims"
        )
    if wanted > _MAX_UNPACKED:
        raise SourceError(
            "WSI141",
            f"{name}: unpacks to {wanted / 2**30:.0f} GiB, limit {_MAX_UNPACKED >> 30}; save it uncompressed",
        )


def _temporary(name: str, wanted: int) -> BinaryIO:
    """Return a file without a name, in the folder that TMPDIR names, where there is room for it."""
    folder = tempfile.gettempdir()
    try:
        if shutil.disk_usage(folder).free > wanted:
            return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
    except OSError as error:
        raise SourceError("WSI119", f"{name}: {folder}: {error.strerror or error}; set TMPDIR") from error
    raise SourceError(
        "WSI119",
        f"{name}: unpacks to {wanted >> 20} MiB, and {folder} has less; set TMPDIR to a folder with room",
    )


def _inflate_into(name: str, packed: BinaryIO, wanted: int, target: BinaryIO) -> None:
    import gzip

    count = 0
    with gzip.GzipFile(fileobj=packed, mode="rb") as stream:
        while count <= wanted + _SLACK_BYTES:
            data = _next_piece(name, stream)
            if not data:
                break
            if count < wanted:
                _keep(name, target, data[: wanted - count])
            count += len(data)
        else:
            raise SourceError(
                "WSI115",
                f"{name}: unpacks to more than the {wanted} bytes that its header states; it is damaged or hostile",
            )
    if count < wanted:
        raise SourceError(
            "WSI102",
            f"{name}: unpacks to {count} bytes, {wanted} are needed; copy it again or mend its header",
        )


def _next_piece(name: str, stream: Any) -> bytes:
    """Return the next MiB, unpacked; the checksum is verified where the stream ends."""
    try:
        return bytes(stream.read(_PIECE))
    except EOFError as error:
        raise SourceError("WSI102", f"{name}: the compressed data end early; copy it again") from error
    except (zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError
        raise SourceError("WSI116", f"{name}: damaged compressed data ({error}); copy it again") from error


def _keep(name: str, target: BinaryIO, data: bytes) -> None:
    try:
        target.write(data)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise SourceError(
            "WSI119",
            f"{name}: cannot be unpacked in {folder} ({error.strerror or error}); "
            "set TMPDIR to a folder with room",
        ) from error
