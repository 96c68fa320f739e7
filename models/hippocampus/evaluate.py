"""What the card measures: Dice and normalised surface distance of both parts, with intervals over cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.metrics.bootstrap import bootstrap_mean
from wsitk.metrics.overlap import dice
from wsitk.metrics.surface import nsd
from wsitk.models.hippocampus.network import CLASSES

__all__ = ["TOLERANCE_MM", "case_scores", "summary"]

TOLERANCE_MM = 1.0

Labels = NDArray[np.integer[Any]]


def case_scores(truth: Labels, found: Labels, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    """Return ``dice`` and ``nsd`` (at 1 mm, border voxels) of each part of one case, and the means of both.

    `truth` and `found` are (z, y, x) with 0, 1 anterior, 2 posterior; a part that neither has is left out (NaN).
    """
    scores: dict[str, float] = {}
    for k, name in enumerate(CLASSES[1:], 1):
        masks = truth == k, found == k
        scores[f"dice_{name.lower()}"] = dice(*masks)
        scores[f"nsd_{name.lower()}"] = nsd(*masks, TOLERANCE_MM, spacing_mm)
    for figure in ("dice", "nsd"):
        scores[figure] = float(np.mean([scores[f"{figure}_{name.lower()}"] for name in CLASSES[1:]]))
    return scores


def summary(cases: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float | list[float]]:
    """Return the mean of every figure over named cases, and its 95 % interval from drawing cases anew."""
    names, scores = zip(*cases, strict=True)
    found: dict[str, float | list[float]] = {}
    for figure in scores[0]:
        each = bootstrap_mean([s[figure] for s in scores], names)
        found[figure] = round(each.value, 4)
        found[f"{figure}_ci95"] = [round(each.low, 4), round(each.high, 4)]
    return found
