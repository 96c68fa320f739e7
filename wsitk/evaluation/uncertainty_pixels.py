"""Pixels that say how sure they are: a run's maps against a label image, block by block.

A map lies on the model's working grid, the truth on level-0 pixels: each true pixel takes the value of the working
pixel that its centre lies in. Values are counted at fixed levels, so that memory follows a block and not the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.evaluation.labels import Labels
from wsitk.metrics.calibration import bin_sums, equal_width_edges, log_score
from wsitk.metrics.selective import counts_at

__all__ = ["BINS", "JudgedPixels", "LEVELS", "judge_pixels"]

Array = NDArray[Any]

LEVELS = 1024
"""Levels of doubt that a pixel may have: more than 8-bit maps tell apart."""

BINS = 15
_BLOCK = 1024  # true pixels along each side that are compared at once
_KINDS = re.compile(r"entropy|mutual[ _]information|variance|uncertainty|spread", re.IGNORECASE)
_LOST = ("unreadable", "model_failed", "not_done", "absent")


@final
@dataclass
class JudgedPixels:
    """The pixels of one image, counted.

    Attributes
    ----------
    doubts : name -> float64 (2, LEVELS)
        Right and wrong pixels at each level of doubt, 0 to 1 in equal steps of the map's range.
    reliability : float64 (3, BINS)
        Items, sums of the probability of foreground, and how many are foreground.
    squares, logs : float
        Sums of squared distances from the truth, and of negative log likelihoods.
    pixels : int
    """

    doubts: dict[str, Array] = field(default_factory=dict)
    reliability: Array = field(default_factory=lambda: np.zeros((3, BINS)))
    squares: float = 0.0
    logs: float = 0.0
    pixels: int = 0


@final
@dataclass(frozen=True)
class _Maps:
    """The finest level of `maps.ome.zarr`, as 0..1, and where its pixels lie."""

    array: Any
    names: tuple[str, ...]
    windows: tuple[tuple[float, float], ...]
    scale_um: tuple[float, ...]
    translation_um: tuple[float, ...]

    @classmethod
    def open(cls, path: Path) -> _Maps:
        """Open a folder that wsitk wrote. Raises OutputError (WSI845) for another one."""
        import zarr

        try:
            group = zarr.open_group(str(path), mode="r")
            ome: Any = group.attrs["ome"]
            scale = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
            channels = ome["omero"]["channels"]
            windows = tuple((float(c["window"]["start"]), float(c["window"]["end"])) for c in channels)
            names = tuple(str(c["label"]) for c in channels)
            return cls(
                group["0"], names, windows, tuple(scale[0]["scale"][-2:]), tuple(scale[1]["translation"][-2:])
            )
        except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise OutputError(
                "WSI845", f"{path}: no maps of wsitk ({error}); run again with --overwrite, or without maps"
            ) from error

    def places(self, axis: int, start: int, stop: int, um: float) -> Array:
        """Return the working pixel of each level-0 pixel from `start` to `stop`; -1 beyond the map."""
        centre = (np.arange(start, stop) + 0.5) * um
        edge = self.translation_um[axis] - self.scale_um[axis] / 2
        # a true pixel's centre may lie on a border to the last bit
        place = np.floor((centre - edge) / self.scale_um[axis] + 1e-9).astype(np.int64)
        return np.where((place >= 0) & (place < self.array.shape[axis - 2]), place, -1)

    def read(self, rows: Array, columns: Array) -> Array:
        """Return (C, len(rows), len(columns)) as 0..1, so exact that 51 of 255 is 0.2; rows and columns ascend."""
        (y0, y1), (x0, x1) = ((int(v[0]), int(v[-1]) + 1) for v in (rows, columns))
        block = np.asarray(self.array[:, y0:y1, x0:x1])[:, rows - y0][:, :, columns - x0].astype(np.float64)
        low, high = (np.array(v, np.float64)[:, None, None] for v in zip(*self.windows, strict=True))
        return np.clip((block - low) / np.maximum(high - low, 1e-12), 0, 1)


def judge_pixels(folder: Path, truth: Labels) -> JudgedPixels | None:
    """Return the counts of one image; None where the run wrote no maps, or none of a probability.

    The probability of foreground is the first channel that is neither an uncertainty nor the density; a pixel is
    wrong where it lies on the other side of 0.5 than the truth does. Pixels of tiles that could not be read, and those
    beyond the map, are left out. Raises OutputError (WSI845) for maps that are damaged.
    """
    path = folder / "maps.ome.zarr"
    if not path.is_dir() or len(truth.shape) != 2:
        return None
    maps = _Maps.open(path)
    doubts = {k: n for k, n in enumerate(maps.names) if _KINDS.search(n)}
    first = next((k for k, n in enumerate(maps.names) if k not in doubts and n != "Density"), None)
    if first is None:
        return None
    um, lost = _level0_um(folder), _lost_boxes(folder)
    flat = truth.flat() > 0
    found = JudgedPixels({n: np.zeros((2, LEVELS)) for n in ("1 - |2p - 1|", *doubts.values())})
    for y in range(0, flat.shape[0], _BLOCK):
        for x in range(0, flat.shape[1], _BLOCK):
            piece = flat[y : y + _BLOCK, x : x + _BLOCK]
            rows = maps.places(0, y, y + piece.shape[0], um[0])
            columns = maps.places(1, x, x + piece.shape[1], um[1])
            inside = np.ix_(rows >= 0, columns >= 0)
            kept = ~_covered(lost, (y, x), piece.shape)[inside]
            if kept.any():
                values = maps.read(rows[rows >= 0], columns[columns >= 0])[:, kept]
                _count(found, piece[inside][kept], values[first], {n: values[k] for k, n in doubts.items()})
    return found


def _count(found: JudgedPixels, truth: Array, p: Array, doubts: Mapping[str, Array]) -> None:
    """Add the pixels of a block: truth and values are (N,)."""
    wrong = (p > 0.5) != truth
    for name, values in {"1 - |2p - 1|": 1 - np.abs(2 * p - 1), **doubts}.items():
        place = np.minimum((values * LEVELS).astype(np.intp), LEVELS - 1)
        found.doubts[name] += np.stack(counts_at(place, wrong, LEVELS))
    found.reliability += np.stack(bin_sums(p, truth.astype(np.float64), equal_width_edges(BINS)))
    found.squares += float(((p - truth) ** 2).sum())
    found.logs += float(log_score(p, truth).sum())
    found.pixels += len(truth)


def _level0_um(folder: Path) -> tuple[float, float]:
    """Return the size of a level-0 pixel (y, x) in the unit of the maps: 1 where the run knew none."""
    try:
        stated = json.loads((folder / "provenance.json").read_bytes())["spacing_um"]
        return (float(stated[0]), float(stated[1])) if stated else (1.0, 1.0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            "WSI845", f"{folder}: no provenance.json says what a pixel is ({error}); run again"
        ) from error


def _lost_boxes(folder: Path) -> Array:
    """Return the level-0 boxes (top, left, bottom, right) of tiles about whose pixels nothing is known."""
    import pyarrow.parquet as pq

    path = folder / "tiles.parquet"
    if not path.is_file():
        return np.zeros((0, 4), np.int64)
    names = [f"level0_{what}_{axis}" for what in ("start", "shape") for axis in "01"]
    table = pq.read_table(path, columns=["status", *names])
    bad = np.isin(np.array(table["status"].to_pylist(), dtype=str), _LOST)
    box = np.stack([table[n].to_numpy() for n in names], axis=1)[bad].astype(np.float64)
    return np.concatenate([np.floor(box[:, :2]), np.ceil(box[:, :2] + box[:, 2:])], axis=1).astype(np.int64)


def _covered(boxes: Array, start: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the part of a block that lies in any of the boxes."""
    mask = np.zeros(shape, bool)
    (y, x), (h, w) = start, shape
    near = (boxes[:, 0] < y + h) & (boxes[:, 2] > y) & (boxes[:, 1] < x + w) & (boxes[:, 3] > x)
    for top, left, bottom, right in (boxes[near] - (y, x, y, x)).tolist():
        mask[max(0, top) : bottom, max(0, left) : right] = True
    return mask
