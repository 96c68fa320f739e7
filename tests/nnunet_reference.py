"""nnU-Net's prediction, naively: whole volumes in memory, one tile after the other, every class at once.

The slow oracle that the engine is compared with. It checks itself against vectors recorded from nnU-Net 1.7.1
(tests/test_nnunet_rules.py), and shares nothing with the engine but `wsitk.volumes.nnunet_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.volumes.nnunet_rules import Resampling, gaussian, tile_starts

__all__ = ["pad", "predict", "resample", "sliding_mean"]

Floats = NDArray[np.float32]
Network = Callable[[Tensor], Tensor]


def predict(
    network: Network,
    volume: Floats,
    patch: Sequence[int],
    *,
    step: float = 0.5,
    mirror: Sequence[int] = (),
    weighted: bool = True,
    softmax: bool = True,
) -> tuple[NDArray[np.int64], Floats]:
    """Return labels (Z, Y, X) and scores (K, Z, Y, X) of a normalised volume (C, Z, Y, X).

    Every tile is predicted under all flips of the axes `mirror` (0 is z), turned back and averaged: as
    probabilities with `softmax` (version 1), otherwise as logits (version 2).
    """

    def one(tile: Floats) -> Floats:
        with torch.inference_mode():
            x = torch.from_numpy(tile[None])
            views = list(chain.from_iterable(combinations(mirror, n) for n in range(len(mirror) + 1)))
            total: Tensor | None = None
            for view in views:
                axes = tuple(a + 2 for a in view)
                scores = network(x.flip(axes))
                scores = (scores.softmax(1) if softmax else scores).flip(axes) / len(views)
                total = scores if total is None else total + scores
            assert total is not None
            return total[0].numpy()

    scores = sliding_mean(one, volume, patch, step=step, weighted=weighted)
    return scores.argmax(0), scores


def sliding_mean(
    one: Callable[[Floats], Floats],
    volume: Floats,
    patch: Sequence[int],
    *,
    step: float = 0.5,
    weighted: bool = True,
) -> Floats:
    """Return the weighted mean of the tiles' answers; `one` maps a tile (C, *patch) to (K, *patch)."""
    padded, inner = pad(volume, patch)
    window = gaussian(patch) if weighted else np.ones(tuple(patch), np.float32)
    total: Floats | None = None
    weight = np.zeros(padded.shape[1:], np.float32)
    for start in product(*tile_starts(padded.shape[1:], patch, step)):
        place = tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))
        scores = one(np.ascontiguousarray(padded[(slice(None), *place)]))
        if total is None:
            total = np.zeros((len(scores), *padded.shape[1:]), np.float32)
        total[(slice(None), *place)] += scores * window
        weight[place] += window
    assert total is not None
    mean: Floats = (total / weight)[(slice(None), *inner)]
    return mean


def pad(volume: Floats, patch: Sequence[int]) -> tuple[Floats, tuple[slice, ...]]:
    """Return the volume with zeros around it, at least as large as the patch, and where it lies in there."""
    widths, inner = [(0, 0)], []
    for size, wanted in zip(volume.shape[1:], patch, strict=True):
        missing = max(0, wanted - size)
        before = missing // 2
        widths.append((before, missing - before))
        inner.append(slice(before, before + size))
    return np.pad(volume, widths), tuple(inner)


def resample(volume: NDArray[np.floating], rule: Resampling) -> Floats:
    """Return a volume (C, Z, Y, X) of another shape, as nnU-Net does with skimage and SciPy."""
    from scipy.ndimage import map_coordinates
    from skimage.transform import resize

    if volume.shape[1:] == rule.shape:
        return volume.astype(np.float32)
    double = volume.astype(np.float64)
    if rule.axis is None:
        whole = [resize(v, rule.shape, rule.order, mode="edge", anti_aliasing=False) for v in double]
        return np.stack(whole).astype(np.float32)
    out = []
    plane = tuple(n for a, n in enumerate(rule.shape) if a != rule.axis)
    for channel in double:
        slices = np.moveaxis(channel, rule.axis, 0)
        done = np.stack([resize(s, plane, rule.order, mode="edge", anti_aliasing=False) for s in slices])
        done = np.moveaxis(done, 0, rule.axis)
        if done.shape != rule.shape:
            scale = [old / new for old, new in zip(done.shape, rule.shape, strict=True)]
            axes = [s * (np.arange(n) + 0.5) - 0.5 for s, n in zip(scale, rule.shape, strict=True)]
            places = np.array(np.meshgrid(*axes, indexing="ij"))
            done = map_coordinates(done, places, order=rule.axis_order, mode="nearest")
        out.append(done)
    return np.stack(out).astype(np.float32)
