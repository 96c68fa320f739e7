"""PanNuke as it is published: three folds of arrays, mapped into memory and read image by image.

Gamper et al. 2020, "PanNuke dataset extension, insights and baselines". The data are CC BY-NC-SA 4.0: what
is trained on them must not be sold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.models.cellvit.training.data import Dataset, Example, Types

__all__ = ["PANNUKE_CLASSES", "PanNuke", "fold_folders", "is_prepared_by_cellvit", "refuse_prepared"]

PANNUKE_CLASSES = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
"""In the order of the mask's channels; the sixth channel is background."""

SPACING_UM = 0.25

Array = NDArray[Any]


@dataclass(frozen=True)
class _Fold:
    number: int
    images: Path
    masks: Path
    types: Path


@final
class PanNuke(Dataset):
    """The official arrays: ``images.npy`` (N, 256, 256, 3), ``masks.npy`` (N, 256, 256, 6), ``types.npy`` (N,).

    Where they lie below `folder` does not matter as long as each fold has a folder of its number: the
    archives' own ``Fold 1/images/fold1`` and ``Fold 1/masks/fold1``, or all three files in ``fold1``.

    Parameters
    ----------
    folds
        Those to use, by default all that are there.

    Raises
    ------
    UsageError
        WSI906 if there are no folds, WSI913 if one that was asked for is missing.
    SourceError
        WSI914 for an array of another shape or type. Nothing is ever unpickled.
    """

    def __init__(self, folder: Path, folds: Sequence[int] | None = None) -> None:
        found = fold_folders(folder)
        if not found:
            refuse_prepared(folder)
            raise UsageError("WSI906", f"{folder} holds no PanNuke folds (images.npy, masks.npy, types.npy)")
        chosen = sorted(found) if folds is None else list(folds)
        missing = [n for n in chosen if n not in found]
        if missing:
            have = ", ".join(map(str, sorted(found)))
            raise UsageError("WSI913", f"{folder} has no fold {missing[0]}; it has {have}")
        self.name, self.classes = folder.name, PANNUKE_CLASSES
        self._folds = [found[n] for n in chosen]
        self._open()
        names = [_load(fold.types) for fold in self._folds]
        self._check(names)
        self._tissues = tuple(str(t) for each in names for t in each)
        self._first = np.cumsum([0, *map(len, names)])
        self._groups = tuple(f"fold{f.number}" for f, n in zip(self._folds, names, strict=True) for _ in n)

    def _open(self) -> None:
        self._images = [_load(fold.images) for fold in self._folds]
        self._masks = [_load(fold.masks) for fold in self._folds]

    def _check(self, names: list[Array]) -> None:
        for fold, images, masks, types in zip(self._folds, self._images, self._masks, names, strict=True):
            count = len(images)
            right = images.ndim == masks.ndim == 4 and images.shape[3] == 3 and masks.shape[3] == 6
            if not right or masks.shape[:3] != images.shape[:3] or types.shape != (count,):
                raise SourceError(
                    "WSI914",
                    f"fold {fold.number}: images {images.shape}, masks {masks.shape}, types {types.shape}; wanted "
                    "(N, H, W, 3), (N, H, W, 6) and (N,): download it again",
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: pickled, they would be copies of the data."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_images", "_masks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def tissues(self) -> tuple[str, ...]:
        return self._tissues

    @property
    def groups(self) -> tuple[str, ...]:
        return self._groups

    def identity(self) -> dict[str, Any]:
        sizes = [[f.number, f.images.stat().st_size, f.masks.stat().st_size] for f in self._folds]
        return {"pannuke": sizes, "tissues": sorted(set(self._tissues))}

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        fold = int(np.searchsorted(self._first, index, side="right")) - 1
        return fold, index - int(self._first[fold])

    def read(self, index: int) -> Example:
        fold, own = self._place(index)
        inst, types = from_channels(self._masks[fold][own])
        return Example(
            image=np.ascontiguousarray(self._images[fold][own]).astype(np.uint8),
            inst=inst,
            types=types,
            spacing_um=SPACING_UM,
            tissue=self._tissues[index],
            group=self._groups[index],
        )

    def count(self, index: int) -> NDArray[np.int64]:
        fold, own = self._place(index)
        channels = self._masks[fold][own][..., : len(self.classes)]
        values = [np.unique(channels[..., k]) for k in range(channels.shape[2])]
        return np.array([np.count_nonzero(v) for v in values], np.int64)


def from_channels(mask: Array) -> tuple[NDArray[np.int32], Types]:
    """Return instances 1 to N and types from a mask (H, W, 6) with the instances of class k in channel k - 1.

    Where two channels claim a pixel, the later one has it.
    """
    inst = np.zeros(mask.shape[:2], np.int32)
    types = np.zeros(mask.shape[:2], np.uint8)
    used = 0
    for channel in range(len(PANNUKE_CLASSES)):
        values, place = np.unique(mask[..., channel], return_inverse=True)
        number = np.where(values > 0, used + np.cumsum(values > 0), 0)[place].reshape(inst.shape)
        inside = number > 0
        inst[inside], types[inside] = number[inside], channel + 1
        used = max(used, int(number.max(initial=0)))
    return inst, types


def fold_folders(folder: Path) -> dict[int, _Fold]:
    """Return the folds below a folder by number, wherever the archives put their arrays."""
    found: dict[int, dict[str, Path]] = {}
    for name in ("images", "masks", "types"):
        for path in sorted(folder.glob("**/" + f"{name}.npy")):
            number = re.findall(r"fold[\s_-]*(\d+)", str(path.relative_to(folder)).lower())
            if number:
                found.setdefault(int(number[-1]), {}).setdefault(name, path)
    return {n: _Fold(n, **paths) for n, paths in sorted(found.items()) if len(paths) == 3}


def is_prepared_by_cellvit(folder: Path) -> bool:
    """Tell whether a folder holds what CellViT's own preparation makes: ``fold0/images``, ``fold0/labels``."""
    return any((fold / "labels").is_dir() and (fold / "images").is_dir() for fold in folder.glob("fold*"))


def refuse_prepared(folder: Path) -> None:
    """Raise UsageError (WSI915) for a folder in CellViT's prepared layout, whose labels run code when read."""
    if is_prepared_by_cellvit(folder):
        raise UsageError(
            "WSI915",
            f"{folder} is PanNuke as CellViT prepares it; its labels are pickled Python objects, which can run "
            "any code and are never opened here; give the folder of the official fold1..3 (images.npy, masks.npy, "
            "types.npy), which needs no preparation",
        )


def _load(path: Path) -> Array:
    """Return an array mapped into memory. Raises SourceError WSI914."""
    try:
        return cast(Array, np.load(path, allow_pickle=False, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise SourceError("WSI914", f"{path.name} of {path.parent.name} cannot be read: {error}") from error
