"""From images to figures: whose mean, over what, how many dropped out and why, and how sure one can be.

The same counts give very different numbers by the protocol that averages them, so each figure says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.evaluation.compare import ALL, ImageScores
from wsitk.evaluation.settings import Options
from wsitk.metrics.bootstrap import (
    Interval,
    bootstrap,
    bootstrap_mean,
    count_columns,
    group_means,
    pooled_f1,
    pooled_pq,
    pooled_precision,
    pooled_recall,
    pooled_sq,
)
from wsitk.metrics.counts import Convention, Counts

__all__ = ["Figure", "Vocabulary", "figures", "image_quality", "vocabulary"]

Array = NDArray[Any]
Statistic = Callable[[Array], Array]


@final
@dataclass(frozen=True)
class Figure:
    """One number with all that it needs to be read.

    Attributes
    ----------
    key : str
        Stable name: ``bpq``, ``mpq``, ``pq:CLASS``, ``f1``, ``dice:CLASS``, with ``@tissues``, ``@images``,
        ``@groups`` or ``@pooled`` for the way of averaging.
    label : str
        For people.
    over : str
        What was averaged or summed.
    value, low, high : float
        NaN where it is not defined; low and high bound the 95 % interval.
    n, skipped : int
        Images that went in, and images that could not; `why` says why not.
    headline : bool
        Whether the protocol puts this one first.
    """

    key: str
    label: str
    over: str
    value: float
    low: float
    high: float
    n: int
    skipped: int = 0
    why: str = ""
    headline: bool = False


@final
@dataclass(frozen=True)
class Vocabulary:
    """The classes that both sides can hold, and those of one side only, which nothing is said about."""

    shared: tuple[str, ...]
    truth_only: tuple[str, ...]
    predicted_only: tuple[str, ...]
    said: str = ""


def vocabulary(images: Sequence[ImageScores]) -> Vocabulary:
    """Return what classes can be compared.

    A side that declares its classes holds these and no others. A side that does not may hold any, so that a class
    that it was never seen to hold counts as never found.
    """
    truth = _met(i.truth_names for i in images)
    predicted = _met(i.predicted_names for i in images if not i.missing)
    if truth is None or predicted is None:
        who = "truth" if truth is None else "prediction"
        lost = len(truth or predicted or ()) > 1  # one class alone is no more than "an object"
        said = f"the {who} tells no classes apart" if lost else ""
        return Vocabulary((), truth or (), predicted or (), said) if lost else Vocabulary((), (), ())
    open_truth = not any(i.truth_declared for i in images)
    open_predicted = not any(i.predicted_declared for i in images)
    if truth and predicted and not set(truth) & set(predicted):
        return Vocabulary((), truth, predicted, "the two have no class name in common")
    shared = [n for n in truth if n in predicted or open_predicted]
    shared += [n for n in predicted if n not in truth and open_truth]
    left, right = (tuple(n for n in side if n not in shared) for side in (truth, predicted))
    return Vocabulary(tuple(shared), left, right)


def _met(sides: Any) -> tuple[str, ...] | None:
    """Return all names, in the order of their first appearance; None if no image tells classes apart."""
    known = [names for names in sides if names is not None]
    return tuple(dict.fromkeys(n for names in known for n in names)) if known else None


@final
class _Set:
    """All images, with the columns that figures are made of."""

    def __init__(self, images: Sequence[ImageScores], options: Options) -> None:
        self.images = images
        self.options = options
        self.groups = [i.facts[options.group] for i in images]
        self.tissues = [i.facts.get("tissue", "") for i in images]

    def mean(self, key: str, label: str, values: Array, *, why: str = "", **facts: Any) -> Figure:
        """Return the mean over images, those without a value left out."""
        interval = bootstrap_mean(values, self.groups, **self._draws())
        n = int((~np.isnan(values)).sum())
        return self._figure(f"{key}@images", label, "mean of images", interval, n, why, facts)

    def tissue_mean(self, key: str, label: str, values: Array, *, why: str = "", **facts: Any) -> Figure:
        """Return the mean over tissues of their means over images, which is PanNuke's."""
        interval = bootstrap_mean(values, self.groups, self.tissues, **self._draws())
        n = int((~np.isnan(values)).sum())
        over = f"mean of {len(set(self.tissues))} tissues"
        return self._figure(f"{key}@tissues", label, over, interval, n, why, facts)

    def group_mean(self, key: str, label: str, values: Array, **facts: Any) -> Figure:
        """Return the mean over slides or patients of their means over images."""
        names, means = group_means(values, self.groups)
        interval = bootstrap_mean(means, names, **self._draws())
        n = int((~np.isnan(values)).sum())
        over = f"mean of {len(names)} {self.options.group}s"
        return self._figure(f"{key}@groups", label, over, interval, n, "", facts)

    def pooled(
        self,
        key: str,
        label: str,
        sums: Array,
        statistic: Statistic,
        over: str = "summed over images",
        **facts: Any,
    ) -> Figure:
        """Return a figure of summed counts."""
        interval = bootstrap(sums, self.groups, statistic, **self._draws())
        return self._figure(f"{key}@pooled", label, over, interval, len(self.images), "", facts)

    def _draws(self) -> dict[str, Any]:
        return {"draws": self.options.resamples, "seed": self.options.seed}

    def _figure(
        self, key: str, label: str, over: str, interval: Interval, n: int, why: str, facts: dict[str, Any]
    ) -> Figure:
        skipped = len(self.images) - n
        low, high = interval.low, interval.high
        return Figure(
            key, label, over, interval.value, low, high, n, skipped, why if skipped else "", **facts
        )


