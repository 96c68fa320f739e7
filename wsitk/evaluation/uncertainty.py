"""Is the doubt worth anything? What a run says of its own certainty, held against the truth.

Each score is asked two things: does it find what is wrong (risk against coverage, error detection), and, where it
claims to be a probability, does it mean what it says (reliability, Brier, log score). An interval of area is asked how
often it holds the true area, and what its width costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.evaluation.figures import Figure
from wsitk.evaluation.labels import Labels, Outlines
from wsitk.evaluation.pairing import Pair
from wsitk.evaluation.settings import Options
from wsitk.evaluation.uncertainty_objects import INTERVAL, JudgedObjects, judge_objects, role_of
from wsitk.evaluation.uncertainty_pixels import BINS, JudgedPixels, judge_pixels
from wsitk.metrics.bootstrap import bootstrap
from wsitk.metrics.calibration import (
    Reliability,
    brier_score,
    calibration_error,
    equal_mass_edges,
    equal_width_edges,
    interval_scores,
    log_score,
    reliability,
)
from wsitk.metrics.selective import (
    Graded,
    aurc,
    counts_at,
    error_auprc,
    error_auroc,
    excess_aurc,
    levels_of,
)

__all__ = ["Doubt", "Judge", "Uncertainty"]

Array = NDArray[Any]

_DRAWN = 256  # levels of doubt that the draws of the bootstrap tell apart; the figures themselves use all


@final
@dataclass(frozen=True)
class Doubt:
    """One score of certainty, held against one kind of error.

    Attributes
    ----------
    score : str
        Column of `objects.parquet`, or channel of `maps.ome.zarr`.
    error : str
        What counts as wrong: ``object`` (no true object matches), ``class`` (none of the same class does) or
        ``pixel`` (on the other side of the border between foreground and background).
    items, errors : int
        How many were judged, and how many of them are wrong.
    graded : Graded
    figures : tuple of Figure
    calibration : Reliability or None
        In bins of one width; of scores that are probabilities.
    """

    score: str
    error: str
    items: int
    errors: int
    graded: Graded
    figures: tuple[Figure, ...]
    calibration: Reliability | None = None


@final
@dataclass(frozen=True)
class Uncertainty:
    """All scores of a run, the figures of its intervals, and what has to be said about them."""

    doubts: tuple[Doubt, ...]
    intervals: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()

    def doubt(self, score: str, error: str) -> Doubt:
        """Return one score. Raises UsageError (WSI843) if it was not judged."""
        for doubt in self.doubts:
            if (doubt.score, doubt.error) == (score, error):
                return doubt
        known = ", ".join(f"{d.score} ({d.error})" for d in self.doubts)
        raise UsageError("WSI843", f"nothing was judged by {score!r} against {error!r}; there are {known}")


@final
@dataclass
class _Image:
    group: str
    objects: JudgedObjects
    pixels: JudgedPixels | None


@final
@dataclass
class Judge:
    """Collects the images of an evaluation, one by one. Of an image stay a few numbers for each object."""

    options: Options
    _images: list[_Image] = field(default_factory=list)

    def add(self, pair: Pair, truth: Labels | Outlines, predicted: Labels | Outlines | None) -> None:
        """Judge one image; one without prediction says nothing about doubt.

        Raises UsageError (WSI843) for predictions that are no `objects.parquet`.
        """
        if pair.predicted is None or predicted is None:
            return
        path = pair.predicted.path
        if path.name != "objects.parquet" or not isinstance(predicted, Outlines):
            raise UsageError(
                "WSI843",
                f"{path}: --uncertainty needs what a run says of its own certainty; give an output folder of"
                " `wsitk run` (objects.parquet), best one made with --samples above 1",
            )
        objects = judge_objects(pair.name, path, truth, predicted, self.options)
        pixels = judge_pixels(path.parent, truth) if isinstance(truth, Labels) else None
        self._images.append(_Image(pair.facts[self.options.group], objects, pixels))

    def result(self) -> Uncertainty:
        """Return the figures over all images. Raises UsageError (WSI843) if there is nothing to judge."""
        if not any(len(i.objects.found) for i in self._images):
            raise UsageError("WSI843", "no predicted object lies on the truth; there is no doubt to judge")
        doubts = [*self._object_doubts(), *self._pixel_doubts()]
        return Uncertainty(tuple(doubts), tuple(self._intervals()), tuple(self._notes(doubts)))

    # --- objects ---------------------------------------------------------------------------------------

    def _object_doubts(self) -> Iterable[Doubt]:
        names = list(dict.fromkeys(n for i in self._images for n in i.objects.columns))
        typed = any(i.objects.typed for i in self._images)
        for error in ("class", "object") if typed else ("object",):
            for name in names:
                role = "doubt" if name == "area_interval" else role_of(name)
                if role is not None:
                    yield self._object_doubt(name, error, confidence=role == "confidence")

    def _object_doubt(self, name: str, error: str, *, confidence: bool) -> Doubt:
        values, right = zip(*(self._column(i, name, error) for i in self._images), strict=True)
        every, good = np.concatenate(values), np.concatenate(right)
        doubt = [1 - v if confidence else v for v in values]
        pooled = np.concatenate(doubt)
        graded = Graded.of(pooled, ~good)
        levels = levels_of(pooled, _DRAWN)
        rows = [
            np.concatenate(counts_at(np.searchsorted(levels, d), ~r, len(levels)))
            for d, r in zip(doubt, right, strict=True)
        ]
        key = f"{name}@{error}"
        said = _Words(self.options, [i.group for i in self._images], key, f"{len(every):,} objects")
        figures = _ranking(graded, np.array(rows), said)
        calibration = None
        if confidence and len(every) and every.min() >= 0 and every.max() <= 1:
            sums = [
                (float(brier_score(v, r).sum()), float(log_score(v, r).sum()), len(v))
                for v, r in zip(values, right, strict=True)
            ]
            binned = {}
            for kind, edges in (
                ("ece", equal_width_edges(BINS)),
                ("ece_mass", equal_mass_edges(every, BINS)),
            ):
                binned[kind] = [reliability(v, r, edges) for v, r in zip(values, right, strict=True)]
            figures += _calibration(binned, np.array(sums), said)
            calibration = sum(binned["ece"][1:], binned["ece"][0])
        return Doubt(name, error, len(every), int((~good).sum()), graded, tuple(figures), calibration)

    @staticmethod
    def _column(image: _Image, name: str, error: str) -> tuple[Array, Array]:
        """Return the score of an image's objects and which of them are right; those that say nothing left out."""
        objects = image.objects
        values = objects.columns.get(name, np.full(len(objects.found), nan))
        kept = np.isfinite(values)
        return values[kept], (objects.right if error == "class" else objects.found)[kept]

    # --- pixels ----------------------------------------------------------------------------------------

    def _pixel_doubts(self) -> Iterable[Doubt]:
        images = [(i.group, i.pixels) for i in self._images if i.pixels is not None and i.pixels.pixels]
        for name in dict.fromkeys(n for _, p in images for n in p.doubts):
            mine = [(g, p) for g, p in images if name in p.doubts]
            rows = np.stack([p.doubts[name] for _, p in mine])
            right, wrong = rows.sum(axis=0)
            graded = Graded(np.arange(right.size) / right.size, right, wrong)
            items = sum(p.pixels for _, p in mine)
            said = _Words(self.options, [g for g, _ in mine], f"{name}@pixel", f"{items:,} pixels")
            figures = _ranking(graded, rows.reshape(len(mine), -1), said)
            calibration = None
            if name == "1 - |2p - 1|":
                edges = equal_width_edges(BINS)
                each = [Reliability(edges, *p.reliability) for _, p in mine]
                sums = np.array([(p.squares, p.logs, p.pixels) for _, p in mine])
                figures += _calibration({"ece": each}, sums, said)
                calibration = sum(each[1:], each[0])
            yield Doubt(name, "pixel", items, int(wrong.sum()), graded, tuple(figures), calibration)

    # --- intervals -------------------------------------------------------------------------------------

    def _intervals(self) -> Iterable[Figure]:
        """Yield how often intervals of area hold the true area, their width, and their interval score."""
        sums, groups = [], []
        for image in self._images:
            columns, truth = image.objects.columns, image.objects.truth_um2
            if not set(INTERVAL) <= set(columns):
                continue
            low, high = (columns[c] for c in INTERVAL)
            kept = np.isfinite(low) & np.isfinite(high) & np.isfinite(truth)
            inside, width, score = interval_scores(
                low[kept], high[kept], truth[kept], self.options.interval_level
            )
            sums.append((inside.sum(), width.sum(), score.sum(), truth[kept].sum(), kept.sum()))
            groups.append(image.group)
        table = np.array(sums, np.float64).reshape(-1, 5)
        if not len(table) or not table[:, 4].sum():
            return
        level = f"{100 * self.options.interval_level:g} %"
        said = _Words(self.options, groups, "area", f"{int(table[:, 4].sum()):,} matched objects")
        yield said.figure(
            "coverage", f"area intervals that hold the true area (meant: {level})", table, _over(0)
        )
        yield said.figure("width", "mean width of area intervals (µm²)", table, _over(1))
        yield said.figure("winkler", "mean interval score (µm²)", table, _over(2))
        yield said.figure("relative_width", "width over true area", table, lambda s: _ratio(s[:, 1], s[:, 3]))

    def _notes(self, doubts: Sequence[Doubt]) -> Iterable[str]:
        """Yield what the figures can't show."""
        objects = [i.objects for i in self._images]
        held = {n for o in objects for n in o.columns}
        if not held - {"probability"}:
            yield "the run drew no samples: only `probability` speaks of certainty; run with --samples 20"
        if not all(o.typed for o in objects):
            yield "classes were not compared: one side names none, or the names differ (map them with --labels)"
        if set(INTERVAL) <= held and not any(np.isfinite(o.truth_um2).any() for o in objects):
            yield "area intervals were not judged: nothing says what a pixel of the truth is; give --mpp"
        if not any(d.error == "pixel" for d in doubts):
            yield "pixels were not judged: that needs maps.ome.zarr in the run's folder and label images as truth"
        if hidden := sum(o.left_out for o in objects):
            yield f"{hidden:,} objects lie outside the truth's grid, or wholly under others, and were left out"
        yield "objects that were missed have no score: no doubt of found objects can point at them"


