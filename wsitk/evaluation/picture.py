"""`cases.png`: the worst images and those in the middle, with what was found, missed and made up.

┌ title, legend ───────────────┐
│ worst     │ worst  │ worst   │   of each image the window in which most went wrong
│ middle    │ middle │ middle  │
└──────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import WsitkError
from wsitk.evaluation.compare import ALL, ImageScores, missing_like, pairing_radius, pixel_frame
from wsitk.evaluation.figures import image_quality
from wsitk.evaluation.labels import Labels, Outlines, Packed, PackedOutlines
from wsitk.evaluation.outline_table import draw, outline_table
from wsitk.evaluation.pairing import Pair
from wsitk.evaluation.run import Evaluation
from wsitk.evaluation.settings import Options
from wsitk.geometry import Region
from wsitk.metrics.contingency import Contingency
from wsitk.metrics.detection import pair_points
from wsitk.metrics.panoptic import matches
from wsitk.writers.base import atomic_file

__all__ = ["draw_cases"]

Array = NDArray[Any]
Color = tuple[int, int, int]

_SIDE, _GAP, _TOP, _CAPTION, _COLUMNS = 560, 24, 120, 52, 3
_WINDOW = 320  # px of the image in a panel: nuclei are large enough to judge
_PAGE, _INK, _SOFT, _RULE = (255, 255, 255), (29, 37, 44), (104, 116, 126), (224, 229, 233)
# on the pink and violet of H&E; faults are filled, so that nobody needs to tell red from green
_COLORS: dict[str, Color] = {
    "truth, found": (0, 158, 115),
    "prediction, right": (0, 60, 200),
    "missed": (255, 190, 0),
    "made up": (225, 0, 20),
}


@final
@dataclass(frozen=True)
class _View:
    """What a panel shows: label maps of one window, and which labels are at fault."""

    region: Region
    truth: Array
    predicted: Array
    missed: Array
    false: Array


def draw_cases(out: Path, evaluation: Evaluation) -> None:
    """Draw three of the worst images and three of the middle, or fewer where there are no more.

    Images are read again. One whose picture can't be read is shown on white. Raises OutputError as `atomic_file`.
    """
    from PIL import Image, ImageDraw

    from wsitk.writers.lettering import text_width, write

    rows = [(word, row) for word, row in zip(("worst", "middle"), _choose(evaluation), strict=True) if row]
    across = max((len(row) for _, row in rows), default=1)
    width = max(2, across) * (_SIDE + _GAP) + _GAP
    page = Image.new("RGB", (width, _TOP + len(rows) * (_SIDE + _CAPTION + _GAP)), _PAGE)
    pen = ImageDraw.Draw(page)
    write(pen, (_GAP, 22), f"wsitk evaluate · {evaluation.options.task}", 30, _INK)
    left = float(_GAP)
    for name, color in _COLORS.items():
        pen.rectangle([left, 76, left + 18, 94], fill=color)
        write(pen, (left + 26, 85), name, 20, _SOFT, anchor="lm")
        left += 26 + text_width(name, 20) + 30
    for y, (word, row) in enumerate(rows):
        top = _TOP + y * (_SIDE + _CAPTION + _GAP)
        for x, (score, image, pair) in enumerate(row):
            place = (_GAP + x * (_SIDE + _GAP), top)
            page.paste(Image.fromarray(_panel(pair, evaluation.options)), place)
            lost = " · no prediction" if image.missing else ""
            caption = f"{word} {x + 1}: {score:.3f} · {_short(image.name)}{lost}"
            pen.rectangle([*place, place[0] + _SIDE - 1, place[1] + _SIDE - 1], outline=_RULE)
            write(pen, (place[0], top + _SIDE + 10), caption, 20, _INK)
    with atomic_file(out, overwrite=True) as stream:
        page.save(stream, "PNG")


def _choose(evaluation: Evaluation) -> tuple[list[Any], list[Any]]:
    """Return score, image and pair of the worst images and of those around the median."""
    scored = []
    for image, pair in zip(evaluation.images, evaluation.pairs, strict=True):
        value = _score(image, evaluation.options)
        if not isnan(value):
            scored.append((value, image, pair))
    scored.sort(key=lambda s: (s[0], s[1].name))
    worst = scored[:_COLUMNS]
    rest = scored[_COLUMNS:]
    first = max(0, min(len(rest) - _COLUMNS, len(scored) // 2 - _COLUMNS - _COLUMNS // 2))
    return worst, rest[first : first + _COLUMNS]


def _score(image: ImageScores, options: Options) -> float:
    """Return the number that images are ranked by: PQ, F1, or the mean Dice of the classes."""
    if image.missing:
        return 0.0
    if options.task == "nuclei":
        return image_quality(image.counts[ALL], "pooled", False)
    if options.task == "detection":
        return image.detection.detection.f1 if image.detection is not None else nan
    dice = [v for k, v in image.values.items() if k.startswith("dice:") and not isnan(v)]
    return sum(dice) / len(dice) if dice else nan


def _panel(pair: Pair, options: Options) -> Array:
    """Return one image's window with its outlines, `_SIDE` px square."""
    truth = pair.truth.read().renamed(options.truth_names)
    predicted = (
        pair.predicted.read().renamed(options.predicted_names) if pair.predicted else missing_like(truth)
    )
    view = (
        _points_view(truth, predicted, options)
        if options.task == "detection"
        else _view(truth, predicted, options)
    )
    return _painted(_pixels(pair, view.region), view)


