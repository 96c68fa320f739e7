"""What a radiograph shows: a mask for each structure, as CXAS sees them, and two numbers taken from them.

Masks overlap (a lobe lies in its lung, the lung behind the heart), and live on the network's square of 512
pixels; `Anatomy.mask` brings one back to the image. The measurements are upstream's, on that square: the image
may be stretched there, which leaves ratios along one axis alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.writers.base import atomic_file

__all__ = [
    "COLUMNS",
    "Anatomy",
    "cardiothoracic_ratio",
    "nearest",
    "spine_centre_distance",
    "structure_names",
    "write_measurements",
]

Mask = NDArray[np.bool_]

COLUMNS = ("image", "cardiothoracic_ratio", "spine_centre_distance_px", "structures")
"""Columns of the table of measurements; a cell is empty where a structure was not found."""


@cache
def structure_names() -> tuple[str, ...]:
    """Return the names of the 159 structures (PAX-Ray++), in the network's order."""
    table = json.loads((files("wsitk.models.cxas") / "labels.json").read_text("utf-8"))["label_dict"]
    return tuple(table[str(k)] for k in range(len(table)))


@cache
def _index(name: str) -> int:
    return structure_names().index(name)


@cache
def _vertebrae() -> tuple[int, ...]:
    return tuple(k for k, name in enumerate(structure_names()) if name.startswith("vertebrae "))


def nearest(image: NDArray[np.generic], shape: tuple[int, int]) -> NDArray[np.generic]:
    """Return the last two axes of `image` at another size: pixel i is the old ``floor(i * old / new)``.

    The ratio is rounded to float32 before it is multiplied, as torch does: it decides a few pixels.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)), old - 1).astype(int)
        for old, new in zip(image.shape[-2:], shape, strict=True)
    )
    return image[..., rows[:, None], columns[None, :]]


@dataclass(frozen=True)
class Anatomy:
    """The structures of one radiograph.

    Attributes
    ----------
    masks : bool (159, 512, 512)
        In the order of `structure_names`, on the network's grid.
    shape
        Height and width of the image.
    """

    masks: Mask
    shape: tuple[int, int]

    def mask(self, name: str) -> Mask:
        """Return where a structure is, at the image's own size; raises ModelError (WSI351) for an unknown one."""
        if name not in structure_names():
            raise ModelError(
                "WSI351",
                f"CXAS knows no structure {name!r}; wsitk.models.cxas.anatomy.structure_names() lists all 159",
            )
        return np.asarray(nearest(self.masks[_index(name)], self.shape), np.bool_)

    def areas(self) -> dict[str, int]:
        """Return the pixels of each structure on the network's grid."""
        counts = self.masks.sum(axis=(1, 2)).tolist()
        return dict(zip(structure_names(), counts, strict=True))

    def measurements(self) -> dict[str, float]:
        """Return the numbers of `COLUMNS`; nan for what can't be measured."""
        return {
            "cardiothoracic_ratio": cardiothoracic_ratio(self.masks),
            "spine_centre_distance_px": spine_centre_distance(self.masks),
            "structures": float(self.masks.any(axis=(1, 2)).sum()),
        }


def cardiothoracic_ratio(masks: Mask) -> float:
    """Return the width of the heart over that of the chest, from masks (159, H, W).

    The heart's width is its farthest reach to the left and to the right of the midline, each in a row of its
    own; the chest's is the widest row of the lungs. The midline is the column next to the middle that the right
    hemidiaphragm reaches. Above 0.5 in an upright frontal image is the usual sign of a large heart (Danzer 1919).

    nan where one of the three is missing (upstream says -1, which averages into something), or the lungs have no
    width.
    """
    lung, heart, diaphragm = (masks[_index(n)] for n in ("lung", "heart", "right hemidiaphragm"))
    if not (lung.any() and heart.any() and diaphragm.any()):
        return nan
    midline = int(np.flatnonzero(diaphragm.any(axis=0))[-1])
    columns = np.flatnonzero(heart.any(axis=0))
    reach = max(0, midline - int(columns[0])) + max(0, int(columns[-1]) - midline)
    low, high = _row_ends(lung)
    width = int((high - low).max())
    return reach / width if width else nan


def _row_ends(mask: Mask) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first and last column of every row that has any."""
    rows = mask[mask.any(axis=1)]
    return rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)


def spine_centre_distance(masks: Mask) -> float:
    """Return the mean distance of the vertebrae from a straight line through them, in pixels of the grid.

    Centres are means of pixels, cut to whole numbers; the line is x regressed on y (least squares), also cut to a
    whole column in each row, and a distance is that to the nearest such pixel. Large values mean a bent spine.
    nan where there is no vertebra.
    """
    centres = [_centre(masks[k]) for k in _vertebrae() if masks[k].any()]
    # upstream drops centres on the image's edge, which come from slivers of masks
    kept = np.array([c for c in centres if min(c) > 0], np.float64).reshape(-1, 2)
    if not len(kept):
        return nan
    rows = np.arange(masks.shape[1], dtype=np.float64)
    line = np.stack([np.trunc(_regressed(kept, rows)), rows], axis=1)
    apart = np.linalg.norm(kept[:, None] - line[None], axis=2)
    return float(apart.min(axis=1).mean())


def _centre(mask: Mask) -> tuple[int, int]:
    """Return (x, y) of a mask's centre, cut to whole pixels."""
    y, x = np.nonzero(mask)
    return int(x.mean()), int(y.mean())


def _regressed(centres_xy: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x for each of `rows`; vertebrae that are all in one row lie on a column, at their mean."""
    x, y = centres_xy[:, 0], centres_xy[:, 1]
    spread = y - y.mean()
    square = float(spread @ spread)
    slope = float(spread @ (x - x.mean())) / square if square else 0.0
    return np.asarray(x.mean() + slope * (rows - y.mean()))


def write_measurements(
    path: str | Path, found: Iterable[tuple[str, Mapping[str, float]]], *, overwrite: bool = False
) -> None:
    """Write a CSV of `COLUMNS`, a row for each image's name and measurements; empty where there is no number.

    Raises OutputError as `atomic_file` does.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, values in found:
        table.writerow([name, *(_cell(values[column]) for column in COLUMNS[1:])])
    with atomic_file(Path(path), overwrite=overwrite) as file:
        file.write(text.getvalue().encode())


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6g}"
