"""Labelled MR volumes to train on and to be judged by: images and labels in two folders, one file name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.models.hippocampus.network import NORMALISE
from wsitk.sources import open_source
from wsitk.volumes.nnunet_rules import Moments

__all__ = ["Case", "find_cases", "read_case"]

FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
"""The two that belong together; the second pair is that of the Medical Segmentation Decathlon."""


@dataclass(frozen=True)
class Case:
    """One volume: `image` float32, normalised, and `labels` uint8 (0, 1 anterior, 2 posterior), both (z, y, x)."""

    name: str
    image: NDArray[np.float32]
    labels: NDArray[np.uint8]


def find_cases(folder: Path) -> tuple[tuple[Path, Path], ...]:
    """Return the pairs of image and labels below `folder`, in the order of their names.

    Raises UsageError WSI885 if there are none, or an image has no labels.
    """
    for images, labels in FOLDERS:
        paths = sorted(p for p in (folder / images).glob("*.nii*") if not p.name.startswith("."))
        pairs = tuple((p, folder / labels / p.name) for p in paths)
        missing = next((b for _, b in pairs if not b.is_file()), None)
        if missing is not None:
            raise UsageError("WSI885", f"{missing} is not there; every image needs labels of the same name")
        if pairs:
            return pairs
    raise UsageError(
        "WSI885", f"no NIfTI files in {folder}/images or {folder}/imagesTr; name a folder of cases"
    )


def read_case(image: Path, labels: Path) -> Case:
    """Read a pair. Raises UsageError WSI885 unless labels are 0, 1, 2 and of the image's shape, and SourceError."""
    pixels, truth = _read(image).astype(np.float32), _read(labels)
    if pixels.shape != truth.shape or not np.isin(truth, (0, 1, 2)).all():
        raise UsageError(
            "WSI885",
            f"{labels.name}: {truth.shape} with values up to {truth.max()}, wanted 0, 1, 2 over {pixels.shape}",
        )
    name = image.name.partition(".")[0]
    return Case(name, NORMALISE.numbers(Moments.of(pixels))(pixels), truth.astype(np.uint8))


def _read(path: Path) -> NDArray[Any]:
    source = open_source(path)
    try:
        return source.read(source.bounds)
    finally:
        source.close()
