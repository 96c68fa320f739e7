"""One image: truth beside prediction, reduced to counts and figures. Nothing of the image itself stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isinf, nan
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.evaluation.labels import Labels, Outlines, PackedOutlines
from wsitk.evaluation.outline_table import AREA_UNIT, draw, outline_table
from wsitk.evaluation.settings import Options
from wsitk.metrics.contingency import Contingency
from wsitk.metrics.counts import Counts
from wsitk.metrics.detection import TypedCounts, pair_points, typed_counts
from wsitk.metrics.overlap import Confusion, confusion
from wsitk.metrics.panoptic import aji, aji_plus, class_counts, count_matches, foreground_dice
from wsitk.metrics.surface import boundary_iou, surface_distances

__all__ = ["ALL", "ImageScores", "compare", "missing_like", "pairing_radius", "pixel_frame"]

Array = NDArray[Any]
Answer = Labels | Outlines

ALL = "all"
"""The name under which objects of all classes, or the whole foreground, are counted."""

THRESHOLDS = (0.3, 0.7)
"""Of IoU, beside 0.5: what small objects lose by a shift of one pixel shows there."""

RIM = 0.02
"""Width of the rim of boundary IoU as a share of the image's diagonal, as in Cheng et al. 2021."""

_UNKNOWN_RADIUS_PX = 12.0  # what HoVer-Net takes at 40x, where nothing says what a pixel is


@final
@dataclass(frozen=True)
class ImageScores:
    """What remains of one image.

    Attributes
    ----------
    name : str
    facts : name -> str
        Its slide, patient and tissue.
    missing : bool
        There was no prediction: everything is at its worst.
    unit : str
        Of lengths: ``um``, ``mm`` or, where nothing says what a pixel is, ``px``.
    truth_names, predicted_names : tuple of str or None
        The classes that each side tells apart; None if it tells none.
    values : name -> float
        Figures of this image, NaN where there is nothing to measure; ``dice:CLASS`` and the like for a class.
    counts : name -> Counts
        Objects matched at IoU > 0.5, of `ALL` and of each class.
    at : threshold -> Counts
        The same of `ALL` at other thresholds.
    detection : TypedCounts or None
        Centroids; the classes are the positions in `types`.
    types : tuple of str
    pixels : name -> Confusion
    findings : name -> float
        What the warnings look at.
    said : tuple of str
        What was read.
    """

    name: str
    facts: Mapping[str, str]
    missing: bool
    unit: str
    truth_names: tuple[str, ...] | None
    predicted_names: tuple[str, ...] | None
    truth_declared: bool
    predicted_declared: bool
    values: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)
    at: Mapping[float, Counts] = field(default_factory=dict)
    detection: TypedCounts | None = None
    types: tuple[str, ...] = ()
    pixels: Mapping[str, Confusion] = field(default_factory=dict)
    findings: Mapping[str, float] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def missing_like(truth: Answer) -> Answer:
    """Return a prediction without any object, on the grid of `truth`."""
    if isinstance(truth, Labels):
        blank = np.zeros((1, *truth.shape), np.int32)
        return Labels(blank, (), np.full(1, -1), spacing=truth.spacing, unit=truth.unit, affine=truth.affine)
    return PackedOutlines([], np.zeros(0, np.int64), ())


def compare(
    name: str, truth: Answer, predicted: Answer | None, options: Options, facts: Mapping[str, str]
) -> ImageScores:
    """Return the scores of one image; `predicted` is None where there is no prediction.

    Raises SourceError: WSI826 for different shapes, WSI827 for different places in the patient; UsageError: WSI828
    for pixel sizes that contradict each other, WSI830 for a task that these files can't serve.
    """
    missing = predicted is None
    twice = 0.0
    answer: Answer = missing_like(truth) if predicted is None else predicted.renamed(options.predicted_names)
    truth = truth.renamed(options.truth_names)
    if options.task != "detection" or (isinstance(truth, Labels) and isinstance(answer, Labels)):
        truth, answer, twice = _on_one_grid(name, truth, answer)
    steps, unit = pixel_frame(name, truth, answer, options)
    measure = {"nuclei": _nuclei, "segmentation": _segmentation, "detection": _detection}[options.task]
    parts = measure(truth, answer, options, steps, unit, missing)
    findings: dict[str, float] = {"drawn_twice": twice, **parts.pop("findings", {})}
    return ImageScores(
        name,
        facts,
        missing,
        unit,
        truth.names if truth.typed else None,
        answer.names if answer.typed else None,
        truth.declared,
        answer.declared,
        said=(truth.source, answer.source),
        findings=findings,
        **parts,
    )