def figures(images: Sequence[ImageScores], options: Options, words: Vocabulary) -> list[Figure]:
    """Return all figures of a task, the protocol's own first."""
    data = _Set(images, options)
    if options.task == "segmentation":
        return _segmentation(data, words)
    if options.task == "detection":
        return _detection(data, words)
    found = [*_panoptic(data, words), *_shapes(data), *_detection(data, words)]
    return sorted(found, key=lambda f: not f.headline)  # stable


def image_quality(counts: Counts, protocol: str, missing: bool) -> float:
    """Return the PQ of one image as its protocol has it; NaN where the protocol leaves the image out.

    PanNuke leaves out images whose truth is empty, HoVer-Net's and ours only those that are empty on both sides.
    A lost prediction is never left out.
    """
    if missing:
        return 0.0
    if protocol == "pannuke" and not counts.truth:
        return nan
    convention = Convention.EXACT if protocol == "pooled" else Convention.HOVERNET
    return counts.quality(convention).pq


def _panoptic(data: _Set, words: Vocabulary) -> list[Figure]:
    """PQ of all objects as one class (bPQ), and of classes (mPQ), in every published meaning."""
    protocol = data.options.protocol
    first = {"pannuke": "tissues" if len(set(data.tissues)) > 1 else "images", "pooled": "pooled"}.get(
        protocol, "images"
    )
    every = [i.counts[ALL] for i in data.images]
    empty = "truth empty" if protocol == "pannuke" else "both empty"
    bpq = _qualities(data, ALL)
    found = _three_means(data, "bpq", "bPQ", bpq, first, empty)
    found.append(data.pooled("bpq", "bPQ", count_columns(every), pooled_pq, headline=first == "pooled"))
    found += _parts(data, every, first)
    if not words.shared:
        return found
    each = np.stack([_qualities(data, name) for name in words.shared], axis=1)
    mpq = np.array([_nanmean(row) for row in each])
    sums = np.concatenate([count_columns([_of(i, n) for i in data.images]) for n in words.shared], axis=1)
    if len(words.shared) == 1:
        return found + _class_figures(data, words, each, sums, first)
    found += _three_means(data, "mpq", "mPQ", mpq, first, "no class in the truth")
    found.append(
        data.pooled(
            "mpq",
            "mPQ",
            sums,
            _mean_of_classes,
            "summed over images, mean of classes",
            headline=first == "pooled",
        )
    )
    return found + _class_figures(data, words, each, sums, first)