@final
@dataclass(frozen=True)
class _Words:
    """What all figures of one score share."""

    options: Options
    groups: Sequence[str]
    key: str
    over: str

    def figure(
        self,
        key: str,
        label: str,
        sums: Array,
        statistic: Callable[[Array], Array],
        value: float | None = None,
        headline: bool = True,
    ) -> Figure:
        """Return a figure of sums (images, columns), with its interval; `value` replaces that of the sums."""
        found = bootstrap(sums, self.groups, statistic, draws=self.options.resamples, seed=self.options.seed)
        return Figure(
            f"{key}:{self.key}",
            label,
            self.over,
            found.value if value is None else value,
            found.low,
            found.high,
            len(sums),
            headline=headline,
        )


def _ranking(graded: Graded, rows: Array, said: _Words) -> list[Figure]:
    """Return what a ranking by doubt is worth; `rows` (images, 2 K) are right and wrong ones by level."""
    names: Mapping[str, tuple[str, Callable[[Array, Array], Array]]] = {
        "auroc": ("error detection AUROC", error_auroc),
        "auprc": ("error detection AUPRC", error_auprc),
        "aurc": ("AURC", aurc),
        "eaurc": ("E-AURC", excess_aurc),
    }
    found = [
        said.figure(
            key, label, rows, partial(_of_counts, measure), float(measure(graded.right, graded.wrong))
        )
        for key, (label, measure) in names.items()
    ]
    totals = np.stack([v.sum(axis=1) for v in np.split(rows, 2, axis=1)], axis=1)
    share = said.figure(
        "errors", "share of errors", totals, lambda s: _ratio(s[:, 1], s.sum(axis=1)), headline=False
    )
    return [*found, share]


def _of_counts(measure: Callable[[Array, Array], Array], sums: Array) -> Array:
    """Return a measure of rows whose first half are right ones by level, and whose second half wrong ones."""
    right, wrong = np.split(sums, 2, axis=1)
    return measure(right, wrong)


def _calibration(binned: Mapping[str, Sequence[Reliability]], sums: Array, said: _Words) -> list[Figure]:
    """Return ECE in each binning, and the mean Brier and log scores; `sums` are (images, 3), items last."""
    labels = {"ece": f"ECE, {BINS} bins of one width", "ece_mass": f"ECE, {BINS} bins of equal mass"}
    found = [
        said.figure(kind, labels[kind], np.array([r.sums for r in each]), calibration_error)
        for kind, each in binned.items()
    ]
    found.append(said.figure("brier", "Brier score", sums, _over(0)))
    found.append(said.figure("nll", "negative log likelihood (nats)", sums, _over(1)))
    return found


def _over(column: int) -> Callable[[Array], Array]:
    """Return the statistic that divides a column by the last one."""
    return lambda sums: _ratio(sums[:, column], sums[:, -1])


def _ratio(part: Array, whole: Array) -> Array:
    return np.asarray(np.divide(part, whole, out=np.full(len(part), nan), where=whole > 0))