def _on_one_grid(name: str, truth: Answer, predicted: Answer) -> tuple[Answer, Answer, float]:
    """Return both as labels of one shape, or both as outlines, and the pixels that were drawn twice."""
    twice = 0
    if isinstance(truth, Labels) and isinstance(predicted, Outlines):
        predicted, twice = draw(predicted, truth.shape)
    elif isinstance(truth, Outlines) and isinstance(predicted, Labels):
        truth, twice = draw(truth, predicted.shape)
    if isinstance(truth, Labels) and isinstance(predicted, Labels):
        if truth.shape != predicted.shape:
            raise SourceError(
                "WSI826",
                f"{name}: truth is {truth.shape} pixels, prediction {predicted.shape}; bring both onto one grid",
            )
        if truth.affine and predicted.affine and not np.allclose(truth.affine, predicted.affine, atol=1e-3):
            raise SourceError(
                "WSI827",
                f"{name}: truth and prediction lie at different places in the patient (their affines differ);"
                " resample the prediction onto the truth's grid",
            )
    return truth, predicted, twice


def pixel_frame(
    name: str, truth: Answer, predicted: Answer, options: Options
) -> tuple[tuple[float, ...], str]:
    """Return the size of a pixel for each axis and its unit; 1 and ``px`` where nobody knows."""
    axes = len(truth.shape) if isinstance(truth, Labels) else 2
    stated: dict[str, tuple[tuple[float, ...], str]] = {}
    for who, side in (("truth", truth), ("prediction", predicted)):
        if isinstance(side, Labels) and side.spacing:
            stated[who] = side.spacing, side.unit
        elif isinstance(side, Outlines) and side.spacing_um:
            stated[who] = (side.spacing_um,) * axes, "um"
    if options.mpp is not None:
        stated["--mpp"] = (options.mpp,) * axes, "um"
    if not stated:
        return (1.0,) * axes, "px"
    (first, chosen), *others = stated.items()
    for other, (steps, unit) in others:
        scale = {("um", "mm"): 1e-3, ("mm", "um"): 1e3}.get((unit, chosen[1]), 1.0)
        if not np.allclose(np.array(steps) * scale, chosen[0], rtol=0.02):
            raise UsageError(
                "WSI828",
                f"{name}: a pixel has {chosen[0]} {chosen[1]} by {first}, {steps} {unit} by {other};"
                " correct one of them",
            )
    return chosen


def _nuclei(
    truth: Answer, predicted: Answer, options: Options, steps: tuple[float, ...], unit: str, missing: bool
) -> dict[str, Any]:
    """Instances: counts, AJI, Dice, centroids."""
    names = tuple(dict.fromkeys((*truth.names, *predicted.names)))
    if isinstance(truth, Labels) and isinstance(predicted, Labels):
        table = Contingency.of(truth.flat(), predicted.flat())
        area = 1
        layered = truth.layered or predicted.layered
        kinds = None if layered else (truth.kinds[table.truth_ids], predicted.kinds[table.predicted_ids])
    else:
        assert isinstance(truth, Outlines)
        assert isinstance(predicted, Outlines)
        table, area = outline_table(truth, predicted), AREA_UNIT
        kinds = truth.kinds, predicted.kinds
    counts = {ALL: count_matches(table)}
    if kinds is not None:
        mine, theirs = _positions(kinds[0], truth.names, names), _positions(kinds[1], predicted.names, names)
        counts |= dict(zip(names, class_counts(table, mine, theirs, range(len(names))), strict=True))
    else:
        assert isinstance(truth, Labels)
        assert isinstance(predicted, Labels)
        counts |= {n: count_matches(Contingency.of(truth.of(n), predicted.of(n))) for n in names}
    dice = foreground_dice(table)
    values = {"aji": aji(table), "aji_plus": aji_plus(table), "dice": dice, "iou": dice / (2 - dice)}
    if missing:  # also where the truth is empty: a lost file earns nothing
        values = dict.fromkeys(values, 0.0)
    found: dict[str, float] = {
        "truth": len(table.truth_ids),
        "median_area_px": float(np.median(table.truth_area)) / area if len(table.truth_ids) else nan,
    }
    found |= _borders(truth, predicted)
    parts = _detection(truth, predicted, options, steps, unit, missing)
    parts["findings"] |= found
    return parts | {
        "counts": counts,
        "at": {t: count_matches(table, t) for t in THRESHOLDS},
        "values": values,
    }


def _borders(truth: Answer, predicted: Answer) -> dict[str, float]:
    """Return what labels say of borders and overlaps; outlines of a slide have no border to speak of."""
    if not (isinstance(truth, Labels) and isinstance(predicted, Labels)):
        return {"overlap_px": 0.0}
    flat = truth.flat()
    edges = [np.take(flat, k, axis) for axis in range(flat.ndim) for k in (0, -1)]
    touching = np.unique(np.concatenate([e.ravel() for e in edges]))
    return {
        "on_border": float((touching > 0).sum()),
        "overlap_px": float(truth.overlapping() + predicted.overlapping()),
    }


