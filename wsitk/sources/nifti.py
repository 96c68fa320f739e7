"""NIfTI-1 and NIfTI-2, plain or gzipped: voxels as they are stored, placed by sform, qform or voxel size."""

from __future__ import annotations

import io
import logging
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
from wsitk.sources.raw_volume import RawVoxels, check_length, inflate
from wsitk.sources.spacing import explicit, judge

__all__ = ["NiftiSource", "import_reader", "volume_chunk"]

logger = logging.getLogger("wsitk.sources")

_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 540  # of NIfTI-2, the longer of the two headers
_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown is read as millimetres, as everyone does
_AGREE_VOXELS = 0.5
_CHUNK = 64


@final
class NiftiSource(Source):
    """A NIfTI file as axes (z, y, x), with ``c`` last where it holds several volumes.

    Integers without scaling keep their type; scaled and double-precision values become float32. Where sform
    and qform are both set and lie more than half a voxel apart, the sform counts and `warnings` says so
    (WSI117). Raises SourceError: WSI100, WSI101 (not NIfTI), WSI102, WSI115, WSI116, WSI118, WSI119, WSI140,
    WSI141.
    """

    def __init__(
        self, path: str, *, mpp: float | Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.name = name or Path(path).name
        self._path = str(path)
        head = _head(self._path, self.name)
        header = _parse(self.name, head)
        stored, self._scaling = _layout(self.name, header)
        dtype = header.get_data_dtype()
        self.dtype = np.dtype(np.float32) if self._scaling or dtype.kind == "f" else dtype.newbyteorder("=")
        self.axes = ("z", "y", "x", "c") if len(stored) == 4 else ("z", "y", "x")
        shape = stored[-3:]
        self.levels = (Level(shape, (1.0, 1.0, 1.0), volume_chunk(shape)),)
        self.channel_names = default_channels(stored[0]) if len(stored) == 4 else ()
        self.frame, said, self.warnings = _place(self.name, header, shape)
        stated = [Spacing(self.frame.spacing_um, said)]
        self.spacing, self.spacing_error = judge(self.name, explicit(mpp, 3) + stated, (), 3)
        self.bounds = Region((0, 0, 0), shape)
        self.ref: SourceRef = reference(self._path, "nifti", mpp, name)
        offset = int(header["vox_offset"]) or int(header.single_vox_offset)
        file = _open_voxels(self._path, self.name, head, offset, stored, dtype)
        self._voxels = RawVoxels(self.name, file, offset, stored, dtype)

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the region with slope and intercept applied."""
        pixels = self._voxels.read(region)
        if self._scaling:
            slope, intercept = self._scaling
            # in double precision, and rounded once
            pixels = pixels.astype(np.float64) * slope + intercept
        return Reading(pixels.astype(self.dtype, copy=False))

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
        """Close the file, and remove its unpacked copy."""
        self._voxels.close()


def volume_chunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the window by which views of a volume in C order are cut."""
    return tuple(min(_CHUNK, n) for n in shape)


def import_reader(name: str, module: str) -> Any:
    """Return a module of the extra ``volumes``; raises SourceError (WSI149) where it is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise SourceError(
            "WSI149", f"{name}: reading it needs {module.split('.')[0]}: pip install 'wsitk[volumes]'"
        ) from error


def _head(path: str, name: str) -> bytes:
    """Return the first bytes, unpacked; raises SourceError (WSI101) for what is no NIfTI file."""
    head = probe(path, name)
    if head.startswith(_GZIP):
        import zlib

        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
        except zlib.error as error:
            raise SourceError("WSI101", f"{name}: gzip data are damaged ({error})") from error
    magic = {head[344:348], head[4:8]}
    if magic & {b"ni1\0", b"ni2\0"}:
        raise SourceError("WSI118", f"{name}: a pair of .hdr and .img; save it as one .nii file")
    if not magic & {b"n+1\0", b"n+2\0"}:
        raise SourceError("WSI101", f"{name}: not a NIfTI file")
    return head


def _parse(name: str, head: bytes) -> Any:
    """Return nibabel's header object; raises SourceError (WSI115) where the header makes no sense."""
    import_reader(name, "nibabel")
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    kind: Any = Nifti1Header if head[344:348] == b"n+1\0" else Nifti2Header
    length = int(kind.template_dtype.itemsize)
    if len(head) < length:
        raise SourceError("WSI102", f"{name}: the file ends within its header; copy it again")
    try:
        # the fixed part alone: extensions hold nothing that we need, and state their own lengths
        header = kind(binaryblock=head[:length], check=False)
        header.get_data_dtype()
    except Exception as error:  # nibabel raises several of its own
        raise SourceError("WSI115", f"{name}: damaged NIfTI header: {error}") from error
    return header


def _layout(name: str, header: Any) -> tuple[tuple[int, ...], tuple[float, float] | None]:
    """Return the stored shape in C order, (z, y, x) or (c, z, y, x), and slope and intercept if they act."""
    sizes = [int(n) for n in header["dim"]]
    if not 1 <= sizes[0] <= 7 or any(n < 1 for n in sizes[1 : sizes[0] + 1]):
        raise SourceError("WSI115", f"{name}: NIfTI dimensions {sizes} cannot be true")
    extents = sizes[1 : sizes[0] + 1] + [1] * (3 - sizes[0])
    further = [n for n in extents[3:] if n > 1]
    if sizes[0] < 3 or len(further) > 1:
        raise SourceError(
            "WSI118",
            f"{name}: {' x '.join(map(str, extents))} voxels; wanted one volume, or a series of them",
        )
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise SourceError("WSI118", f"{name}: voxels of type {dtype}; save real numbers")
    offset = float(header["vox_offset"])
    if not (offset == 0 or (348 <= offset < 2**31 and offset == int(offset))):
        raise SourceError("WSI115", f"{name}: its voxels start at byte {offset:g}; the header is damaged")
    stored = (*further, *reversed(extents[:3]))
    check_pixels(name, stored)
    return stored, _scaling(name, header)


def _scaling(name: str, header: Any) -> tuple[float, float] | None:
    """Return slope and intercept, None where they change nothing; slope 0 or NaN means none (NIfTI-1)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return None
    if not np.isfinite(intercept):
        raise SourceError("WSI115", f"{name}: slope {slope:g} with intercept {intercept:g}; mend the header")
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _place(name: str, header: Any, shape: tuple[int, ...]) -> tuple[Frame, str, tuple[str, ...]]:
    """Return the frame, the field it is from, and warnings: sform before qform before bare voxel sizes."""
    millimetres = _UNITS_MM.get(int(header["xyzt_units"]) & 7)
    if millimetres is None:
        raise SourceError("WSI115", f"{name}: unit {int(header['xyzt_units']) & 7} of length is undefined")
    found: list[tuple[str, Frame]] = []
    for field, code in (("sform", "sform_code"), ("qform", "qform_code")):
        if int(header[code]) > 0:
            found.append((f"nifti.{field}", _frame(name, header, field, millimetres)))
    if not found:
        found = [("nifti.pixdim", _frame(name, header, "base_affine", millimetres))]
    warnings: tuple[str, ...] = ()
    if len(found) == 2 and not found[0][1].same_grid(found[1][1], shape, _AGREE_VOXELS):
        text = f"WSI117 {name}: sform and qform place it differently; the sform counts"
        logger.warning(text)
        warnings = (text,)
    return found[0][1], found[0][0], warnings


def _frame(name: str, header: Any, field: str, millimetres: float) -> Frame:
    try:
        affine: NDArray[np.float64] = np.array(getattr(header, f"get_{field}")(), np.float64)
        affine[:3] *= millimetres
        return Frame.from_nifti_affine(affine)
    except Exception as error:  # nibabel has errors of its own for quaternions that are none
        raise SourceError("WSI115", f"{name}: its {field} cannot be true: {error}") from error


def _open_voxels(
    path: str, name: str, head: bytes, offset: int, stored: tuple[int, ...], dtype: np.dtype[Any]
) -> BinaryIO:
    """Return a file whose byte `offset` is the first voxel's, unpacked if need be."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (kept open)
    except OSError as error:
        raise SourceError("WSI100", f"{name}: {error.strerror or error}") from error
    try:
        if file.read(2) != _GZIP:
            available = file.seek(0, io.SEEK_END)
            check_length(name, available, offset, stored, dtype.itemsize)
            return file
        file.seek(0)
        unpacked = inflate(name, file, offset + prod(stored) * dtype.itemsize)
    except BaseException:
        file.close()
        raise
    file.close()
    return unpacked
