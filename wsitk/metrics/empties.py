"""What a metric of masks says when there is nothing to measure: four policies, spelled out."""

from __future__ import annotations

from enum import StrEnum
from math import inf, nan

__all__ = ["Empty"]


class Empty(StrEnum):
    """The policy for masks without a pixel. No default is right for all; the published ones disagree.

    | | both empty: Dice, IoU, NSD, boundary IoU, clDice; distances | one empty: overlap; distances |
    |---|---|---|
    | SKIP | NaN; NaN | 0; inf |
    | PERFECT | 1; 0 | 0; inf |
    | METRICS_RELOADED | 1, IoU and clDice NaN; 0 | 0, clDice NaN; NaN |
    | MONAI | NaN; NaN | 0, Dice and IoU NaN if it is the truth; inf, percentiles below 100 NaN |
    """

    SKIP = "skip"
    """Our own: two empty masks are nothing to measure, and a missing or a false object is the worst."""

    PERFECT = "perfect"
    """FLARE's and A-Eval's: to find nothing where nothing is, is perfect."""

    METRICS_RELOADED = "metrics-reloaded"
    """MetricsReloaded's code (cb38dfc). A missing object has no distance, and so costs nothing there."""

    MONAI = "monai"
    """MONAI's metrics (1.6.1) with their default settings."""

    def overlap(self, truth_empty: bool, predicted_empty: bool, measure: str = "dice") -> float | None:
        """What a score from 0 to 1 is; None if neither mask is empty. `measure` is dice, iou, nsd, biou, cldice."""
        if not (truth_empty or predicted_empty):
            return None
        if self is Empty.METRICS_RELOADED and measure == "cldice":
            return nan
        if truth_empty and predicted_empty:
            reloaded = nan if measure == "iou" else 1.0
            return {Empty.PERFECT: 1.0, Empty.METRICS_RELOADED: reloaded}.get(self, nan)
        ignored = self is Empty.MONAI and truth_empty and measure in ("dice", "iou")
        return nan if ignored else 0.0

    def distance(self, truth_empty: bool, predicted_empty: bool, percentile: bool = False) -> float | None:
        """What a distance is; None if neither mask is empty. `percentile` is True for HD95 and the like."""
        if not (truth_empty or predicted_empty):
            return None
        if truth_empty and predicted_empty:
            return 0.0 if self in (Empty.PERFECT, Empty.METRICS_RELOADED) else nan
        unknown = self is Empty.METRICS_RELOADED or (self is Empty.MONAI and percentile)
        return nan if unknown else inf