def _pixels(pair: Pair, region: Region) -> Array:
    """Return the picture below; white where there is none, or none that can be read."""
    for item in (pair.truth, pair.predicted):
        if item is not None and item.picture is not None:
            try:
                return np.asarray(item.picture(region))
            except WsitkError:  # a picture is a help to the eye, not a part of the evaluation
                continue
    return np.full((*region.shape, 3), 255, np.uint8)


def _view(truth: Any, predicted: Any, options: Options) -> _View:
    """Return the window in which most pixels belong to objects that were missed or made up."""
    if isinstance(truth, Outlines) and isinstance(predicted, Outlines):
        return _outline_view(truth, predicted)
    if isinstance(truth, Outlines):
        truth, _ = draw(truth, predicted.shape)
    if isinstance(predicted, Outlines):
        predicted, _ = draw(predicted, truth.shape)
    t, p = _plane(truth, predicted)
    if options.task == "segmentation":
        missed, false = t.astype(bool) & (p != t), p.astype(bool) & (p != t)
        region = _densest(missed | false)
        cut = region.slices()
        return _View(region, t[cut], p[cut], missed[cut], false[cut])
    table = Contingency.of(t, p)
    chosen = matches(table)
    lost = _without(table.truth_ids, table.truth[chosen])
    made = _without(table.predicted_ids, table.predicted[chosen])
    missed, false = np.isin(t, lost), np.isin(p, made)
    region = _densest(missed | false)
    cut = region.slices()
    return _View(region, t[cut], p[cut], missed[cut], false[cut])


def _plane(truth: Labels, predicted: Labels) -> tuple[Array, Array]:
    """Return two maps; of volumes the plane in which most differs. Classes are compared where values are classes."""
    sides = []
    for side in (truth, predicted):
        flat = side.flat()
        sides.append((side.kinds + 1)[flat] * (flat > 0) if side.areas else flat)
    t, p = sides
    while t.ndim > 2:
        k = int(np.argmax(((t > 0) != (p > 0)).sum(axis=tuple(range(t.ndim - 1)))))
        t, p = t[..., k], p[..., k]
    return t, p


def _outline_view(truth: Outlines, predicted: Outlines) -> _View:
    table = outline_table(truth, predicted)
    chosen = matches(table)
    lost = _without(table.truth_ids, table.truth[chosen]) - 1
    made = _without(table.predicted_ids, table.predicted[chosen]) - 1
    region = _crowd(
        np.concatenate([truth.centroids_xy[lost], predicted.centroids_xy[made]]), truth, predicted
    )
    maps = []
    for side, wrong in ((truth, lost), (predicted, made)):
        rows, labels = _drawn(side, region)
        number = np.append(0, rows + 1)[labels]
        maps.append((number, np.isin(number, wrong + 1)))
    return _View(region, maps[0][0], maps[1][0], maps[0][1], maps[1][1])


def _points_view(truth: Any, predicted: Any, options: Options) -> _View:
    """Return discs around centroids."""
    t, p = (s.points()[0] if isinstance(s, Labels) else s.centroids_xy[:, ::-1] for s in (truth, predicted))
    steps, unit = pixel_frame("", truth, predicted, options)
    radius = pairing_radius(options, steps, unit) / steps[0]
    pairs = pair_points(t, p, radius)
    t, p = t[:, :2], p[:, :2]  # of volumes, along the last axis
    wrong = np.concatenate([t[pairs.unpaired_truth], p[pairs.unpaired_predicted]])
    region = _crowd(wrong[:, ::-1], truth, predicted, np.concatenate([t, p])[:, ::-1])
    yy, xx = np.mgrid[: region.shape[0], : region.shape[1]]
    maps = []
    for points, left in ((t, pairs.unpaired_truth), (p, pairs.unpaired_predicted)):
        labels = np.zeros(region.shape, np.int64)
        size = radius / 2 if points is t else radius / 3
        for k in np.flatnonzero(((points > region.start) & (points < region.stop)).all(axis=1)):
            labels[
                np.hypot(yy + region.start[0] - points[k, 0], xx + region.start[1] - points[k, 1]) < size
            ] = k + 1
        maps.append((labels, np.isin(labels, left + 1)))
    return _View(region, maps[0][0], maps[1][0], maps[0][1], maps[1][1])


