"""A DICOM series as a volume: slices in the order of their place in the patient, never of their numbers.

What does not make one regular grid is refused with the reason: a model would see a jump where there is none.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region, Spacing
from wsitk.sources.base import Level, Reading, Source, SourceRef
from wsitk.sources.dicom_geometry import Slice, Stack, read_slices, stack
from wsitk.sources.dicom_header import SeriesFile, read_header
from wsitk.sources.dicom_pixels import read_frame
from wsitk.sources.files import check_pixels, closed, file_identity, file_stamp, reference, reopen
from wsitk.sources.spacing import explicit, judge

__all__ = ["DicomSeriesSource", "series_files"]

_CACHE_BYTES = 128 << 20


@final
class DicomSeriesSource(Source):
    """The slices of one series in one folder, or the frames of a multi-frame file, as axes (z, y, x).

    z runs along the normal of the slices (rows cross columns). Each slice's slope and intercept are applied;
    where they are whole numbers the voxels are integers, otherwise float32. `slices` says, in the order of z,
    which file and frame each one is. Slices are decoded when asked for; the last 128 MiB are kept.

    Raises SourceError: WSI100, WSI101 (no volume in DICOM), WSI102, WSI115, WSI118, WSI122 (gap), WSI123 (two
    slices in one place), WSI124 (mixed spacing), WSI125 (mixed orientation), WSI126 (mixed sizes), WSI127 (no
    position), WSI128 (a codec), WSI129 (a folder of several series), WSI143 (tilted gantry), WSI140, WSI141.
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._files = series_files(str(path), self.name)
        self._stack: Stack | None = stack(self.name, read_slices(self.name, self._files))
        self.slices: tuple[Slice, ...] = self._stack.slices
        shape = (len(self.slices), self.slices[0].store.rows, self.slices[0].store.columns)
        check_pixels(self.name, shape)
        self.axes = ("z", "y", "x")
        self.levels = (Level(shape, (1.0, 1.0, 1.0), (1, *shape[1:])),)
        self.dtype = _result_type(self.slices)
        self.channel_names = ()
        self.frame = self._stack.frame
        stated = [Spacing(self.frame.spacing_um, self._stack.provenance)]
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 3) + stated, (), 3)
        self.bounds = Region((0, 0, 0), shape)
        self.ref: SourceRef = reference(str(path), "dicom", mpp, name)
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the region, slice by slice."""
        out = np.empty(region.shape, self.dtype)
        rows, columns = region.slices()[1:]
        for index in range(region.shape[0]):
            out[index] = self._slice(region.start[0] + index)[rows, columns]
        return Reading(out)

    def _slice(self, z: int) -> NDArray[Any]:
        """Return one slice with slope and intercept applied, decoded or remembered."""
        with self._lock:
            if self._stack is None:
                raise closed(self.name)
            found = self._kept.get(z)
            if found is not None:
                self._kept.move_to_end(z)
                return found
        # decoded outside the lock: two threads may decode the same slice, and neither waits
        values = _scaled(self.slices[z], self.name, self.dtype)
        with self._lock:
            self._kept[z] = values
            while len(self._kept) > max(1, _CACHE_BYTES // max(values.nbytes, 1)):
                self._kept.popitem(last=False)
        return values

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the series is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a sampled sha256 over all files of the series."""
        return file_identity(self.name, self._files)

    def stamp(self) -> dict[str, Any]:
        """Return size and time of change of each file."""
        return file_stamp(self.name, self._files)

    def close(self) -> None:
        """Forget decoded slices."""
        with self._lock:
            self._stack = None
            self._kept.clear()


def series_files(path: str, name: str) -> list[str]:
    """Return the files of the series that `path` belongs to, sorted; of a folder, of the one series in it.

    Raises SourceError: WSI101 if there is no volume, WSI129 if a folder holds several.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    own = None if os.path.isdir(path) else _volume(path)
    if own is None and folder != path:
        raise SourceError("WSI101", f"{name}: not a slice of a DICOM volume")
    series: dict[str, list[str]] = {}
    try:
        entries = sorted(e.path for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
    except OSError as error:
        raise SourceError("WSI100", f"{name}: {error.strerror or error}") from error
    for entry in entries:
        header = _volume(entry)
        if header is not None and (own is None or header.series == own.series):
            series.setdefault(header.series, []).append(entry)
    if not series:
        raise SourceError("WSI101", f"{name}: a folder without a DICOM volume")
    if len(series) > 1:
        raise SourceError("WSI129", f"{name}: holds {len(series)} series; name a file of the one you mean")
    return next(iter(series.values()))


def _volume(path: str) -> SeriesFile | None:
    """Return the header of a file that is part of a volume; None for any other, or an unreadable one."""
    try:
        header = read_header(path)
    except OSError:  # opening it will tell
        return None
    return header if header is not None and header.is_stack else None


def _result_type(slices: Sequence[Slice]) -> np.dtype[Any]:
    """Return the smallest type that holds every number these slices can have, signed when scaled."""
    stored = slices[0].store.dtype
    if all((s.slope, s.intercept) == (1.0, 0.0) for s in slices):
        return stored
    if not all(float(v).is_integer() for s in slices for v in (s.slope, s.intercept)):
        return np.dtype(np.float32)
    ends = [s.slope * v + s.intercept for s in slices for v in s.store.limits]
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)


def _scaled(item: Slice, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    stored = read_frame(item.store, item.frame, f"{name}: {os.path.basename(item.store.path)}")
    if (item.slope, item.intercept) == (1.0, 0.0):
        return stored.astype(dtype, copy=False)
    return (stored.astype(np.float64) * item.slope + item.intercept).astype(dtype)
