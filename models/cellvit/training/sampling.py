"""Which images a step sees: drawn by their cells and tissue, from a counter instead of a state.

Rare classes and tissues are drawn more often (Hörst et al. 2024, section 3.3). Sample n of a run is a pure
function of the seed and n: a resumed run draws what the unbroken one would have, and so do two processes that
share the work of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError

__all__ = ["PANNUKE_IMAGES_WITH", "cell_weights", "tissue_weights", "cell_tissue_weights", "Sampler"]

Float = NDArray[np.float64]

PANNUKE_IMAGES_WITH = (4191, 4132, 6140, 232, 1528)
"""The fixed numbers of images with each class that the published models were trained with."""


def _rarity(counts: NDArray[Any], gamma: float) -> Float:
    """Return k / (gamma n + (1 - gamma) k), k the sum of the counts n: 1 for gamma 0, k / n for gamma 1."""
    if not 0 <= gamma <= 1:
        raise UsageError("WSI902", f"gamma is {gamma}, wanted 0 (as they come) to 1 (all equally often)")
    total = float(counts.sum())
    return np.asarray(total / np.maximum(gamma * counts + (1 - gamma) * total, 1e-12), np.float64)


def tissue_weights(tissues: Sequence[str], gamma: float) -> Float:
    """Return a weight for each image, float64 (N,): k / (gamma n_t + (1 - gamma) k), n_t images of its tissue.

    Raises UsageError WSI902 for a gamma outside 0..1.
    """
    number = Counter(tissues)
    names = sorted(number)
    weight = _rarity(np.array([number[n] for n in names], np.float64), gamma)
    return np.asarray(weight[np.searchsorted(names, list(tissues))], np.float64)


def cell_weights(cells: NDArray[np.int64], gamma: float, images_with: Sequence[int] | None = None) -> Float:
    """Return a weight for each image from its cells, int64 (N, classes) -> float64 (N,).

    (1 - gamma) [any class] + gamma * sum of k / (gamma n_c + (1 - gamma) k) over the classes present, n_c the
    images with class c (`images_with`, by default counted here) and k their sum. An image without any gets the
    smallest weight of the others. Raises UsageError WSI902 for a gamma outside 0..1, WSI903 for another number
    of classes in `images_with`.
    """
    present = (cells > 0).astype(np.float64)
    counts = present.sum(0) if images_with is None else np.asarray(images_with, np.float64)
    if counts.shape != present.shape[1:]:
        raise UsageError("WSI903", f"{len(counts)} counts for {present.shape[1]} classes; give one for each")
    if not present.any():
        return np.ones(len(cells))
    rarity = np.where(counts > 0, _rarity(counts, gamma), 0.0)
    weight = (1 - gamma) * present.max(1) + gamma * (present @ rarity)
    weight[weight == 0] = weight[weight > 0].min()
    return np.asarray(weight, np.float64)


def cell_tissue_weights(
    cells: NDArray[np.int64],
    tissues: Sequence[str],
    gamma: float = 0.85,
    images_with: Sequence[int] | None = None,
) -> Float:
    """Return the weights of the paper's runs: tissue and cell weights, each over its largest, added."""
    tissue, cell = tissue_weights(tissues, gamma), cell_weights(cells, gamma, images_with)
    return np.asarray(tissue / tissue.max() + cell / cell.max(), np.float64)


@final
class Sampler:
    """Draws images with replacement, in proportion to weights.

    Parameters
    ----------
    weights
        float64 (N,), not negative.
    batch
        Images a step, over all processes.
    seed
        Of the run.

    Raises UsageError WSI904 for weights that no draw can follow.
    """

    def __init__(self, weights: NDArray[np.float64], batch: int, seed: int) -> None:
        total = float(np.sum(weights))
        if not len(weights) or not np.isfinite(total) or total <= 0 or np.min(weights) < 0:
            raise UsageError(
                "WSI904",
                f"cannot draw from {len(weights)} images of total weight {total:g}; weights must be >= 0",
            )
        self.batch, self.seed = batch, seed
        self.shares = np.asarray(weights, np.float64) / total
        self._upto = np.cumsum(self.shares)

    def pick(self, chance: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the images that numbers in [0, 1) stand for: image i owns an interval as long as its share."""
        found = np.searchsorted(self._upto, chance * self._upto[-1], side="right")
        return np.asarray(np.minimum(found, np.flatnonzero(self.shares)[-1]), np.int64)

    def draw(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Return the images of process `rank` of `world` at `step` (from 0): a pure function of these and the seed.

        All processes together draw what one would have drawn; `rank` takes every world-th.
        """
        return np.asarray(self.pick(self._stream(step, 0).random(self.batch))[rank::world], np.int64)

    def generator(self, step: int, slot: int) -> np.random.Generator:
        """Return the source of chance for the augmentation of sample `slot` (place in the whole batch) of a step.

        Slot j of process `rank` in what `draw` returned is ``rank + j * world`` of the whole batch.
        """
        return self._stream(step, slot + 1)

    def _stream(self, step: int, number: int) -> np.random.Generator:
        # Philox is a block cipher of its counter: streams of other steps and slots cannot run into this one
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, number, step]))