def _crowd(wrong_xy: Array, truth: Any, predicted: Any, all_xy: Array | None = None) -> Region:
    """Return the window that holds the most of `wrong_xy`, or of all objects if nothing is wrong."""
    if all_xy is None:
        all_xy = np.concatenate([truth.centroids_xy, predicted.centroids_xy])
    points = wrong_xy if len(wrong_xy) else all_xy
    if not len(points):
        return Region((0, 0), (_WINDOW, _WINDOW))
    cell = np.floor(points / (_WINDOW / 2)).astype(np.int64)
    found, count = np.unique(cell, axis=0, return_counts=True)
    x, y = (
        np.maximum(0, (found[int(np.argmax(count))] + 0.5) * (_WINDOW / 2) - _WINDOW / 2).astype(int).tolist()
    )
    return Region((y, x), (_WINDOW, _WINDOW))


def _drawn(side: Outlines, region: Region) -> tuple[Array, Array]:
    """Return the rows of the objects in a window, and a map of them, numbered in that order from 1."""
    import shapely

    (y0, x0), (y1, x1) = region.start, region.stop
    left, top, right, bottom = side.bounds.T
    rows = np.flatnonzero((left < x1) & (right > x0) & (top < y1) & (bottom > y0))
    shapes = shapely.transform(side.polygons(rows), lambda xy: xy - (x0, y0))
    labels, _ = draw(PackedOutlines([Packed.of(shapes)], np.zeros(len(rows), np.int64), ()), region.shape)
    return rows, labels.flat()


def _without(ids: Array, matched: Array) -> Array:
    left = np.ones(len(ids), bool)
    left[matched] = False
    return ids[left]


def _densest(wrong: Array) -> Region:
    """Return the window of at most `_WINDOW` px with the most pixels of `wrong`; the middle if there are none."""
    shape = tuple(min(_WINDOW, n) for n in wrong.shape)
    room = tuple(n - s for n, s in zip(wrong.shape, shape, strict=True))
    if not wrong.any():
        return Region(tuple(r // 2 for r in room), shape)
    sums = np.pad(wrong.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    (h, w), (y, x) = shape, room
    inside = sums[h:, w:] - sums[: y + 1, w:] - sums[h:, : x + 1] + sums[: y + 1, : x + 1]
    start = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return Region(tuple(int(v) for v in start), shape)


def _painted(pixels: Array, view: _View) -> Array:
    """Return the window at the size of a panel, errors tinted, all objects outlined."""
    import cv2

    from wsitk.writers.preview_layers import blend

    zoom = _SIDE / max(view.region.shape)
    size = tuple(max(1, round(n * zoom)) for n in view.region.shape[::-1])
    image = np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_CUBIC))
    layers = (
        ("missed", view.truth, view.missed, 0.34),
        ("made up", view.predicted, view.false, 0.3),
        ("truth, found", view.truth, (view.truth > 0) & ~view.missed, 0.0),
        ("prediction, right", view.predicted, (view.predicted > 0) & ~view.false, 0.0),
    )
    for name, labels, mask, tint in layers:
        numbers = _numbered(labels, mask)
        large = cv2.resize(numbers, size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
        if tint:
            image = blend(image, _COLORS[name], tint * (large > 0))
        image = np.where(_rim(large)[..., None], np.array(_COLORS[name], np.uint8), image)
    page = np.full((_SIDE, _SIDE, 3), 244, np.uint8)
    page[: image.shape[0], : image.shape[1]] = image
    return page


def _numbered(labels: Array, mask: Array) -> Array:
    """Return the labels inside `mask` as small numbers that cv2 can resize: 1, 2, ..."""
    numbers = np.unique(np.where(mask, labels, 0), return_inverse=True)[1].reshape(labels.shape)
    numbers += int(mask.all())  # no background: np.unique began with an object
    return numbers.astype(np.float32)


def _rim(labels: Array) -> Array:
    """Return the two outermost pixels of each object."""
    import cv2

    kernel = np.ones((3, 3), np.uint8)
    image = labels.astype(np.float32)
    flat = (cv2.dilate(image, kernel, iterations=2) == image) & (
        cv2.erode(image, kernel, iterations=2) == image
    )
    return np.asarray((labels > 0) & ~flat)


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"
