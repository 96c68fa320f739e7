"""Instance masks from the files that labs keep them in. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Labels, Types

__all__ = ["ENDINGS", "read_mask"]

Array = NDArray[Any]

_INST = ("inst", "inst_map", "instances", "labels")
_TYPES = ("types", "type_map", "type", "inst_type")


def read_mask(path: Path) -> tuple[Labels, Types | None]:
    """Return instances, int32 (H, W), and types, uint8 (H, W) or None, of a mask file.

    Raises SourceError WSI918 for what is no mask of whole numbers.
    """
    try:
        inst, types = _READERS[path.suffix.lower()](path)
        return _instances(inst), None if types is None else _types(np.asarray(types), np.asarray(inst))
    except SourceError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        hint = "pickled Python objects are never opened" if "pickle" in str(error).lower() else str(error)
        raise SourceError("WSI918", f"{path.name} is no instance mask: {hint}") from error


def _instances(values: Array) -> Labels:
    """Return int32 labels: whole numbers from -1, up to what an int32 holds."""
    if values.ndim != 2:
        raise ValueError(
            f"shape {values.shape}, wanted (H, W) or two channels; colours are no instance numbers"
        )
    return _whole(values, UNLABELLED, 2**31 - 1).astype(np.int32)


def _whole(values: Array, low: int, high: int) -> Array:
    if values.dtype.kind not in "iufb" or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        raise ValueError(f"{values.dtype} values that are no whole numbers")
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"values from {values.min()} to {values.max()}, wanted {low} to {high}")
    return values


def _types(values: Array, inst: Array) -> Types:
    """Return a type for each pixel, from one for each pixel or one for each nucleus in ascending order."""
    if values.shape == inst.shape:
        return _whole(values, 0, IGNORE).astype(np.uint8)
    each = _whole(values.ravel(), 0, IGNORE).astype(np.uint8)
    numbers = np.unique(inst[inst > 0])
    table = np.zeros(int(inst.max(initial=0)) + 1, np.uint8)
    if len(each) == len(numbers):
        table[numbers.astype(np.int64)] = each
    elif len(each) == len(table) - 1:
        table[1:] = each
    else:
        raise ValueError(f"{len(each)} types for {len(numbers)} nuclei")
    return table[np.maximum(inst, 0).astype(np.int64)]


def _split(values: Array) -> tuple[Array, Array | None]:
    """Return instances and types from (H, W), (H, W, 2) or (2, H, W)."""
    if values.ndim == 3 and values.shape[2] == 2:
        return values[..., 0], values[..., 1]
    if values.ndim == 3 and values.shape[0] == 2:
        return values[0], values[1]
    return values, None


def _from_table(table: Mapping[str, Any]) -> tuple[Array, Array | None]:
    inst = next((table[k] for k in _INST if k in table), None)
    if inst is None:
        raise KeyError(f"no array called {' or '.join(_INST)}")
    return np.asarray(inst), next((np.asarray(table[k]) for k in _TYPES if k in table), None)


def _npz(path: Path) -> tuple[Array, Array | None]:
    with np.load(path, allow_pickle=False) as stored:
        return _from_table(stored)


def _npy(path: Path) -> tuple[Array, Array | None]:
    return _split(np.load(path, allow_pickle=False))


def _mat(path: Path) -> tuple[Array, Array | None]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return _from_table(loadmat(path, variable_names=[*_INST, *_TYPES]))
    except (MatReadError, TypeError) as error:  # scipy's reader trips over damage in both ways
        raise ValueError(str(error)) from error


def _tif(path: Path) -> tuple[Array, Array | None]:
    import tifffile

    try:
        return _split(np.asarray(tifffile.imread(path)))
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error


def _png(path: Path) -> tuple[Array, Array | None]:
    import cv2

    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("it cannot be decoded")
    return _split(np.asarray(values))


_READERS = {".npz": _npz, ".npy": _npy, ".mat": _mat, ".tif": _tif, ".tiff": _tif, ".png": _png}
ENDINGS = tuple(_READERS)
