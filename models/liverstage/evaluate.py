"""What the card measures: parasites found in made fields that nobody learned from, and in a labelled real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wsitk.metrics.bootstrap import bootstrap, count_columns, pooled_f1
from wsitk.metrics.counts import Counts
from wsitk.metrics.panoptic import panoptic_counts
from wsitk.models.liverstage.data import normalised
from wsitk.models.liverstage.fields import DNA, FieldRecipe, make_field
from wsitk.models.liverstage.objects import segment
from wsitk.models.liverstage.training import answer

__all__ = ["FieldScore", "made_scores", "score", "summary"]

_SEED = 9_001  # no training's


@dataclass(frozen=True)
class FieldScore:
    """One field: objects at an IoU above 0.5, and pixels in both masks, in the truth's and in the found one."""

    objects: Counts
    both: int
    truth: int
    found: int


def score(
    network: nn.Module, image: NDArray[np.generic], truth: NDArray[np.int32], *, blind: bool = False
) -> FieldScore:
    """Return how well the objects of `truth` (H, W) are found in `image` (C, H, W); `blind` hides the stain of DNA."""
    seen = normalised(image)
    if blind:
        seen[DNA] = 0
    foreground, core = answer(network, seen)
    labels = segment(foreground, core)
    both, held, found = (int(m.sum()) for m in ((labels > 0) & (truth > 0), truth > 0, labels > 0))
    return FieldScore(panoptic_counts(truth, labels), both, held, found)


def made_scores(
    network: nn.Module, fields: int = 60, side: int = 320, *, blind: bool = False, **recipe: object
) -> list[FieldScore]:
    """Return the scores of made fields that depend on their number only; `recipe` narrows what they are like."""
    chosen = FieldRecipe(**recipe)  # type: ignore[arg-type]  # what a recipe takes
    scores = []
    for number in range(fields):
        made = make_field((side, side), np.random.default_rng((_SEED, number)), chosen)
        scores.append(score(network, made.image, made.parasites, blind=blind))
    return scores


def summary(scores: Sequence[FieldScore]) -> dict[str, float | list[float] | dict[str, int]]:
    """Return figures as a card holds them: pooled over fields, with 95 % bootstrap intervals over fields."""
    counts = count_columns([s.objects for s in scores])
    pixels = np.array([[2 * s.both, s.truth + s.found] for s in scores], np.float64)
    names = [str(k) for k in range(len(scores))]
    f1 = bootstrap(counts, names, pooled_f1)
    dice = bootstrap(pixels, names, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))
    total = sum((s.objects for s in scores), Counts())
    return {
        "f1": round(f1.value, 3),
        "f1_ci95": [round(f1.low, 3), round(f1.high, 3)],
        "dice": round(dice.value, 3),
        "dice_ci95": [round(dice.low, 3), round(dice.high, 3)],
        "precision": round(total.precision, 3),
        "recall": round(total.recall, 3),
        "detection": {"tp": total.tp, "fp": total.fp, "fn": total.fn},
    }