def _class_figures(data: _Set, words: Vocabulary, each: Array, sums: Array, first: str) -> list[Figure]:
    """Return PQ of each class; `each` (images, classes) holds those of the images, `sums` four columns for each."""
    found = []
    for k, name in enumerate(words.shared):
        label, counts = f"PQ {name}", sums[:, 4 * k : 4 * k + 4]
        if first != "pooled":
            why = "class not in the truth"
            found.append(data.mean(f"pq:{name}", label, each[:, k], why=why, headline=True))
        found.append(data.pooled(f"pq:{name}", label, counts, pooled_pq, headline=first == "pooled"))
    return found


def _three_means(data: _Set, key: str, label: str, values: Array, first: str, why: str) -> list[Figure]:
    """Return the mean over tissues and over images, and over slides or patients where these are not the images."""
    found = []
    if len(set(data.tissues)) > 1:
        found.append(data.tissue_mean(key, label, values, why=why, headline=first == "tissues"))
    found.append(data.mean(key, label, values, why=why, headline=first == "images"))
    if len(set(data.groups)) < len(data.groups):
        found.append(data.group_mean(key, label, values))
    return found


def _parts(data: _Set, every: Sequence[Counts], first: str) -> list[Figure]:
    """Return detection and segmentation quality, and PQ at other thresholds."""
    sums = count_columns(every)
    found = [
        data.pooled("dq", "DQ", sums, pooled_f1, headline=first == "pooled"),
        data.pooled("sq", "SQ", sums, pooled_sq, headline=first == "pooled"),
    ]
    if first != "pooled":
        quality = [c.quality(Convention.HOVERNET) for c in every]
        lost = np.array([i.missing for i in data.images])
        for key, label in (("dq", "DQ"), ("sq", "SQ")):
            values = np.array([getattr(q, key) for q in quality])
            values = np.where(np.isnan(_qualities(data, ALL)), nan, np.where(lost, 0.0, values))
            found.insert(0 if key == "dq" else 1, data.mean(key, label, values, headline=True))
    for threshold in sorted(data.images[0].at):
        counts = count_columns([i.at[threshold] for i in data.images])
        found.append(data.pooled(f"pq{threshold:g}", f"bPQ at IoU > {threshold:g}", counts, pooled_pq))
    return found


def _shapes(data: _Set) -> list[Figure]:
    """Return what areas say of nuclei."""
    labels = {
        "aji": "AJI",
        "aji_plus": "AJI+",
        "dice": "Dice of the foreground",
        "iou": "IoU of the foreground",
    }
    return [
        data.mean(key, label, _values(data, key), why="both empty", headline=True)
        for key, label in labels.items()
    ]


def _detection(data: _Set, words: Vocabulary) -> list[Figure]:
    """Return F1 of centroids, of all and of each type."""
    typed = [i.detection for i in data.images]
    every = [t.detection for t in typed if t is not None]
    sums = count_columns(every)
    lost = np.array([i.missing for i in data.images])
    f1 = np.where(lost, 0.0, [c.f1 for c in every])
    found = [
        data.pooled("f1", "detection F1", sums, pooled_f1, headline=True),
        data.pooled("precision", "detection precision", sums, pooled_precision, headline=True),
        data.pooled("recall", "detection recall", sums, pooled_recall, headline=True),
        data.mean("f1", "detection F1", f1, why="both empty"),
    ]
    if len(set(data.groups)) < len(data.groups):
        found.append(data.group_mean("f1", "detection F1", f1))
    for name in words.shared:
        columns = np.array([_type_columns(i, name) for i in data.images])
        found.append(data.pooled(f"f1:{name}", f"detection F1 {name}", columns, _type_f1, headline=True))
    if len(words.shared) > 1:
        agree = np.array([_agreement(i, words.shared) for i in data.images], np.float64)
        label = "types right among pairs"
        found.append(data.pooled("type_accuracy", label, agree, lambda s: _ratio(s[:, 0], s[:, 1])))
    return found


