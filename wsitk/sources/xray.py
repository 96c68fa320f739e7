"""A radiograph in DICOM as a flat image: the numbers that a reader sees, bright where the beam was absorbed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region, Spacing
from wsitk.sources.base import Level, Reading, Source, SourceRef
from wsitk.sources.dicom_header import read_header
from wsitk.sources.dicom_pixels import PixelStore, read_dataset, read_frame
from wsitk.sources.files import closed, file_identity, file_stamp, probe, reference, reopen
from wsitk.sources.image import check_whole
from wsitk.sources.spacing import VOLUME_RANGE_UM, explicit, judge

__all__ = ["XRaySource"]

_TAGS = [
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "Modality", "SOPClassUID",
]  # fmt: skip
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_CHUNK = 512


@final
class XRaySource(Source):
    """A single-frame DICOM radiograph as axes (y, x, c) with one channel, ``intensity``.

    The modality look-up table (or slope and intercept) is applied, then the first VOI look-up table or
    window, then MONOCHROME1 is inverted within the range that this leaves, so that bone is bright. Stored
    integers that nothing changes keep their type, all else is float32. `PixelSpacing` is believed before
    `ImagerPixelSpacing`, which holds at the detector. Raises SourceError: WSI100, WSI101 (no radiograph),
    WSI102, WSI111, WSI115, WSI118 (colour, several frames), WSI128, WSI141.
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        probe(self._path, self.name)
        header = read_header(self._path)
        if header is None or not header.is_x_ray:
            raise SourceError("WSI101", f"{self.name}: not a radiograph in DICOM")
        dataset, store = read_dataset(self._path, self.name, _TAGS)
        if store.frames > 1:
            raise SourceError("WSI118", f"{self.name}: {store.frames} frames; extract the one you mean")
        check_whole(self.name, 8 * store.rows * store.columns)
        shown = _shown(self.name, dataset, store)
        self._pixels: NDArray[Any] | None = shown[..., None]
        shape = (store.rows, store.columns)
        self.axes = ("y", "x", "c")
        self.levels = (Level(shape, (1.0, 1.0), (min(_CHUNK, shape[0]), min(_CHUNK, shape[1]))),)
        self.dtype = shown.dtype
        self.channel_names = ("intensity",)
        self.spacing, self.spacing_error = judge(
            self.name, explicit(mpp, 2) + _stated(dataset), _SPACINGS, range_um=VOLUME_RANGE_UM
        )
        self.bounds = Region((0, 0), shape)
        self.ref: SourceRef = reference(self._path, "xray", mpp, name)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return a copy of the region."""
        if self._pixels is None:
            raise closed(self.name)
        return Reading(self._pixels[region.slices()].copy())

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return name, size and a sampled sha256 of the file."""
        return file_identity(self.name, [self._path])

    def stamp(self) -> dict[str, Any]:
        """Return size and time of change of the file."""
        return file_stamp(self.name, [self._path])

    def close(self) -> None:
        """Free the pixels."""
        self._pixels = None


def _stated(dataset: Any) -> list[Spacing]:
    """Return the pixel sizes that the file states, the calibrated one first."""
    found = []
    for keyword in _SPACINGS:
        value = dataset.get(keyword)
        if value:
            found.append(Spacing(tuple(1000.0 * float(v) for v in value), f"dicom.{keyword}"))
    return found


def _shown(name: str, dataset: Any, store: PixelStore) -> NDArray[Any]:
    """Return the pixels as a viewer shows them: modality, VOI, then inversion (PS3.3, C.11)."""
    values = read_frame(store, 0, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = _voi(_modality(values, dataset), dataset)
    except Exception as error:  # whatever pydicom makes of a damaged table
        raise SourceError("WSI115", f"{name}: its look-up table or window cannot be true: {error}") from error
    if not np.isfinite(values).all():
        raise SourceError("WSI115", f"{name}: its slope or window gives numbers that are none")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = _inverted(values, dataset, store)
    return values if values.dtype.kind in "iu" and values.dtype == store.dtype else values.astype(np.float32)


def _modality(values: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Return values after the modality's table, or its slope and intercept."""
    table = dataset.get("ModalityLUTSequence")
    if table:
        return _look_up(values, table[0])
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None or (float(slope), float(intercept)) == (1.0, 0.0):
        return values
    return values.astype(np.float64) * float(slope) + float(intercept)


def _voi(values: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Return values after the first table of interest, or else the first window."""
    table = dataset.get("VOILUTSequence")
    if table:
        return _look_up(values, table[0])
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return values
    from pydicom.pixels import apply_windowing

    return np.asarray(apply_windowing(values, dataset, index=0))


def _look_up(values: NDArray[Any], item: Any) -> NDArray[Any]:
    """Return the entries of a table (PS3.3, C.11.1.1); what lies beyond it takes the first or the last.

    Not by pydicom, which counts the entries of a table of bytes in bytes: at most 256.
    """
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else "<u2")
    entries = np.asarray(data, np.uint16)
    if not 1 <= bits <= 16 or len(entries) < count:
        raise ValueError(f"{len(entries)} entries of {bits} bits in a table of {count}")
    if values.min() < 0 and first >= 1 << 15:  # a signed number that was read as an unsigned one
        first -= 1 << 16
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return np.asarray(entries[places].astype(np.float64))


def _inverted(values: NDArray[Any], dataset: Any, store: PixelStore) -> NDArray[Any]:
    """Return bright for dark, about the middle of the range that the values may have.

    That range is a property of the header, never of the content: two images of one machine stay comparable.
    """
    if values.dtype == store.dtype:
        return np.asarray(sum(store.limits) - values.astype(np.int64)).astype(store.dtype)
    slope = float(dataset.get("RescaleSlope") or 1.0)
    intercept = float(dataset.get("RescaleIntercept") or 0.0)
    if "ModalityLUTSequence" in dataset or "VOILUTSequence" in dataset:
        table = dataset.get("VOILUTSequence") or dataset.get("ModalityLUTSequence")
        low, high = 0.0, float(2 ** int(table[0].LUTDescriptor[2]) - 1)
    else:
        low, high = (slope * v + intercept for v in store.limits)
    return np.asarray(low + high - values.astype(np.float64))
