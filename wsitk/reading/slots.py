"""Shared memory in which decoded tiles cross from one process to another without being pickled."""

from __future__ import annotations

import mmap
import os
import queue
import tempfile
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.sources.base import Reading

__all__ = ["Slots"]

Shape = tuple[int, ...]
Layout = tuple[Shape, str, bool]
"""What lies in a slot: shape and dtype of the pixels, and whether a mask of absent ones follows."""


@final
class Slots:
    """`count` places of `size` bytes each, behind a descriptor that a child inherits. Leaves no file behind."""

    def __init__(self, count: int, size: int, descriptor: int | None = None) -> None:
        self.count, self.size = count, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = _anonymous() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self._file, max(1, self.count * self.size))
        self._memory = mmap.mmap(self._file, max(1, self.count * self.size))
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(count):
            self.free.put(slot)

    @property
    def descriptor(self) -> int:
        """Return the file's number, which a child keeps."""
        return self._file

    def put(self, slot: int, reading: Reading) -> Layout:
        """Copy a reading into a slot; raises ValueError if it is too large."""
        pixels = np.ascontiguousarray(reading.pixels)
        more = 0 if reading.absent is None else reading.absent.size
        if pixels.nbytes + more > self.size:
            raise ValueError(f"{pixels.nbytes + more} bytes do not fit into a slot of {self.size}")
        self._view(slot, pixels.shape, pixels.dtype)[...] = pixels
        if reading.absent is not None:
            self._view(slot, reading.absent.shape, np.dtype(bool), pixels.nbytes)[...] = reading.absent
        return pixels.shape, pixels.dtype.str, reading.absent is not None

    def take(self, slot: int, layout: Layout) -> Reading:
        """Return a copy of what lies in a slot."""
        shape, name, masked = layout
        pixels = self._view(slot, shape, np.dtype(name)).copy()
        if not masked:
            return Reading(pixels)
        return Reading(pixels, self._view(slot, shape[:-1], np.dtype(bool), pixels.nbytes).copy())

    def _view(self, slot: int, shape: Shape, dtype: np.dtype[Any], offset: int = 0) -> NDArray[Any]:
        return np.ndarray(shape, dtype, self._memory, slot * self.size + offset)

    def close(self) -> None:
        """Give the memory back; doing so twice is once."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self._file)


def _anonymous() -> int:
    """Return the descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):  # Linux
        return os.memfd_create("wsitk-tiles")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
