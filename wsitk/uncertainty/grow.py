"""Labels that grow into the background, each up to its own reach: where an object's border may lie in a sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsitk.compiled import compiled

__all__ = ["grow"]


def grow(labels: NDArray[np.int32], reach: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return labels 1 .. N grown by `reach` (N,) steps along the axes, in any number of dimensions.

    A pixel goes to the label that gets there in the fewest steps, to the lowest one of several.
    """
    padded = np.pad(labels, 1, constant_values=-1)
    strides = np.array(padded.strides, np.int64) // padded.itemsize
    out = padded.ravel()
    _grow(out, np.concatenate([-strides, strides]), reach)
    grown = out.reshape(padded.shape)[(slice(1, -1),) * labels.ndim]
    return np.ascontiguousarray(grown)


@compiled
def _grow(labels: NDArray[np.int32], steps: NDArray[np.int64], reach: NDArray[np.int32]) -> None:
    """Grow flat `labels`, whose border is -1, by waves; `steps` lead to a pixel's neighbours."""
    front = np.empty(len(labels), np.int64)
    count = 0
    for place in range(len(labels)):
        if labels[place] > 0:
            for step in steps:
                if labels[place + step] == 0:
                    front[count] = place
                    count += 1
                    break
    begin, wave = 0, 1
    while begin < count:
        # what is reached in this wave is marked below -1 until all of its claims are known
        end = count
        for k in range(begin, end):
            label = labels[front[k]]
            if reach[label - 1] < wave:
                continue
            for step in steps:
                place = front[k] + step
                if labels[place] == 0:
                    labels[place] = -1 - label
                    front[count] = place
                    count += 1
                elif labels[place] < -1 and -1 - labels[place] > label:
                    labels[place] = -1 - label
        for k in range(end, count):
            labels[front[k]] = -1 - labels[front[k]]
        begin, wave = end, wave + 1
