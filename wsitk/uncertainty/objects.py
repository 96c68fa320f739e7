"""What the samples say of each object: how much they disagree, whether it is there, and how large it is.

The objects are those of the mean answer. Of the samples themselves only votes are kept, one bit for each pixel and
sample (foreground or not), so that memory grows by an eighth of a byte per pixel with each of them, and no sample is
computed twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.objects import ObjectTable
from wsitk.uncertainty.grow import grow

__all__ = ["INTERVAL", "OBJECT_COLUMNS", "object_columns"]

Array = NDArray[Any]

OBJECT_COLUMNS = ("mutual_information", "class_entropy", "existence", "area_low_um2", "area_high_um2")

INTERVAL = (0.05, 0.95)
"""The quantiles over samples between which an area is said to lie."""


def object_columns(
    table: ObjectTable, tile: Tile, mutual: Array, probabilities: Array, votes: Array, samples: int
) -> dict[str, Array]:
    """Return `OBJECT_COLUMNS` of a tile's objects, which must not overlap: each float32 (N,).

    `mutual` is the mutual information (*tile), `probabilities` (C, *tile) the mean answer's, `votes` uint8
    (ceil(samples / 8), *tile) whether a sample calls a pixel foreground, the first sample in the highest bit.

    - ``mutual_information``: the mean over the object;
    - ``class_entropy``: of the object's mean distribution over classes, background included, in units of log C;
    - ``existence``: share of samples in which more than half of the object is foreground;
    - ``area_low_um2``, ``area_high_um2``: quantiles (`INTERVAL`) over samples of the foreground's area in the object
      and around it, as far as half its radius and no nearer to another one. In pixels; the engine knows how large
      these are.
    """
    count = len(table)
    labels = _painted(table, tile)
    radius = np.sqrt(table.size / np.pi) if table.ndim == 2 else np.cbrt(table.size * (0.75 / np.pi))
    around = grow(labels, np.ceil(radius / 2).astype(np.int32)).ravel()
    flat, inside = labels.ravel(), np.flatnonzero(labels)
    owner = flat[inside] - 1
    size = np.maximum(np.bincount(owner, minlength=count), 1)

    def mean(values: Array) -> Array:
        # float64 in raster order: an object's mean has the same bits in every tile that shows it whole
        return np.asarray(np.bincount(owner, values.ravel()[inside], minlength=count) / size)

    each = np.stack([mean(channel) for channel in probabilities])
    shares, areas = _votes(around, flat, votes.reshape(len(votes), -1), samples, count)
    low, high = np.quantile(areas, INTERVAL, axis=0)
    columns = {
        "mutual_information": mean(mutual),
        "class_entropy": _entropy(each),
        "existence": (shares > size / 2).mean(axis=0),
        "area_low_um2": low,
        "area_high_um2": high,
    }
    return {name: columns[name].astype(np.float32) for name in OBJECT_COLUMNS}


def _painted(table: ObjectTable, tile: Tile) -> NDArray[np.int32]:
    """Return the read window with object k as label k + 1."""
    labels = np.zeros(tile.read.shape, np.int32)
    for row in range(len(table)):
        labels[table.region(row).slices(tile.read.start)][table.mask(row)] = row + 1
    return labels


def _votes(around: Array, inside: Array, votes: Array, samples: int, count: int) -> tuple[Array, Array]:
    """Return how many pixels of each object, and in and around it, are foreground: (samples, N) each."""
    place = np.flatnonzero(around)
    wide, own = around[place] - 1, inside[place] > 0
    shares, areas = np.empty((samples, count)), np.empty((samples, count))
    for sample in range(samples):
        byte = votes[sample // 8, place]
        seen = (byte >> (7 - sample % 8)) & 1 == 1
        areas[sample] = np.bincount(wide[seen], minlength=count)
        shares[sample] = np.bincount(wide[seen & own], minlength=count)
    return shares, areas


def _entropy(each: Array) -> Array:
    """Return the entropy (N,) of distributions (C, N), in units of log C."""
    logs = np.log(each, out=np.zeros_like(each), where=each > 0)
    return np.asarray(np.clip(-(each * logs).sum(axis=0) / np.log(len(each)), 0, 1))
