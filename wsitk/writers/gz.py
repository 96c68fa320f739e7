"""One gzip member made by several threads, whose bytes do not depend on their number."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self, final

__all__ = ["GzipStream"]

_LEVEL = 4  # of zlib; level 6 takes three times as long for a few per cent
_BLOCK = 1 << 20
_HEADER = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 0xFF])  # no name, no time, no system


@final
class GzipStream:
    """Compresses what is written to it into `stream`; use it as a context manager.

    The text is cut into blocks of fixed length, each deflated on its own to a byte border and joined to
    one stream, as pigz does: any reader of gzip takes it, and zlib works outside the GIL. `stream` stays
    open, and is without a trailer if the block ends with an exception.
    """

    def __init__(self, stream: BinaryIO, *, threads: int = 2) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="wsitk-gzip")
        self._limit = threads + 1
        self._busy: deque[Future[bytes]] = deque()
        self._rest = bytearray()
        self._crc = 0
        self._length = 0
        stream.write(_HEADER)

    def write(self, data: bytes) -> None:
        """Append `data`; waits while all threads are busy."""
        self._rest += data
        while len(self._rest) >= _BLOCK:
            self._submit(bytes(self._rest[:_BLOCK]))
            del self._rest[:_BLOCK]

    def _submit(self, block: bytes) -> None:
        self._crc = zlib.crc32(block, self._crc)
        self._length += len(block)
        self._busy.append(self._pool.submit(_deflate, block))
        while len(self._busy) > self._limit:
            self._stream.write(self._busy.popleft().result())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._pool:
            if kind is not None:
                return
            self._submit(bytes(self._rest))
            while self._busy:
                self._stream.write(self._busy.popleft().result())
        # an empty last block of fixed codes ends the stream; the length is modulo 2**32 (RFC 1952)
        self._stream.write(b"\x03\x00" + struct.pack("<II", self._crc, self._length & 0xFFFFFFFF))


def _deflate(block: bytes) -> bytes:
    """Return raw deflate of `block` that ends on a byte border and is not the last of its stream."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
