"""Counts of matched objects, which add up over images, and the quality that each convention makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Convention", "Counts", "Quality", "ratio"]

UPSTREAM_EPSILON = 1e-6


class Convention(StrEnum):
    """Whose arithmetic turns counts into DQ, SQ and PQ. They differ from the 7th digit on, and on nothing."""

    EXACT = "exact"
    """The definition: no constants. NaN where it divides nothing by nothing, as MetricsReloaded has it."""

    HOVERNET = "hovernet"
    """HoVer-Net's and PanNuke's scripts: SQ = iou_sum / (TP + 1e-6). Both empty: NaN (they crash)."""

    CELLVIT = "cellvit"
    """CellViT's: 1e-6 in the denominators of DQ and of SQ. Both empty: 0."""


@dataclass(frozen=True)
class Quality:
    """Detection quality, segmentation quality and their product."""

    dq: float
    sq: float
    pq: float


@dataclass(frozen=True)
class Counts:
    """Matched and unmatched objects, and the overlap of the matched. Counts of images add up."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou_sum + other.iou_sum
        )

    @property
    def truth(self) -> int:
        """Number of true objects."""
        return self.tp + self.fn

    @property
    def predicted(self) -> int:
        """Number of predicted objects."""
        return self.tp + self.fp

    @property
    def f1(self) -> float:
        """Detection quality; NaN where there is nothing in the truth and nothing was found."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Share of the predicted objects that are matched; NaN where nothing was found."""
        return ratio(self.tp, self.predicted)

    @property
    def recall(self) -> float:
        """Share of the true objects that are matched; NaN where there are none."""
        return ratio(self.tp, self.truth)

    @property
    def sq(self) -> float:
        """Mean overlap of the matched objects; NaN where none is matched."""
        return ratio(self.iou_sum, self.tp)

    @property
    def pq(self) -> float:
        """Panoptic quality, `f1 * sq`; 0 where nothing is matched, NaN where nothing is there at all."""
        return ratio(self.iou_sum, self.tp + 0.5 * (self.fp + self.fn))

    def quality(self, convention: Convention = Convention.EXACT) -> Quality:
        """DQ, SQ and PQ in the arithmetic of `convention`."""
        if convention is Convention.EXACT:
            return Quality(self.f1, self.sq, self.pq)
        sq = self.iou_sum / (self.tp + UPSTREAM_EPSILON)
        extra = UPSTREAM_EPSILON if convention is Convention.CELLVIT else 0.0
        dq = ratio(self.tp, self.tp + 0.5 * (self.fp + self.fn) + extra)
        return Quality(dq, sq, dq * sq)


def ratio(part: float, whole: float) -> float:
    """`part / whole`, and NaN where there is nothing to divide by."""
    return part / whole if whole else float("nan")
