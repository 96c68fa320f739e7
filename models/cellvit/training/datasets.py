"""From a folder to a set of training images, whichever layout it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.annotations import REGIONS
from wsitk.models.cellvit.training.data import Dataset
from wsitk.models.cellvit.training.pannuke import PanNuke, fold_folders, refuse_prepared
from wsitk.models.cellvit.training.patches import Patches, patch_folders, write_patches
from wsitk.models.cellvit.training.slides import Slides, slide_pairs

__all__ = ["PanNuke", "Patches", "Slides", "open_dataset", "write_patches"]


def open_dataset(
    path: str | os.PathLike[str],
    *,
    spacing_um: float = 0.25,
    side: int = 256,
    mpp: float | None = None,
    folds: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    regions: Sequence[str] = REGIONS,
) -> Dataset:
    """Return the training images of a folder: PanNuke's folds, images with masks, or slides with GeoJSON.

    Parameters
    ----------
    spacing_um, side
        Of the crops that slides are cut into: the network's. Other layouts keep their own size.
    mpp
        Pixel size of images or slides that state none.
    folds
        PanNuke: those to use.
    classes, regions
        Slides: names of the types, and patterns of the class names of completely labelled areas.

    Raises UsageError (WSI906) with what each layout would want, and what the layout itself raises.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError("WSI906", f"{folder} is no folder; give a folder of training images")
    refuse_prepared(folder)
    if patch_folders(folder) is not None:
        return Patches(folder, spacing_um=mpp)
    if slide_pairs(folder):
        return Slides(folder, spacing_um=spacing_um, side=side, classes=classes, regions=regions, mpp=mpp)
    if fold_folders(folder):
        return PanNuke(folder, folds)
    raise UsageError(
        "WSI906",
        f"{folder} is no training set; wanted PanNuke's fold1/ with images.npy, masks.npy, types.npy; or images/ "
        "and masks/ with files of the same names; or slides with NAME.geojson beside each NAME.svs",
    )