def _detection(
    truth: Answer, predicted: Answer, options: Options, steps: tuple[float, ...], unit: str, missing: bool
) -> dict[str, Any]:
    """Centroids, paired within the radius."""
    radius = pairing_radius(options, steps, unit)
    names = tuple(dict.fromkeys((*truth.names, *predicted.names)))
    true, true_kinds = _points(truth, names)
    found, found_kinds = _points(predicted, names)
    style: Literal["hovernet", "gated"] = "hovernet" if options.protocol == "hovernet" else "gated"
    pairs = pair_points(true * steps, found * steps, radius, style)
    typed = typed_counts(pairs, true_kinds, found_kinds, tuple(range(len(names))))
    return {
        "detection": typed,
        "types": names,
        "findings": {"radius": radius, "truth": len(true), "predicted": len(found)},
    }


def pairing_radius(options: Options, steps: tuple[float, ...], unit: str) -> float:
    """Return how far apart a pair's centroids may lie, in `unit`; HoVer-Net's 12 px where the unit is unknown."""
    if unit == "px" and options.radius.unit != "px":
        return _UNKNOWN_RADIUS_PX
    return options.radius.to(unit, steps[0])


def _points(side: Answer, names: tuple[str, ...]) -> tuple[Array, Array]:
    """Return centroids in array order (y, x), and their classes as positions in `names`."""
    if isinstance(side, Labels):
        places, kinds = side.points()
    else:
        places, kinds = side.centroids_xy[:, ::-1], side.kinds
    return places, _positions(kinds, side.names, names)


def _positions(kinds: Array, mine: tuple[str, ...], names: tuple[str, ...]) -> Array:
    """Return classes of one side as positions in the names of both, -1 for none."""
    return np.array([*(names.index(n) for n in mine), -1], np.int64)[kinds]


def _segmentation(
    truth: Answer, predicted: Answer, options: Options, steps: tuple[float, ...], unit: str, missing: bool
) -> dict[str, Any]:
    """Areas of each class: overlap and distances of their borders."""
    if not (isinstance(truth, Labels) and isinstance(predicted, Labels)):
        raise UsageError(
            "WSI830",
            f"{truth.source}, {predicted.source}: outlines on both sides; --task segmentation needs the pixel grid of"
            " a label image on one of them (or take --task nuclei)",
        )
    typed = truth.typed and predicted.typed
    values: dict[str, float] = {}
    pixels: dict[str, Confusion] = {}
    findings: dict[str, float] = {"touching": _touching(truth)}
    if options.tolerance is not None:
        findings["tolerance_px"] = options.tolerance.to(unit, max(steps)) / max(steps)
    for name in dict.fromkeys((*truth.names, *predicted.names)) if typed else (ALL,):
        t, p = ((side.of(name) if typed else side.flat()) > 0 for side in (truth, predicted))
        pixels[name] = confusion(t, p)
        figures = _areas(t, p, options, steps, unit)
        if missing and (name == ALL or t.any()):
            worst = {"hd95": _diagonal(t, steps)}
            figures = {key: worst.get(key, 0.0) for key in figures}
        elif isinf(figures["hd95"]):  # one side is empty: as far off as the image allows
            figures["hd95"] = _diagonal(t, steps)
            findings[f"one_empty:{name}"] = 1.0
        values |= {f"{key}:{name}": value for key, value in figures.items()}
        findings[f"components:{name}"] = _components(t)
    return {"values": values, "pixels": pixels, "findings": findings}


def _areas(t: Array, p: Array, options: Options, steps: tuple[float, ...], unit: str) -> dict[str, float]:
    counts = confusion(t, p)
    surfaces = surface_distances(t, p, steps)
    tolerance = max(steps) if options.tolerance is None else options.tolerance.to(unit, max(steps))
    return {
        "dice": counts.dice(),
        "iou": counts.iou(),
        "nsd": surfaces.nsd(tolerance),
        "hd95": surfaces.hausdorff(95.0),
        "boundary_iou": boundary_iou(t, p, max(RIM * _diagonal(t, steps), *steps), steps),
    }


def _diagonal(mask: Array, steps: tuple[float, ...]) -> float:
    return float(np.linalg.norm(np.array(mask.shape) * steps))


def _components(mask: Array) -> float:
    from scipy import ndimage

    return float(ndimage.label(mask)[1])


def _touching(truth: Labels) -> float:
    """Return how many objects of a map of instances have another object as their neighbour."""
    flat = truth.flat()
    if truth.areas:
        return 0.0
    touching: set[int] = set()
    for axis in range(flat.ndim):
        one, other = (np.moveaxis(flat, axis, 0)[s] for s in (slice(1, None), slice(None, -1)))
        meet = (one != other) & (one > 0) & (other > 0)
        touching |= set(np.unique(one[meet]).tolist()) | set(np.unique(other[meet]).tolist())
    return float(len(touching))
