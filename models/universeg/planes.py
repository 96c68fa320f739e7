"""Files of examples as planes: PNG, TIFF and whatever else wsitk opens, volumes, and NumPy's own files."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.files import MAX_WHOLE_BYTES

__all__ = ["Planes", "bare_name", "is_picture", "open_planes"]

Role = Literal["image", "mask"]

ENDINGS = (
    *(".png", ".tif", ".tiff", ".jpg", ".jpeg", ".jp2"),
    *(".npz", ".npy", ".nii", ".nii.gz", ".nrrd", ".nhdr", ".dcm"),
)
LOSSY = (".jpg", ".jpeg")


class Planes(ABC):
    """Images of one shape, one behind the other: `shape` is (planes, H, W); `colour` means RGB."""

    name: str
    shape: tuple[int, int, int]
    colour: bool

    @abstractmethod
    def read(self, plane: int) -> NDArray[Any]:
        """Return one plane, (H, W) or (H, W, 3), in the file's type."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_picture(path: Path) -> bool:
    """Return whether a file's name is that of an image; hidden files are not."""
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def bare_name(path: Path) -> str:
    """Return a file's name without its ending."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def open_planes(path: Path, role: Role) -> Planes:
    """Open an image or a mask. Raises SourceError, and UsageError (WSI072) for what can't be an example."""
    if path.suffix.lower() in (".npz", ".npy"):
        return _Arrays(path, role)
    if role == "mask" and path.suffix.lower() in LOSSY:
        raise UsageError(
            "WSI072", f"{path.name}: JPEG changes the values of a mask; draw it again and save it as PNG"
        )
    return _Opened(path)


def _check(name: str, nbytes: int) -> None:
    if nbytes > MAX_WHOLE_BYTES:
        raise UsageError(
            "WSI072",
            f"{name}: one plane of {nbytes >> 20} MiB is too large for an example, limit "
            f"{MAX_WHOLE_BYTES >> 20}; cut out what shows the task",
        )


@final
class _Opened(Planes):
    """An input of wsitk: flat, or a volume whose first axis counts the planes."""

    def __init__(self, path: Path) -> None:
        source = open_source(path)
        self.name = source.name
        channels = max(1, len(source.channel_names)) if "c" in source.axes else 1
        if channels not in (1, 3):
            source.close()
            raise UsageError("WSI072", f"{path.name} has {channels} channels; wanted grey or RGB")
        shape = source.shape if source.ndim == 3 else (1, *source.shape)
        self.shape, self.colour = (int(shape[0]), int(shape[1]), int(shape[2])), channels == 3
        self._source = source
        _check(self.name, prod(shape[1:]) * channels * source.dtype.itemsize)

    def read(self, plane: int) -> NDArray[Any]:
        flat = (self.shape[1], self.shape[2])
        volume = self._source.ndim == 3
        region = Region((plane, 0, 0), (1, *flat)) if volume else Region((0, 0), flat)
        pixels = self._source.read(region)
        return pixels.reshape((*flat, 3) if self.colour else flat)

    def close(self) -> None:
        self._source.close()


@final
class _Arrays(Planes):
    """A ``.npy``, or the array of a ``.npz`` that is called after its role, or its only one."""

    def __init__(self, path: Path, role: Role) -> None:
        self.name = path.name
        values = _load(path, role)
        self.colour = role == "image" and values.ndim in (3, 4) and values.shape[-1] == 3
        if values.ndim - self.colour == 2:
            values = values[None]
        if values.ndim - self.colour != 3 or not values.size or values.dtype.kind not in "uifb":
            raise UsageError(
                "WSI072", f"{path.name}: {role} of shape {values.shape} {values.dtype}; wanted numbers (H, W)"
            )
        self.shape = (int(values.shape[0]), int(values.shape[1]), int(values.shape[2]))
        self._values = values

    def read(self, plane: int) -> NDArray[Any]:
        values: NDArray[Any] = self._values[plane]
        return values

    def close(self) -> None:
        """Nothing is held open."""


def _load(path: Path, role: Role) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                # what it unpacks to, before it does
                _check(path.name, sum(entry.file_size for entry in archive.infolist()))
        # a .npy is mapped: it may claim more than it holds
        loaded = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = {"image": ("image", "img"), "mask": ("mask", "label", "labels")}[role]
            name = next((n for n in names if n in loaded), None)
            if name is None and len(loaded.files) == 1:
                name = loaded.files[0]
            if name is None:
                held = ", ".join(loaded.files[:6])
                raise UsageError("WSI072", f"{path.name} holds {held}; wanted an array {names[0]!r}")
            array: NDArray[Any] = loaded[name]
            return array
    except UsageError:
        raise
    except Exception as error:  # damaged headers make NumPy raise a dozen kinds
        odd = "pickle" in str(error).lower() or "Python objects" in str(error)
        hint = "pickled objects are never opened" if odd else str(error).partition("\n")[0]
        raise SourceError("WSI101", f"{path.name}: no NumPy array: {hint}") from error
