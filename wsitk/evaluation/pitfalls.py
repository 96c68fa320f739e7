"""Warnings about the figures: each says what was found, with a number, and what to do about it.

The list follows Maier-Hein, Reinke et al., "Metrics reloaded" (Nature Methods 21, 2024) and Reinke et al.,
"Understanding metric-related pitfalls" (ibid.), as far as a program can see a pitfall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import final

import numpy as np

from wsitk.evaluation.compare import ALL, ImageScores
from wsitk.evaluation.figures import Figure, Vocabulary
from wsitk.evaluation.settings import Options
from wsitk.metrics.counts import Counts
from wsitk.metrics.overlap import Confusion

__all__ = ["Warned", "warnings_of"]

SMALL_PX = 50
"""Objects of a median area below this lose more than 0.1 of IoU by a shift of one pixel."""

APART = 0.02
"""Means over images and over slides that differ by more than this are worth a word."""

RARE = 0.10
"""Share of the pixels below which accuracy says little."""


@final
@dataclass(frozen=True)
class Warned:
    """A pitfall that was met: what was found, and what to do."""

    code: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.code}: {self.found}; {self.advice}"


@final
@dataclass(frozen=True)
class _Case:
    """All that the checks look at."""

    images: Sequence[ImageScores]
    figures: Sequence[Figure]
    options: Options
    words: Vocabulary
    training: Sequence[dict[str, str]]

    def value(self, key: str) -> float:
        return next((f.value for f in self.figures if f.key == key), float("nan"))

    def total(self, finding: str) -> float:
        return sum(i.findings.get(finding, 0.0) for i in self.images)


def warnings_of(
    images: Sequence[ImageScores],
    figures: Sequence[Figure],
    options: Options,
    words: Vocabulary,
    training: Sequence[dict[str, str]] = (),
) -> list[Warned]:
    """Return the pitfalls of an evaluation, in the order of their weight."""
    case = _Case(images, figures, options, words, training)
    return [warned for check in _CHECKS for warned in check(case)]


def _missing(case: _Case) -> Iterator[Warned]:
    lost = [i.name for i in case.images if i.missing]
    if lost:
        named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        yield Warned(
            "W-MISSING",
            f"{len(lost)} of {len(case.images)} images have no prediction ({named})",
            "they count as the worst there is: predict them, or take their truth away and say so",
        )


def _leak(case: _Case) -> Iterator[Warned]:
    for unit in ("image", "slide", "patient"):
        # a split's `group` is a slide or a patient, whichever it was made by
        columns = (unit,) if unit == "image" else (unit, "group")
        trained = {t[column] for t in case.training for column in columns if t.get(column)}
        both = [i for i in case.images if i.facts.get(unit, "").rsplit("/", 1)[-1] in trained]
        if both:
            count = len({i.facts[unit] for i in both})
            yield Warned(
                "W-LEAK",
                f"{len(both)} of {len(case.images)} images are of {count} {unit}s that the model was trained on",
                "these figures are no estimate for new patients: test on others (`wsitk split check`)",
            )
            return


def _names(case: _Case) -> Iterator[Warned]:
    words = case.words
    lists = [f"{who} only: {', '.join(names)}" for who, names in
             (("truth", words.truth_only), ("prediction", words.predicted_only)) if names]  # fmt: skip
    if words.said or lists:
        yield Warned(
            "W-CLASSES",
            "; ".join([*([words.said] if words.said else []), *lists]),
            "nothing is said about such classes (n/a, not 0): map names with --labels",
        )


def _free_false_positives(case: _Case) -> Iterator[Warned]:
    if case.options.task != "nuclei" or case.options.protocol != "pannuke":
        return
    free = {}
    for name in (ALL, *case.words.shared):
        counts = [i.counts.get(name, Counts()) for i in case.images]
        free[name] = (sum(c.fp for c in counts if not c.truth), sum(not c.truth and c.fp > 0 for c in counts))
    objects, images = (sum(v[k] for n, v in free.items() if n != ALL or len(free) == 1) for k in range(2))
    if objects:
        key = "mpq" if case.words.shared else "bpq"
        yield Warned(
            "W-FREEFP",
            f"{objects} false positives cost nothing: PanNuke's mean leaves out the {images} images (each class"
            " by itself) whose truth is empty",
            f"read the pooled {'mPQ' if key == 'mpq' else 'bPQ'} beside it: {case.value(f'{key}@pooled'):.3f}",
        )


def _empty(case: _Case) -> Iterator[Warned]:
    if case.options.task == "segmentation":
        skipped = {f.label: f.skipped for f in case.figures if f.key.startswith("dice:") and f.skipped}
        if skipped:
            named = ", ".join(f"{label} {count}" for label, count in skipped.items())
            yield Warned(
                "W-EMPTY",
                f"images with neither truth nor prediction were left out ({named} of {len(case.images)})",
                "read n beside each figure, and the pooled Dice, which has no such gap",
            )
        worst = sum(v for i in case.images for k, v in i.findings.items() if k.startswith("one_empty:"))
        if worst:
            yield Warned(
                "W-EMPTY",
                f"{worst:.0f} times only one of truth and prediction was empty: Dice and NSD are 0 there, and HD95"
                " is the image's diagonal",
                "read HD95 together with the Dice",
            )
        return
    empty = [i for i in case.images if not i.findings.get("truth", 0)]
    if empty:
        yield Warned(
            "W-EMPTY",
            f"the truth of {len(empty)} of {len(case.images)} images is empty",
            "per-image means leave out what they can't divide by (see n); pooled figures count every object",
        )


def _aggregation(case: _Case) -> Iterator[Warned]:
    for key, label in (("bpq", "bPQ"), ("mpq", "mPQ"), ("f1", "detection F1")):
        ways = {f.over: f.value for f in case.figures if f.key.split("@")[0] == key and not isnan(f.value)}
        if ways and max(ways.values()) - min(ways.values()) > APART:
            named = ", ".join(f"{value:.3f} ({over})" for over, value in ways.items())
            yield Warned(
                "W-AGG",
                f"{label} depends on how it is averaged: {named}",
                "name the way whenever you quote it",
            )


def _small(case: _Case) -> Iterator[Warned]:
    sizes = [i.findings["median_area_px"] for i in case.images if "median_area_px" in i.findings]
    median = float(np.nanmedian(sizes)) if sizes and not np.isnan(sizes).all() else float("nan")
    if median < SMALL_PX:
        keys = {"0.3": "pq0.3@pooled", "0.5": "bpq@pooled", "0.7": "pq0.7@pooled"}
        at = [f"{case.value(key):.3f} at {threshold}" for threshold, key in keys.items()]
        yield Warned(
            "W-SMALL",
            f"the median true object has {median:.0f} px: a shift of one pixel costs more than 0.1 of IoU",
            f"compare the pooled bPQ at several thresholds ({', '.join(at)}), or trust the detection F1",
        )


def _pixel_size(case: _Case) -> Iterator[Warned]:
    unknown = [i for i in case.images if i.unit == "px"]
    if not unknown:
        return
    if case.options.task == "segmentation":
        found = f"nothing says what a pixel is in {len(unknown)} images: distances are in pixels"
    else:
        radius = unknown[0].findings.get("radius", 0.0)
        found = f"nothing says what a pixel is in {len(unknown)} images: centroids were paired within {radius:g} px"
    yield Warned("W-MPP", found, "give --mpp; 12 px are 3 µm at 0.25 µm/px only")


def _tolerance(case: _Case) -> Iterator[Warned]:
    if case.options.task != "segmentation":
        return
    if case.options.tolerance is None:
        yield Warned(
            "W-NSDTAU",
            "no tolerance was given, NSD took one pixel",
            "give --tolerance as what two experts differ by, such as 2um",
        )
    below = sum(i.findings.get("tolerance_px", 1.0) < 1 for i in case.images)
    if below:
        yield Warned(
            "W-NSDTAU",
            f"the tolerance is less than a pixel in {below} of {len(case.images)} images: NSD counts exact hits only",
            "take a tolerance of one pixel or more",
        )


def _components(case: _Case) -> Iterator[Warned]:
    if case.options.task != "segmentation":
        return
    many = {
        i.name for i in case.images for k, v in i.findings.items() if k.startswith("components:") and v > 1
    }
    if many:
        yield Warned(
            "W-HD",
            f"the truth of {len(many)} of {len(case.images)} images has several components in a class: HD95 mixes"
            " their borders, and one lost component can hide in it",
            "read the Dice beside it, or count components with --task nuclei",
        )


def _border(case: _Case) -> Iterator[Warned]:
    cut, total = case.total("on_border"), case.total("truth")
    if total and cut / total > RARE:
        yield Warned(
            "W-BORDER",
            f"{cut:.0f} of {total:.0f} true objects touch the border of their image: tiles of one slide may count"
            " them twice, and their areas are cut",
            "evaluate on larger tiles, or on whole slides",
        )


def _imbalance(case: _Case) -> Iterator[Warned]:
    for name in (case.words.shared or (ALL,)) if case.options.task == "segmentation" else ():
        total = sum((i.pixels.get(name, Confusion()) for i in case.images), Confusion())
        size = total.tp + total.fp + total.fn + total.tn
        if size and 0 < total.truth / size < RARE:
            accuracy = (total.tp + total.tn) / size
            yield Warned(
                "W-IMBAL",
                f"{name} is {total.truth / size:.1%} of the pixels, so that an accuracy of {accuracy:.3f} says little",
                f"quote Dice, MCC ({total.mcc:.3f}) or balanced accuracy ({total.balanced_accuracy:.3f})",
            )


def _overlap(case: _Case) -> Iterator[Warned]:
    touching = case.total("touching")
    if touching:
        yield Warned(
            "W-OVERLAP",
            f"{touching:.0f} true objects touch another: figures of areas don't see whether they were told apart",
            "evaluate them with --task nuclei",
        )
    twice = case.total("overlap_px") + case.total("drawn_twice")
    if twice:
        yield Warned(
            "W-OVERLAP",
            f"{twice:.0f} pixels belong to several objects of one side; in one map the later object has them",
            "figures of all objects together lose what lies below",
        )


_CHECKS: tuple[Callable[[_Case], Iterator[Warned]], ...] = (
    _missing, _leak, _names, _free_false_positives, _empty, _aggregation, _small, _pixel_size, _tolerance,
    _components, _border, _imbalance, _overlap,
)  # fmt: skip
