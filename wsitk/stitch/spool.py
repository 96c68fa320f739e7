"""Scores of many classes on a moving window of rows, on disk: memory does not know how many there are.

    rows ──>  │ brick 0 │ brick 1 │ ...   a brick is the rows between two neighbouring cuts along every other axis;
      ring    │ class 0 │ class 0 │       tiles begin and end at cuts, so a tile is whole bricks, and each of its
              │ class 1 │ class 1 │       classes is read and written there in one piece.

The file has no name and is gone when it is closed, or when the process is killed. It is read and written by
offset, never mapped, so that its pages count as the system's cache and not as the process's memory.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region

__all__ = ["Spool"]

Floats = NDArray[np.float32]


@final
class Spool:
    """Float32 scores (class, row, ...) over `extent`, of which any `rows` consecutive rows are kept; else zero.

    `cuts` has, for each axis but the first, the sorted places between which bricks lie, the extent's ends
    included. Close it, or let it go: nothing stays behind.
    """

    def __init__(
        self,
        extent: Region,
        classes: int,
        rows: int,
        cuts: Sequence[Sequence[int]],
        *,
        folder: Path | None = None,
    ) -> None:
        self._classes, self._rows = classes, rows
        spans = [list(pairwise(places)) for places in cuts]
        self._bricks = [
            Region(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*spans)
        ]
        sizes = np.array([brick.size for brick in self._bricks], np.int64)
        self._begin = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._written = np.zeros((len(self._bricks), rows), np.bool_)
        self._folder = folder
        self._file: int | None = None
        self._low = extent.start[0]

    @property
    def nbytes(self) -> int:
        """Return the room that the file may take on disk."""
        return int(4 * self._begin[-1]) * self._classes * self._rows

    def advance(self, row: int) -> None:
        """Forget the rows before `row`."""
        gone = range(self._low, min(row, self._low + self._rows))
        self._written[:, [r % self._rows for r in gone]] = False
        self._low = max(self._low, row)

    def bricks(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield number and box (with the rows of `region`) of every brick that meets `region`."""
        flat = Region(region.start[1:], region.shape[1:])
        for number, brick in enumerate(self._bricks):
            common = brick.intersect(flat)
            if common.size:
                yield number, Region((region.start[0], *brick.start), (region.shape[0], *brick.shape))

    def read(self, brick: int, kind: int, low: int, high: int) -> Floats:
        """Return rows low .. high - 1 of class `kind` of a brick: (high - low, *brick)."""
        shape = self._bricks[brick].shape
        out = np.zeros((high - low, *shape), np.float32)
        for first, last in self._runs(low, high):
            known = self._written[brick, first % self._rows : first % self._rows + last - first]
            if known.any():
                part = out[first - low : last - low]
                self._transfer(os.preadv, part, brick, kind, first)
                part[~known] = 0.0
        return out

    def write(self, brick: int, kind: int, low: int, values: Floats) -> None:
        """Store rows (n, *brick) of class `kind` from row `low` on; `wrote` is said once all classes are in."""
        whole = np.ascontiguousarray(values, np.float32)
        for first, last in self._runs(low, low + len(whole)):
            self._transfer(os.pwritev, whole[first - low : last - low], brick, kind, first)

    def wrote(self, brick: int, low: int, high: int) -> None:
        """Note that rows low .. high - 1 of a brick hold something, in every class."""
        self._written[brick, [r % self._rows for r in range(low, high)]] = True

    def _runs(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range of rows that lie together in the file."""
        if not self._low <= low <= high <= self._low + self._rows:
            raise ValueError(f"rows {low} to {high} are not kept; {self._rows} from {self._low} on are")
        while low < high:
            end = min(high, low - low % self._rows + self._rows)
            yield low, end
            low = end

    def _transfer(self, action: Any, rows: Floats, brick: int, kind: int, row: int) -> None:
        area = self._bricks[brick].size
        place = self._begin[brick] * self._classes * self._rows
        offset = 4 * (place + (kind * self._rows + row % self._rows) * area)
        view = rows.reshape(-1).view(np.uint8).data
        number = self._open()
        while len(view):
            done = action(number, [view], offset)
            if not done:
                raise OSError(errno.EIO, "the scratch file ends early")
            view, offset = view[done:], offset + done

    def _open(self) -> int:
        """Return the file's number. Raises OSError (ENOSPC) if there is no room for all of it."""
        if self._file is None:
            folder = str(self._folder) if self._folder else tempfile.gettempdir()
            if shutil.disk_usage(folder).free < self.nbytes:
                text = f"no room for {self.nbytes / 2**30:.1f} GiB of scores of {self._classes} classes"
                raise OSError(errno.ENOSPC, text, folder)
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = os.dup(file.fileno())
            self._closing = weakref.finalize(self, os.close, self._file)
            os.ftruncate(self._file, self.nbytes)
        return self._file

    def close(self) -> None:
        """Give the room back."""
        if self._file is not None:
            self._closing()
            self._file = None
