"""`labels.nii.gz`: labels on the input's own grid and affine, streamed slab by slab."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wsitk.errors import OutputError
from wsitk.frame import Frame
from wsitk.writers.base import atomic_file
from wsitk.writers.gz import GzipStream
from wsitk.writers.labels import LabelClass, ReadLabels, check_classes, label_dtype, read_checked, slabs

__all__ = ["write_nifti"]

_SLAB_BYTES = 64 << 20
_SLAB_SLICES = 64
_LONGEST_1 = 32_767  # NIfTI-1 counts voxels in 16 signed bits
_SCANNER = 1
_LABEL_INTENT = 1002
_MILLIMETRES = 2


def write_nifti(
    path: str | Path,
    shape: tuple[int, ...],
    frame: Frame,
    classes: Sequence[LabelClass],
    read: ReadLabels,
    *,
    depth: int | None = None,
    threads: int = 2,
    overwrite: bool = False,
) -> None:
    """Write the labels of a volume of `shape` (z, y, x) as NIfTI, gzipped if `path` ends in ``.gz``.

    The sform is the input's affine, in float32 as the format has it; the qform too, unless the axes are not at
    right angles, which it cannot say. Voxels have the smallest unsigned type that holds the classes. `read`
    is called for slabs of whole slices, `depth` of them (default: up to 64, or 64 MiB); nothing more is in
    memory. The bytes depend on neither `depth` nor `threads`.

    Raises OutputError: WSI510 to WSI512 as `atomic_file`, WSI513 for bad labels, WSI514 for classes that
    contradict each other, WSI530 where nibabel is missing.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise OutputError("WSI514", f"labels of shape {shape}; wanted a volume (z, y, x)")
    largest = check_classes(classes)[-1].value
    dtype = label_dtype(largest)
    head = _header(shape, frame, dtype)
    slab = depth or max(1, min(_SLAB_SLICES, _SLAB_BYTES // (prod(shape[1:]) * dtype.itemsize)))
    with atomic_file(path, overwrite=overwrite) as stream:
        if str(path).endswith(".gz"):
            with GzipStream(stream, threads=threads) as packed:
                _stream(packed, head, shape, read, largest, slab)
        else:
            _stream(stream, head, shape, read, largest, slab)


def _stream(
    stream: GzipStream | BinaryIO,
    head: bytes,
    shape: tuple[int, ...],
    read: ReadLabels,
    largest: int,
    slab: int,
) -> None:
    """Write header and voxels: x runs fastest in NIfTI, which is C order of (z, y, x)."""
    stream.write(head)
    for region in slabs(shape, slab):
        labels = read_checked(read, region, largest)
        stream.write(labels.astype(labels.dtype.newbyteorder("<"), order="C", copy=False).tobytes())


def _header(shape: tuple[int, ...], frame: Frame, dtype: np.dtype[Any]) -> bytes:
    """Return everything before the voxels, little-endian."""
    try:
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header
    except ImportError as error:
        raise OutputError("WSI530", "writing NIfTI needs nibabel: pip install 'wsitk[volumes]'") from error
    kind: Any = Nifti1Header if max(shape) <= _LONGEST_1 else Nifti2Header
    header = kind(endianness="<")
    header.set_data_dtype(dtype.newbyteorder("<"))
    header.set_data_shape(shape[::-1])
    affine = frame.to_nifti_affine()
    upright = frame.is_rectangular
    if upright:
        header.set_qform(affine, code=_SCANNER)
    # after the qform, whose voxel sizes it agrees with; a sheared grid has the sform alone
    header.set_sform(affine, code=_SCANNER)
    header["pixdim"][1:4] = frame.spacing_mm[::-1]
    header["xyzt_units"] = _MILLIMETRES
    header["intent_code"] = _LABEL_INTENT
    header["magic"] = b"n+1" if kind is Nifti1Header else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    raw = bytes(header.binaryblock)
    return raw + bytes(int(header.single_vox_offset) - len(raw))
