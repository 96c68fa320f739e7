"""The stored tiles and strips of one file: pread, one codec call for each, a bounded cache."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from typing import Any, final

from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.sources.files import closed
from wsitk.sources.tiff_codecs import decode_tile
from wsitk.sources.tiff_pages import TiledPage

__all__ = ["CACHE_BYTES", "TileCache", "TileStore"]

CACHE_BYTES = 64 << 20


@final
class TileStore:
    """Decoded tiles of the pages of one file, for any number of threads; `name` is what errors call it."""

    def __init__(self, path: str, name: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._path, self._name = path, name
        self.cache = TileCache(cache_bytes)
        self._file: _Descriptor | None = _Descriptor(path)

    def get(self, page: TiledPage, key: int, index: int, place: str) -> NDArray[Any] | None:
        """Return one tile (h, w, samples), None where the file holds none; decodes outside the lock.

        `key` tells pages apart, `place` is for people. Raises SourceError: WSI111 if it can't be decoded,
        WSI112 after `close`, WSI150 if the system refuses three times.
        """
        if page.offsets[index] <= 0 or page.counts[index] <= 0:
            return None
        pixels = self.cache.get((key, index))
        if pixels is None:
            pixels = self._decode(page, index, place)
            self.cache.put((key, index), pixels)
        return pixels

    def _decode(self, page: TiledPage, index: int, place: str) -> NDArray[Any]:
        """Read and decode a tile, a second time if the first one fails; raises SourceError (WSI111)."""
        for attempt in range(2):
            data = self.stored(page, index)
            try:
                return decode_tile(page, data, index)
            except Exception as error:  # imagecodecs has an exception type per codec
                if attempt:
                    raise SourceError("WSI111", f"{self._name}: {place}: {error}") from error
        raise closed(self._name)

    def stored(self, page: TiledPage, index: int) -> bytes:
        """Return the stored bytes of a tile; reopens the file where the system fails (WSI150)."""
        offset, count = int(page.offsets[index]), int(page.counts[index])
        for attempt in range(3):
            file = self._file
            if file is None:
                raise closed(self._name)
            try:
                return os.pread(file.number, count, offset)
            except OSError as error:
                if attempt == 2:
                    text = f"{self._name}: {error.strerror or error} at byte {offset:,}, 3 tries"
                    raise SourceError("WSI150", text) from error
                self._reopen()
        raise closed(self._name)

    def _reopen(self) -> None:
        """Replace the descriptor, which may have gone stale on a network drive."""
        with contextlib.suppress(OSError):  # the next read will say so
            fresh = _Descriptor(self._path)
            if self._file is not None:
                self._file = fresh

    def close(self) -> None:
        """Close the file and forget decoded tiles."""
        self._file = None
        self.cache.clear()


class _Descriptor:
    """An open file that closes when its last user lets go, so that no read meets another file's number."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@final
class TileCache:
    """Decoded tiles, the least recently used dropped beyond a number of bytes; safe in threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()

    def get(self, key: tuple[int, int]) -> NDArray[Any] | None:
        """Return a tile, None if it is not held."""
        with self._lock:
            pixels = self._tiles.get(key)
            if pixels is not None:
                self._tiles.move_to_end(key)
            return pixels

    def put(self, key: tuple[int, int], pixels: NDArray[Any]) -> None:
        """Hold a tile, and let go of others."""
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = pixels
                self._used += pixels.nbytes
            while self._used > self._limit:
                self._used -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._tiles.clear()
            self._used = 0