def _segmentation(data: _Set, words: Vocabulary) -> list[Figure]:
    """Return overlap and distances of each class, and the means over classes."""
    unit = {"um": "µm"}.get(data.images[0].unit, data.images[0].unit)
    width = data.options.tolerance or f"1 pixel, {unit}"
    labels = {"dice": "Dice", "iou": "IoU", "nsd": f"NSD at {width}", "hd95": f"HD95 ({unit})"}
    labels["boundary_iou"] = "boundary IoU"
    names = words.shared or (ALL,)
    found = []
    for key, label in labels.items():
        each = np.stack([_values(data, f"{key}:{name}", absent=nan) for name in names], axis=1)
        for k, name in enumerate(names):
            shown = label if name == ALL else f"{label} {name}"
            found.append(data.mean(f"{key}:{name}", shown, each[:, k], why="both empty", headline=True))
        if len(names) > 1:
            mean = np.array([_nanmean(row) for row in each])
            found.append(data.mean(key, f"{label}, mean of classes", mean, why="both empty", headline=True))
    for name in names:
        counts = [(p.tp, p.fp, p.fn) if (p := i.pixels.get(name)) else (0, 0, 0) for i in data.images]
        shown = "Dice" if name == ALL else f"Dice {name}"
        found.append(data.pooled(f"dice:{name}", shown, np.array(counts, np.float64), pooled_f1))
    return found


def _qualities(data: _Set, name: str) -> Array:
    """Return PQ for each image; a lost prediction is worst, but of a class only where the truth holds it."""
    found = [(i, _of(i, name)) for i in data.images]
    protocol = data.options.protocol
    return np.array(
        [image_quality(c, protocol, i.missing and (name == ALL or c.truth > 0)) for i, c in found]
    )


def _of(image: ImageScores, name: str) -> Counts:
    """Return the counts of a class; an image that never heard of it holds none of it."""
    return image.counts.get(name, Counts())


def _values(data: _Set, key: str, absent: float = nan) -> Array:
    return np.array([i.values.get(key, absent) for i in data.images], np.float64)


def _type_columns(image: ImageScores, name: str) -> tuple[float, float, float]:
    """Return pairs of the right type, pairs of the wrong one, and points without partner."""
    typed = image.detection
    if typed is None or name not in image.types:
        return 0.0, 0.0, 0.0
    k = image.types.index(name)
    hit = typed.paired[k, k]
    wrong = typed.paired[k].sum() + typed.paired[:, k].sum() - 2 * hit
    return float(hit), float(wrong), float(typed.spurious[k] + typed.missed[k])


def _agreement(image: ImageScores, names: tuple[str, ...]) -> tuple[int, int]:
    """Return the pairs whose types agree, and all pairs both of whose types can be compared."""
    typed = image.detection
    if typed is None:
        return 0, 0
    k = [image.types.index(n) for n in names if n in image.types]
    block = typed.paired[np.ix_(k, k)]
    return int(np.trace(block)), int(block.sum())


def _type_f1(sums: Array) -> Array:
    """F1 of a type (Graham et al. 2019): wrong types weigh twice what missed and spurious points do."""
    hit, wrong, alone = sums.T
    return _ratio(2 * hit, 2 * hit + 2 * wrong + alone)


def _mean_of_classes(sums: Array) -> Array:
    """Mean of the pooled PQ of classes, those without any object left out."""
    each = np.stack([pooled_pq(sums[:, k : k + 4]) for k in range(0, sums.shape[1], 4)], axis=1)
    present = ~np.isnan(each)
    return _ratio(np.where(present, each, 0.0).sum(axis=1), present.sum(axis=1))


def _nanmean(row: Array) -> float:
    present = [float(v) for v in row if not isnan(v)]
    return sum(present) / len(present) if present else nan


def _ratio(part: Array, whole: Array) -> Array:
    return np.asarray(np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0))
